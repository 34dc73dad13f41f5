"""The demonstration, on scikit-learn's digits: what it plants it finds, and what it reports it measured."""

from __future__ import annotations

import base64
import io
import json
import re

import pytest
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

from mgd.errors import BadArgument
from mgd.recipes import data
from mgd.recipes.demo import recipe, report
from mgd.ui.console import show
from mgd.ui.page import write

STEPS = 60


@pytest.fixture(scope="module")
def problem():
    return recipe.Problem.make(data.digits(), data.digits(train=False), STEPS, seed=0)


@pytest.fixture(scope="module")
def found():
    return recipe.run(data.digits(), data.digits(train=False), STEPS, seed=0)


def test_a_fifth_of_the_labels_is_wrong_and_only_those(problem):
    differs = problem.given != problem.train.labels
    assert torch.equal(differs, problem.wrong)
    assert int(differs.sum()) == len(problem.train) // 5 == 170


def test_training_held_out_and_test_images_are_disjoint(problem):
    def keys(images):
        return {bytes(image.numpy().tobytes()) for image in images.images}

    # The digits hold no two equal images, so equal bytes would be one image in two places.
    train, held_out, test = keys(problem.train), keys(problem.held_out), keys(problem.test)
    assert (len(train), len(held_out), len(test)) == (850, 498, 449)
    assert not train & held_out and not train & test and not held_out & test


def test_every_batch_holds_the_images_and_the_given_labels_of_its_indices(problem):
    x = problem.train.floats()
    seen = torch.cat([i for _, _, i in problem.function.batches])
    for images, labels, i in problem.function.batches:
        assert torch.equal(images, x[i]) and torch.equal(labels, problem.given[i])
    assert int(torch.bincount(seen).max() - torch.bincount(seen, minlength=850).min()) == 1  # epochs, reshuffled


def test_the_same_seed_makes_the_same_problem_and_another_seed_another(problem):
    again = recipe.Problem.make(data.digits(), data.digits(train=False), STEPS, seed=0)
    other = recipe.Problem.make(data.digits(), data.digits(train=False), STEPS, seed=1)
    assert torch.equal(again.given, problem.given) and not torch.equal(other.wrong, problem.wrong)
    for a, b in zip(again.function.model.parameters(), problem.function.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_schedule_rises_to_its_peak_and_falls():
    rate = recipe.schedule(100)
    assert float(rate.max()) == pytest.approx(recipe.LEARNING_RATE, rel=0.03)
    assert 8 <= int(rate.argmax()) <= 10
    assert bool((rate > 0).all()) and float(rate[-1]) < 0.001 * recipe.LEARNING_RATE


@pytest.mark.parametrize("side, channels", [(8, 1), (28, 1), (32, 3), (4, 1)])
def test_the_network_takes_images_of_any_side(side, channels):
    images = data.Images("x", torch.zeros(3, channels, side, side, dtype=torch.uint8), torch.arange(3), tuple("abc"))
    assert recipe.network(images)(images.images.float()).shape == (3, 3)


def test_the_metagradient_holds_and_finds_the_wrong_labels(found):
    assert found.check.passed
    assert max(key.relative_error for key in found.check.keys.values()) < 1e-6
    # By chance 0.2 and 0.5; this run, which is the same everywhere up to rounding, gives about 0.9 and 0.9.
    assert found.precision(0.05) > 0.6
    assert recipe.auc(found.harm, found.problem.wrong) > 0.8


def test_images_found_harmful_are_harmful_out_of_sample(found):
    everything, chance, harmful, wrong = (result["loss"] for result in found.retrained.values())
    assert harmful < everything and harmful < chance and wrong < everything


def test_precision_counts_the_wrong_labels_among_the_first(found):
    order = sorted(range(850), key=lambda i: -float(found.harm[i]))
    assert found.precision(0.1) == sum(bool(found.problem.wrong[i]) for i in order[:85]) / 85


def test_auc_is_that_of_scikit_learn_ties_included():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 12, (200,), generator=generator).float()
    positive = torch.rand(200, generator=generator) < score / 20
    assert recipe.auc(score, positive) == pytest.approx(roc_auc_score(positive, score), rel=1e-12)
    assert recipe.auc(torch.arange(4.0), torch.tensor([False, False, True, True])) == 1.0


def test_the_report_holds_what_was_measured(found):
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    norm = float(torch.linalg.vector_norm(found.result.grads["data_weights"]))
    assert report["gradient_norms"]["data_weights"] == pytest.approx(norm)
    assert report["finite_difference_errors"]["lr"] == found.check.keys["lr"].relative_error
    assert report["ratio_to_training"] == pytest.approx(report["metagradient_seconds"] / report["training_seconds"])
    assert report["ratio_to_training"] > 1  # a metagradient holds a training
    memory = list(report["peak_memory_bytes"].values())
    assert memory == sorted(memory) and memory[0] > 50e6  # torch alone takes more
    assert report["report"]["plan"]["peak"]["host"] >= STEPS * 4 * report["parameters"]  # every gradient is logged
    assert report["steps"] == STEPS and len(report["gradients"]["lr"]) == STEPS


def test_the_terminal_shows_the_figures(found):
    console = Console(width=80, record=True, file=io.StringIO())
    show(report.page(found), console)
    text = console.export_text()
    assert f"{float(found.result.value):.4f}" in text
    assert f"{found.check.keys['lr'].relative_error:.1e}" in text
    assert f"{found.ratio:.2f}" in text
    assert "holds against finite differences" in text
    assert "…" not in text  # nothing is cut off at 80 columns


def test_the_page_is_self_contained_and_its_pictures_are_not_blank(found, tmp_path):
    from matplotlib.image import imread

    paths = write(report.page(found), tmp_path / "new" / "folder")
    assert {path.name for path in paths} == {
        "index.html",
        "most-harmful.png",
        "most-helpful.png",
        "wrong-labels.png",
        "learning-rate.png",
    }
    page = paths[0].read_text("utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page
    embedded = [base64.b64decode(text) for text in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert embedded == [path.read_bytes() for path in paths[1:]]
    for path in paths[1:]:
        assert imread(path)[..., :3].std() > 0.05
    assert f"{recipe.auc(found.harm, found.problem.wrong):.3f}" in page


def test_too_little_data_or_no_step_is_refused():
    digits = data.digits()
    with pytest.raises(BadArgument, match="at least 200 training images; digits has 100"):
        recipe.Problem.make(digits[:100], digits, 10, 0)
    with pytest.raises(BadArgument, match="at least one training step"):
        recipe.Problem.make(digits, digits, 0, 0)
