"""The attribution recipe with dropout, and from early and late steps alone."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import mgd
from mgd.cli.main import app
from mgd.errors import BadArgument
from mgd.recipes import data
from mgd.recipes.attribute import Evaluation, Training, linear_datamodeling_score, predictions, run
from mgd.recipes.attribute import report as recipe_report
from mgd.recipes.attribute.dropout import CHANCE, OTHER, SAME, SHARE
from mgd.recipes.attribute.images import images_task
from mgd.recipes.attribute.judging import OURS
from mgd.recipes.attribute.task import example_losses
from mgd.recipes.attribute.texts import gpt_task
from mgd.recipes.attribute.windows import windows
from mgd.ui.console import Reporter, show

SMALL = Training(examples=60, batch=20, epochs=2, rate=1e-2, eps_root=1e-5)
STEPS, SUBSETS = 6, 4
EVALUATION = Evaluation(
    fractions=(0.1,), subsets=SUBSETS, dropout_subsets=SUBSETS, windows=(0.34, 0.5), baselines=("gradient products",),
    removed=0, singles=0, resamples=20,
)  # fmt: skip


def task(dropout=0.0, **options):
    return images_task(data.digits(), data.digits(train=False), SMALL, 3, seed=0, dense=True, dropout=dropout)


@pytest.fixture(scope="module")
def masked():
    return task(0.3)


@pytest.fixture(scope="module")
def found(masked):
    return run(task(), None, EVALUATION, dropout=masked)


# --- early and late --------------------------------------------------------------------------------------------------


def test_a_window_is_the_part_of_a_score_that_its_steps_add():
    """Against one attribution with weights of their own for the first and the last steps."""
    whole, last = task(), 2
    f, z, n = whole.function, whole.z, len(whole)

    def index(batch):
        late = any(torch.equal(batch[2], f.batches[t][2]) for t in range(STEPS - last, STEPS))
        return batch[2] + n * late

    f = f.replaced(trace=False)
    split = f.replaced(per_example={"data_weights": index})
    exact = mgd.attribute(split, {**z, "data_weights": torch.ones(2 * n)}, 3, whole.objectives).scores
    scores = mgd.attribute(f, z, 3, whole.objectives).scores
    late, early = windows(whole, scores, (0.34,), None, Reporter())
    assert (late.name, late.first, late.last) == ("the last 2 steps", 4, 6) and late.seconds > 0
    assert (early.name, early.first, early.last) == ("the first 4 steps", 0, 4) and early.seconds is None
    size = np.abs(scores).max()
    np.testing.assert_allclose(late.scores, exact[:, n:], rtol=1e-4, atol=1e-6 * size)
    np.testing.assert_allclose(early.scores, exact[:, :n], rtol=1e-4, atol=1e-6 * size)
    assert late.size == pytest.approx(np.linalg.norm(exact[:, n:]) / np.linalg.norm(scores), rel=1e-4)


def test_windows_are_judged_by_the_retrainings_of_the_whole(found):
    judged = found.smooth
    assert [w.name for w in judged.windows] == [
        "the last 2 steps", "the last 3 steps", "the first 3 steps", "the first 4 steps"
    ]  # fmt: skip
    for window in judged.windows:
        guess = predictions(window.scores, judged.dropped[0.1])
        expected = linear_datamodeling_score(guess, judged.true[0.1], resamples=20)
        assert window.lds[0.1] == expected
    ends = judged.windows[0].scores + judged.windows[3].scores
    np.testing.assert_allclose(ends, judged.attribution.scores, rtol=1e-5, atol=1e-8)


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_masks_repeat_from_one_seed_and_differ_between_seeds(dropout):
    own = task(dropout)
    nothing = torch.tensor([], dtype=torch.int64)
    base = own.query_losses(own.function.train(own.z).model_state)
    assert torch.equal(own.without(nothing), base)  # trained in train mode, evaluated without dropout
    assert torch.equal(own.without(nothing, 5), base) == (dropout == 0)


def test_models_of_the_settings_drop_out_in_training_alone():
    gpt = gpt_task(Training(examples=8, batch=4, epochs=1, rate=1e-3, eps_root=1e-4), 2, 0, "pydoc", dropout=0.5)
    convolutions = images_task(data.digits(), data.digits(train=False), SMALL, 3, seed=0, dropout=0.5)
    for own in (gpt, convolutions):
        once, again = (example_losses(own.model.train(), own.x, own.y) for _ in range(2))
        assert own.dropout == 0.5 and "dropout 0.5" in own.name and not torch.equal(once, again)
        assert sum(isinstance(module, torch.nn.Dropout) for module in own.model.modules()) >= 3
        assert torch.equal(*(example_losses(own.model.eval(), own.x, own.y) for _ in range(2)))


def test_scores_are_judged_with_the_same_masks_and_with_others(found, masked):
    dropout = found.dropout
    base, changes, chance = dropout.judged.model_state, [], []
    for number, index in enumerate(dropout.judged.dropped[SHARE], 1):
        f = masked.function.replaced(seed=number)
        full = masked.query_losses(f.train(masked.z).model_state)
        less = masked.query_losses(
            f.train({**masked.z, "data_weights": torch.ones(60).index_fill(0, index, 0.0)}).model_state
        )
        changes.append(less - full)
        chance.append(less - masked.query_losses(base))
    true = {SAME: dropout.judged.true[SHARE], OTHER: torch.stack(changes), CHANCE: torch.stack(chance)}
    for masks, expected in true.items():
        for method in (OURS, "gradient products"):
            guess = dropout.judged.predicted[method][SHARE]
            assert dropout.scores[masks][method] == linear_datamodeling_score(guess, expected, resamples=20)
    assert dropout.rate == 0.3 and dropout.effect > 0 and dropout.chance > 0
    predicted = dropout.judged.predicted[OURS][SHARE]  # of this training, with its own masks
    assert float((predicted - true[SAME]).norm()) < float((predicted - true[OTHER]).norm())


# --- the page and the command ----------------------------------------------------------------------------------------


def test_the_page_and_the_result_have_both(found):
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [w["steps"] for w in record["smooth"]["windows"]] == [[4, 6], [3, 6], [0, 3], [0, 4]]
    assert set(record["dropout"]["lds_by_masks"]) == {SAME, OTHER, CHANCE}
    assert record["dropout"]["judged"]["lds"][OURS].keys() == {str(SHARE)} and record["dropout"]["rate"] == 0.3
    out = io.StringIO()
    show(recipe_report.page(found), Console(file=out, width=120))
    assert "the last 2 steps" in out.getvalue() and OTHER in out.getvalue()
    texts = {section.title: section.text for section in recipe_report.sections(found)}
    assert "dropout 0.3" in texts[recipe_report.MASKS] and "since=" in texts[recipe_report.EARLY_LATE]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--dropout", "1"], "from 0 to below 1"),
        (["--dropout", "0.1", "--setting", "lora"], "images, mlp, text; got lora"),
        (["--dropout", "0.1", "--queries", "100"], "without --dropout"),
        (["--windows", "half"], "expected shares of the steps"),
    ],
)
def test_bad_options_are_told(words, says):
    result = CliRunner().invoke(app, ["recipe", "attribute", *words])
    assert result.exit_code != 0 and says in " ".join(str(result.exception or result.output).split())


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0])
def test_windows_are_some_of_the_steps(share):
    with pytest.raises(BadArgument, match="some of the 6 last steps"):
        run(task(), None, Evaluation(windows=(share,)))
    with pytest.raises(BadArgument, match="where nothing is retrained"):
        run(task(), None, Evaluation(fractions=(), windows=(0.5,)))
