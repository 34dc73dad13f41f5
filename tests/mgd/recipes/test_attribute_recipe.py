"""The attribution recipe: its score, its baselines, and a quick run on real images (scikit-learn's digits)."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import spearmanr

from mgd.errors import BadArgument, BadData, MissingPackage
from mgd.recipes import data
from mgd.recipes.attribute import Evaluation, Training, linear_datamodeling_score, predictions, run, subsets
from mgd.recipes.attribute import baselines as others
from mgd.recipes.attribute import report as recipe_report
from mgd.recipes.attribute.command import QUICK, QUICK_LORA, QUICK_TEXT
from mgd.recipes.attribute.images import images_task
from mgd.recipes.attribute.judging import OURS
from mgd.recipes.attribute.many import by_combinations
from mgd.recipes.attribute.removal import most_helpful
from mgd.recipes.attribute.task import example_losses
from mgd.recipes.attribute.texts import gpt_task, lora_task
from mgd.recipes.data import text
from mgd.recipes.models import encoder
from mgd.ui.console import show
from mgd.ui.page import write

SMALL = Training(examples=60, batch=20, epochs=2, rate=2e-3, eps_root=1e-3)
INSTALLED = {"TRAK": "trak", "EK-FAC": "kronfluence"}


@pytest.fixture(scope="module")
def whole():
    task = images_task(data.digits(), data.digits(train=False), QUICK, 6, seed=0)
    return run(task, None, replace(Evaluation().quick(), windows=()))


@pytest.fixture(scope="module")
def found(small):
    """Too small for an effect: what is found is there, and is shown."""
    return run(small, None, replace(Evaluation().quick(), subsets=3, windows=(), baselines=("gradient products",)))


@pytest.fixture(scope="module")
def small():
    return images_task(data.digits(), data.digits(train=False), SMALL, 3, seed=0)


# --- the linear datamodeling score -----------------------------------------------------------------------------------


def test_the_score_is_the_mean_rank_correlation_of_the_queries():
    generator = np.random.default_rng(0)
    true = generator.normal(size=(30, 5))
    guess = true + generator.normal(size=(30, 5))
    found = linear_datamodeling_score(guess, torch.from_numpy(true), resamples=200)
    expected = [spearmanr(guess[:, q], true[:, q]).statistic for q in range(5)]
    assert found.per_query == pytest.approx(expected) and found.mean == pytest.approx(np.mean(expected))
    assert found.low < found.mean < found.high and found.high - found.low < 0.5
    again = linear_datamodeling_score(guess, true, resamples=200)
    assert again == found
    assert linear_datamodeling_score(np.exp(guess), true, resamples=200).per_query == pytest.approx(expected)


def test_the_score_of_perfect_opposite_and_empty_predictions():
    true = np.random.default_rng(1).normal(size=(12, 3))
    assert linear_datamodeling_score(true, true, resamples=50).mean == pytest.approx(1)
    assert linear_datamodeling_score(-true, true, resamples=50).mean == pytest.approx(-1)
    assert linear_datamodeling_score(np.zeros_like(true), true, resamples=50).mean == 0
    assert linear_datamodeling_score(true[:, :1], true[:, :1], resamples=50).low == pytest.approx(1)


def test_more_subsets_make_the_interval_narrower():
    generator = np.random.default_rng(2)
    true = generator.normal(size=(200, 4))
    guess = true + generator.normal(size=true.shape)
    few, many = (linear_datamodeling_score(guess[:m], true[:m], resamples=200) for m in (10, 200))
    assert many.high - many.low < 0.6 * (few.high - few.low)


@pytest.mark.parametrize(
    ("predicted", "true", "words"),
    [
        (np.ones((5, 2)), np.ones((5, 3)), r"\[5, 2\] and \[5, 3\]"),
        (np.ones(5), np.ones(5), "one shape"),
        (np.eye(2), np.eye(2), "m >= 3"),
        (np.eye(4), np.eye(4) * np.nan, "did a training diverge"),
        (np.eye(4), np.eye(4) * [1, 0, 1, 1], "query 1 is the same"),
    ],
)
def test_scores_of_nonsense_are_refused(predicted, true, words):
    with pytest.raises(BadArgument, match=words):
        linear_datamodeling_score(predicted, true)


def test_subsets_are_random_seeded_and_of_the_size_asked_for():
    found = subsets(100, 0.05, 7, seed=3)
    assert [len(s.unique()) for s in found] == [5] * 7 and len({tuple(s.tolist()) for s in found}) == 7
    assert all(map(torch.equal, found, subsets(100, 0.05, 7, seed=3)))
    for fraction in (0.001, 1.0, -0.1):
        with pytest.raises(BadArgument, match="at least 1 of 100"):
            subsets(100, fraction, 1, seed=0)


def test_predictions_are_minus_the_sums_of_the_dropped_scores():
    scores = torch.arange(8.0).view(2, 4)
    found = predictions(scores.numpy(), [torch.tensor([0, 3]), torch.tensor([1])])
    assert found.tolist() == [[-3.0, -11.0], [-1.0, -5.0]]


def test_what_helps_most_has_the_lowest_scores():
    scores = torch.tensor([[3.0, -2.0, 0.0, -5.0], [-1.0, 4.0, -3.0, 2.0]])
    assert [index.tolist() for index in most_helpful(scores.numpy(), 0.5)] == [[1, 3], [0, 2]]
    with pytest.raises(BadArgument, match="removes at least 1 of 4"):
        most_helpful(scores, 0.1)


def test_bm25_is_that_of_its_formula():
    task = gpt_task(QUICK_TEXT, 2, seed=0, domain="pydoc")
    task.texts, task.query_texts = ["the cat sat", "the dog", "a cat and a cat and a cat"], ["Cat, cat?", "zebra"]
    scores = others.bm25(task, {})
    average, rarity = (3 + 2 + 8) / 3, math.log(1 + 1.5 / 2.5)
    for i, (times, length) in enumerate([(1, 3), (0, 2), (3, 8)]):
        expected = 2 * rarity * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * length / average))
        assert float(scores[0, i]) == pytest.approx(-expected, rel=1e-6)
    assert not scores[1].any()


def test_embeddings_find_the_text_itself_and_what_means_the_same():
    task = gpt_task(QUICK_TEXT, 2, seed=0, domain="pydoc")
    if encoder.installed() is None:
        with pytest.raises(BadData, match="make data"):
            others.embeddings(task, {})
        pytest.skip("the pretrained encoder comes with make data")
    task.texts = ["The cat sleeps on the sofa.", "Interest rates rose again.", "A kitten naps on the couch."]
    task.query_texts = ["The cat sleeps on the sofa.", "The central bank raised its rate."]
    before = torch.get_rng_state()
    scores = others.embeddings(task, {})
    assert float(scores[0, 0]) == pytest.approx(-1, abs=1e-5)
    assert scores[0].argsort().tolist() == [0, 2, 1] and int(scores[1].argmin()) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_the_score_is_that_of_dattri():
    """Of its `dattri.metric.lds` (0.3): scores `[n, k]` of a higher target, and for every subset what was kept. Where
    the package is missing, its definition is written out: Spearman over subsets of the sums of kept scores."""
    generator = np.random.default_rng(3)
    scores, n = generator.normal(size=(4, 30)), 30
    dropped = subsets(n, 0.2, 15, seed=0)
    kept = torch.stack([torch.tensor([i for i in range(n) if i not in index.tolist()]) for index in dropped])
    guess = predictions(scores, dropped)
    true = guess + torch.from_numpy(generator.normal(size=guess.shape))
    try:
        from dattri.metric import lds
    except ImportError:
        sums = np.stack([scores[:, index].sum(1) for index in kept.numpy()])
        expected = [spearmanr(sums[:, q], true[:, q]).statistic for q in range(4)]
    else:
        expected = lds(torch.from_numpy(scores.T), (true, kept))[0].tolist()
    assert linear_datamodeling_score(guess, true, resamples=20).per_query == pytest.approx(expected, abs=1e-12)


# --- the parts -------------------------------------------------------------------------------------------------------


def test_dropping_is_weight_zero_with_the_denominator_unchanged(small):
    f, z = small.function, small.z
    x, y, index = f.batches[0]
    weights = torch.ones(20).index_fill(0, torch.tensor([4, 5]), 0.0)
    kept = torch.tensor([i for i in range(20) if i not in (4, 5)])
    expected = example_losses(f.model, x[kept], y[kept]).sum() / 20
    torch.testing.assert_close(f.loss(f.model, (x, y, index), {"data_weights": weights}), expected)
    nothing = small.without(torch.tensor([], dtype=torch.int64))
    assert torch.equal(nothing, small.query_losses(f.train(z).model_state)) and nothing.dtype == torch.float64


def test_gradient_products_are_those_of_single_backward_passes(small):
    state = small.function.train(small.z).model_state
    scores = others.gradient_products(small, state)
    model = others._trained(small, state)

    def gradient(x, y):
        grads = torch.autograd.grad(example_losses(model, x[None], y[None])[0], list(model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    expected = -gradient(small.query_x[1], small.query_y[1]) @ gradient(small.x[55], small.y[55])
    torch.testing.assert_close(scores[1, 55], expected, rtol=1e-3, atol=1e-6)
    assert scores.shape == (3, 60)


@pytest.mark.parametrize("name", INSTALLED)
def test_a_baseline_of_a_package_scores_in_the_metagradients_sign(name):
    """The queries are training examples: more weight on one of them lowers its own loss, more than others lower it."""
    pytest.importorskip(INSTALLED[name], reason="pip install 'mgd-kernels[attribution]'")
    n, k = 400, 8
    task = images_task(data.digits(), data.digits(train=False), replace(QUICK, examples=n), k, seed=0)
    task.query_x, task.query_y = task.x[:k], task.y[:k]
    before = {name: v.clone() for name, v in task.model.state_dict().items()}, torch.get_rng_state()
    scores = others.BASELINES[name](task, task.function.train(task.z).model_state)
    assert scores.shape == (k, n) and bool(scores.isfinite().all())
    own = scores[range(k), range(k)]
    assert bool((own < 0).all())
    better = (scores < own[:, None]).sum(1)  # training examples that help a query more than itself
    assert float(better.double().mean()) < n / 40
    assert all(torch.equal(v, before[0][name]) for name, v in task.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_missing_package_is_named_and_the_rest_is_compared(small, monkeypatch):
    def missing(task, state):
        raise MissingPackage("TRAK scores", "traker", "attribution")

    monkeypatch.setitem(others.BASELINES, "TRAK", missing)
    found = run(
        small, None, Evaluation(fractions=(0.1,), subsets=3, baselines=("TRAK",), windows=(), singles=0, resamples=20)
    )
    assert "mgd-kernels[attribution]" in found.smooth.missing["TRAK"] and list(found.smooth.scores) == [OURS]
    assert ["TRAK", "not installed"] in recipe_report.lds(found)


def test_bad_settings_are_told(small):
    with pytest.raises(BadArgument, match="baselines among"):
        run(small, None, Evaluation(baselines=("LIME",)))
    with pytest.raises(BadArgument, match="at least 60 training"):
        images_task(data.digits()[torch.arange(20)], data.digits(train=False), SMALL, 3, seed=0)


# --- the whole -------------------------------------------------------------------------------------------------------


def test_the_metagradient_predicts_what_leaving_images_out_does(whole):
    scores = {name: [score.mean for score in by.values()] for name, by in whole.smooth.scores.items()}
    assert scores[OURS][0] > 0.8  # 0.93 with 5% dropped; 8 subsets make it uncertain
    assert all(scores[OURS][0] > scores[name][0] for name in scores if name != OURS)
    assert whole.smooth.smoothness > 0.9
    rises = whole.smooth.removal
    assert rises[OURS][0] == max(mean for mean, *_ in rises.values()) and rises[OURS][1] > 0
    assert rises[OURS][0] > 3 * float(whole.smooth.true[0.05].mean())
    assert not {"BM25", "embeddings"} & rises.keys()  # pictures have no words
    assert whole.smooth.singles_error < 0.1  # of two weights, moved by a tenth each: what is left is their curvature
    # Not only the order: the changes themselves.
    predicted, true = whole.smooth.predicted[OURS][0.05], whole.smooth.true[0.05]
    assert float((predicted - true).norm() / true.norm()) < 0.5


def test_the_result_is_complete_json(found):
    whole = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    smooth = whole["smooth"]
    assert smooth["rise_without_the_most_helpful"].keys() == smooth["lds"].keys()
    assert set(smooth["lds"][OURS]) == {"0.05", "0.2"} and len(smooth["lds"][OURS]["0.05"]["per_query"]) == 3
    assert smooth["trainings_per_query"] > 0 and smooth["unvisited"] == [] and smooth["plain_training_seconds"] > 0
    assert {"training", "hvp", "scores", "rehearsal"} <= set(smooth["attribution"]["seconds"])
    assert whole["rough"] is None and math.isfinite(smooth["test_loss"])


def test_the_page_and_its_pictures(found, tmp_path):
    matplotlib = pytest.importorskip("matplotlib.image")
    page = recipe_report.page(found)
    paths = write(page, tmp_path)
    assert {p.name for p in paths} == {"index.html", "examples.png", "scores.png", "predictions.png"}
    for path in paths:
        if path.suffix == ".png":
            assert float(matplotlib.imread(path)[..., :3].std()) > 0.05
    html = (tmp_path / "index.html").read_text()
    assert "Which training images decided?" in html and "metagradient" in html and "trainings per query" in html
    out = io.StringIO()
    show(page, Console(file=out, width=120))
    assert "Linear datamodeling score" in out.getvalue() and page.verdict in out.getvalue()


def test_a_rough_training_is_reported_beside(small):
    rough = images_task(data.digits(), data.digits(train=False), SMALL, 3, seed=0, rough=True)
    evaluation = Evaluation(
        fractions=(0.1,), subsets=3, rough_subsets=3, baselines=(), windows=(), singles=0, resamples=20
    )
    found = run(small, rough, evaluation)
    assert found.rough is not None and len(recipe_report.roughness(found)) == 3
    assert any(row[0] == "metagradient, rough training" for row in recipe_report.lds(found))


def test_combined_sweeps_are_reported_beside_exact_ones():
    task = images_task(data.digits(), data.digits(train=False), SMALL, 6, seed=0, dense=True)
    evaluation = Evaluation(fractions=(0.1,), subsets=4, resamples=20)
    many = by_combinations(task, evaluation, sweeps=(2, 5, 6))  # six are as many as there are queries
    assert [(way.name, way.sweeps, way.queries) for way in many.ways] == [
        ("2 combined", 2, 6), ("5 combined", 5, 6), ("exact, of some queries", 2, 2), ("exact", 6, 6)
    ]  # fmt: skip
    two, five = many.ways[:2]
    assert two.error > five.error and two.measured > five.measured and len(five.lds[0.1].per_query) == 6
    assert five.measured == pytest.approx(five.error, rel=1) and many.ways[-1].error is None
    json.dumps(many.to_dict(), allow_nan=False)
    page = recipe_report.page_of_many(many)
    assert len(page.tables[0][1]) == 5 and "2 combined" in page.verdict


# --- texts -----------------------------------------------------------------------------------------------------------


def test_a_gpt_is_attributed_to_stretches_of_text():
    task = gpt_task(replace(QUICK_TEXT, examples=40, batch=10, epochs=2), 4, seed=0, domain="pydoc")
    found = run(
        task,
        None,
        Evaluation(
            fractions=(0.1,),
            subsets=5,
            baselines=("gradient products", "BM25"),
            windows=(),
            removed=0,
            singles=0,
            resamples=20,
        ),
    )
    assert found.smooth.scores[OURS][0.1].mean > 0.8
    sections = recipe_report.sections(found)
    assert any(section.title.startswith("Test text 1") and len(section.table) > 2 for section in sections)


def test_where_shakespeare_is_missing_the_text_is_one_that_is_always_there(monkeypatch):
    monkeypatch.setattr(text, "installed", lambda: dict.fromkeys(text.DOMAINS, "make data"))
    assert gpt_task(QUICK_TEXT, 4, seed=0).data == "pydoc"


@pytest.mark.skipif(encoder.installed() is None, reason="the pretrained encoder comes with make data")
def test_lora_is_attributed():
    task = lora_task(QUICK_LORA, 2, seed=0)
    evaluation = Evaluation(fractions=(0.1,), subsets=4, baselines=("gradient products",), windows=(), resamples=20)
    found = run(task, None, evaluation)
    assert found.smooth.scores[OURS][0.1].mean > 0.8
    assert all("down" in n or "up" in n or "head" in n for n in task.trained_names)
