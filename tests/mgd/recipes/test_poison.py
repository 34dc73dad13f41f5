"""The poisoning test on scikit-learn's digits: the effect, the mathematics of its parts, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mgd
from mgd.errors import BadArgument, BadData, NonFiniteState
from mgd.recipes import data
from mgd.recipes.poison import attack, cancelling, checks, recipe, report
from mgd.recipes.poison.training import NETWORKS, Training, check_data, schedule, wrong_probability
from mgd.ui.page import write


def digits(n: int, start: int = 0):
    part = data.digits()[start : start + n]
    return part.images.float() / 255, part.labels


def small(steps: int = 12, n: int = 120, **options) -> Training:
    held, y = digits(100, 300)
    return Training(*digits(n), 10, lambda model: -wrong_probability(model(held), y), steps=steps, batch=20, **options)


@pytest.fixture(scope="module")
def whole():
    settings = recipe.Settings().quick().fitting(len(data.digits()))
    return recipe.run(data.digits(), data.digits(train=False), settings)


@pytest.fixture(scope="module")
def found():
    """Too short for an effect: what is found is there, and is shown."""
    few = {"steps": 12, "meta_steps": 3, "seeds": 2, "cancelling_steps": 5, "watch": 1}
    settings = replace(recipe.Settings().quick().fitting(len(data.digits())), **few)
    return recipe.run(data.digits(), data.digits(train=False), settings)


# --- the whole of it -------------------------------------------------------------------------------------------------


def test_the_poison_lowers_the_accuracy_of_freshly_trained_models_more_than_the_baseline_does(whole):
    ours, theirs = (float(whole.drops(arm).mean()) for arm in (recipe.MGD, recipe.CANCELLING))
    assert ours > 0.01 and ours > 2 * theirs
    assert float(whole.drops("noise").mean()) < ours / 2
    assert whole.descent.values[-1] < whole.descent.values[0] - 0.02  # the objective is minus the held-out error


def test_only_the_chosen_images_change_and_they_stay_in_the_range(found):
    clean = found.images["clean"]
    others = torch.ones(len(clean), dtype=torch.bool).index_fill(0, found.poisoned, False)
    assert len(found.poisoned) == round(0.025 * len(clean))
    for images in found.images.values():
        assert torch.equal(images[others], clean[others])
        assert 0 <= float(images.min()) and float(images.max()) <= 1
    changed = (found.images[recipe.MGD] != clean).flatten(1).any(1)
    assert torch.equal(changed, ~others)


def test_a_check_finds_the_poison_better_than_chance(whole):
    aucs = {check.check: check.auc for check in whole.checks[recipe.MGD]}
    assert set(aucs) == set(checks.CHECKS)
    assert max(aucs.values()) > 0.8


def test_json_and_page_are_complete(found, tmp_path):
    from matplotlib.image import imread

    written = json.loads(json.dumps(found.to_dict(), allow_nan=True))
    scores = written["accuracies"]
    assert set(scores) == {"seen seeds", "fresh seeds", "cnn"}
    assert all(set(arms) == set(found.images) for arms in scores.values())
    mean = sum(scores["fresh seeds"]["clean"]) / 4 - sum(scores["fresh seeds"][recipe.MGD]) / 4
    assert written["drops"]["fresh seeds"][recipe.MGD]["mean"] == pytest.approx(mean)
    assert len(written["test_accuracy_of_every_meta_step"]) == found.settings.meta_steps
    paths = write(report.page(found), tmp_path)
    assert {p.name for p in paths} == {"index.html", "descent.png", "accuracy.png", "gallery.png", "checks.png"}
    for path in paths[1:]:
        assert imread(path)[..., :3].std() > 0.05


# --- its parts -------------------------------------------------------------------------------------------------------


def test_the_metagradient_of_the_pixels_holds_against_finite_differences():
    training = small(n=60)
    held = digits(100, 300)
    training.function = training.function.replaced(
        objective=lambda model: F.cross_entropy(model(held[0].to(next(model.parameters()))), held[1])
    )
    assert mgd.check(training.at(3), training.z()).passed


def test_a_seed_decides_start_and_order_and_two_seeds_differ():
    training = small()
    a, again, b = (training.train(seed) for seed in (1, 1, 2))
    assert all(torch.equal(a[name], again[name]) for name in a)
    assert any(not torch.equal(a[name], b[name]) for name in a)
    order = training.visits.order.clone()
    training.at(1)
    assert not torch.equal(order, training.visits.order)


def test_the_loss_reads_the_images_of_z_and_not_the_original_ones():
    training = small()
    blank = training.train(0, torch.zeros_like(training.images))
    assert any(not torch.equal(blank[name], x) for name, x in training.train(0).items())


def test_the_descent_takes_steps_of_the_stated_size_inside_the_box():
    training = small()
    poisoned = torch.tensor([3, 50])
    start = training.images[poisoned]
    moved = attack.descend(training, poisoned, steps=1, step_size=0.25, seeds=1).variables["pixels"]
    allowed = torch.stack([(start + d).clamp(0, 1) for d in (-0.25, 0.0, 0.25)])
    assert bool(((moved - allowed).abs() < 1e-6).any(0).all()) and not torch.equal(moved, start)


def test_controls_keep_labels_and_give_strangers_of_other_classes():
    x, y = digits(100)
    poisoned = torch.arange(0, 40, 4)
    pixels = torch.rand(10, 1, 8, 8)
    sets = attack.controls(x, y, poisoned, pixels, 0)
    for i in poisoned.tolist():
        source = [j for j in range(100) if torch.equal(x[j], sets["other classes' images"][i])]
        assert source and all(y[j] != y[i] for j in source)
    handed = sets["the poison, labels shuffled"][poisoned].flatten(1)
    assert sorted(handed.sum(1).tolist()) == pytest.approx(sorted(pixels.flatten(1).sum(1).tolist()))


def test_cancelling_lowers_the_gradient_at_a_bad_target():
    torch.manual_seed(0)
    x, y = digits(60)
    model = NETWORKS["mlp"](1, 8, 10)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm = lambda values: torch.cat([v.flatten() for v in values]).norm()
    target = cancelling.corrupted(model, start, x, y, 0.1)
    moved = norm([target[name] - start[name] for name in start])
    assert float(moved) <= 0.1001 * float(norm(start.values()))
    loss = lambda theta: float(F.cross_entropy(torch.func.functional_call(model, theta, (x,)), y))
    assert loss(target) > loss(start) + 0.1

    poisoned = torch.arange(20)
    pixels, before, after = cancelling.cancel(model, target, x, y, poisoned, steps=50)
    assert after < 0.9 * before and 0 <= float(pixels.min()) and float(pixels.max()) <= 1

    def residual(images):  # of the whole set, by plain autograd
        model.load_state_dict(target)
        return float(norm(torch.autograd.grad(F.cross_entropy(model(images), y), list(model.parameters()))))

    assert residual(x) == pytest.approx(before, rel=1e-4)
    assert residual(attack.with_pixels(x, poisoned, pixels)) == pytest.approx(after, rel=1e-4)


def test_psnr_is_ten_times_the_logarithm_of_one_over_the_squared_error():
    a = torch.zeros(2, 1, 2, 2)
    b = torch.stack([torch.full((1, 2, 2), 0.1), torch.zeros(1, 2, 2)])
    assert checks.psnr(b, a).tolist() == [pytest.approx(20.0, abs=1e-5), float("inf")]


def test_the_nearest_distance_is_to_another_image_of_the_same_label():
    x = torch.tensor([0.0, 0.3, 0.31, 1.0]).view(4, 1, 1, 1)
    found = checks.nearest_distance(x, torch.tensor([0, 0, 1, 1]))
    assert found.tolist() == pytest.approx([0.3, 0.3, 0.69, 0.69])


def test_harm_is_the_metagradient_of_the_weights_averaged_over_seeds():
    training = small()
    single = [training.at(s).metagradient(training.z()).grads["data_weights"] for s in (4, 5)]
    both = checks.harm(training, training.images, [4, 5])
    torch.testing.assert_close(both, (single[0] + single[1]) / 2)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("side", [8, 28])
def test_networks_take_small_and_larger_images(name, side):
    assert NETWORKS[name](1, side, 7)(torch.rand(2, 1, side, side)).shape == (2, 7)


def test_the_schedule_rises_and_falls_to_nearly_nothing():
    rate = schedule(100, 1.0)
    assert 8 <= int(rate.argmax()) <= 10 and float(rate.max()) == pytest.approx(1.0, abs=0.01)
    assert 0 < float(rate[-1]) < 0.02


# --- bad input -------------------------------------------------------------------------------------------------------


def test_data_on_which_nothing_can_be_learned_is_refused():
    x, y = digits(40)
    for images, labels, words in (
        (x[:0], y[:0], "n >= 1"),
        (x, torch.zeros(40, dtype=torch.int64), "at least two classes; all 40 are of class 0"),
        (x, y.clone().index_fill(0, torch.tensor([2]), 10), r"labels in 0..9; got 0..10"),
        (x, y.clone().index_fill(0, torch.tensor([2]), -1), r"labels in 0..9; got -1..9"),
        (x * 2, y, r"in \[0, 1\]"),
        (x[:-1], y, "labels \\[n\\]"),
    ):
        with pytest.raises(BadData, match=words):
            check_data(images, labels, 10)
    with pytest.raises(BadData, match="at least two classes"):
        Training(x, torch.zeros(40, dtype=torch.int64), 10, lambda model: torch.zeros(()))


def test_too_few_images_and_unknown_networks_are_refused():
    with pytest.raises(BadArgument, match="expected at least 3000 images"):
        recipe.run(data.digits()[:50], data.digits(train=False))
    with pytest.raises(BadArgument, match="expected a network of"):
        small(network="transformer")
    with pytest.raises(BadArgument, match="batch of 1 to 10 images"):
        small(n=10)


@pytest.mark.parametrize("share, count", [(0.0, 0), (0.001, 0), (1.5, 150), (-0.1, -10)])
def test_a_share_of_no_image_or_of_more_than_there_are_is_refused(share, count):
    with pytest.raises(BadArgument, match=f"is {count}$"):
        attack.chosen(100, share, 0)


def test_an_empty_range_of_pixels_is_refused():
    with pytest.raises(BadArgument, match=r"low <= high; got 0\.8 and 0\.2"):
        attack.descend(small(), torch.tensor([0]), steps=1, step_size=0.1, seeds=1, low=0.8, high=0.2)


def test_a_training_that_diverges_is_reported_and_the_descent_goes_on():
    training = small()
    plain = training.function.loss

    def loss(model: nn.Module, batch, z):
        return plain(model, batch, z) * torch.where(z["images"].abs().amax() > 30, torch.inf, 1.0)

    training.function = training.function.replaced(loss=loss)
    poisoned = torch.tensor([0, 1, 2])
    result = attack.descend(training, poisoned, steps=3, step_size=100.0, seeds=1, low=-1000.0, high=1000.0)
    assert len(result.history) == 3 and result.history[1].diverged >= 1
    assert "at training step" in result.notes[0] and "outer learning rate of 50" in result.notes[0]

    training.function = training.function.replaced(loss=lambda model, batch, z: plain(model, batch, z) * torch.inf)
    with pytest.raises(NonFiniteState, match="step 0"):
        attack.descend(training, poisoned, steps=1, step_size=0.1, seeds=1)


def test_fewer_images_keep_the_proportions():
    settings = replace(recipe.Settings(), training=1000, held_out=600, defender=400)
    fitted = settings.fitting(1000)
    assert (fitted.training, fitted.held_out, fitted.defender) == (500, 300, 200)
    assert settings.fitting(5000) is settings
