"""Searching for schedules: the shapes, the searches on objectives that are known, and the recipe on digits."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from scipy import stats
from torch import nn

from mgd import TrainingFunction
from mgd.errors import BadArgument, BadData, StaleRun
from mgd.recipes import data, intervals
from mgd.recipes.lr_schedule import recipe, report
from mgd.recipes.lr_schedule.descent import (
    PAIRS,
    SLOWING,
    KnotPath,
    SlowingAdam,
    descend_on_numbered,
    descend_on_schedule,
)
from mgd.recipes.lr_schedule.judging import judge
from mgd.recipes.lr_schedule.search import Objective
from mgd.recipes.lr_schedule.trainings import Trainings
from mgd.recipes.small_images import Task
from mgd.ui.console import Reporter, show
from mgd.ui.page import write
from mgd.util.run_directory import RunDirectory
from mgd_kernels import SGD

T = 40

# --- one objective, and what diverges ------------------------------------------------------------------------------


def steep(steps=T):
    """A linear regression whose training by SGD overflows above a learning rate of about 0.02."""
    torch.manual_seed(0)
    x = 10 * torch.randn(64, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])

    def loss(model, batch, z):
        return F.mse_loss(model(batch[0]), batch[1])

    return TrainingFunction(
        nn.Linear(3, 1), loss, [(x, y)] * steps, optimizer=SGD(lr=1e-3), objective=lambda model: F.mse_loss(model(x), y)
    )


def test_the_objective_is_that_of_the_training_and_infinite_where_it_diverges(tmp_path):
    f = steep()
    opened = lambda: RunDirectory(tmp_path, "search", {})
    good, bad = torch.full((T,), 1e-4), torch.full((T,), 1.0)
    with opened() as run:
        objective = Objective(f, run)
        assert objective(good) == float(f.value({"lr": good})) and objective(bad) == math.inf
        assert len(objective.seconds) == 2
    with opened() as run:
        again = Objective(f, run)
        assert (again(good), again(bad)) == (objective(good), math.inf) and again.seconds == []
        again(torch.full((T,), 2e-4))
        assert len(Objective(f, run)._known) == 3


def test_the_objective_of_several_trainings_is_their_mean():
    f = steep(5)
    numbered = lambda number: (f.replaced(batches=[(x, (1 + number) * y) for x, y in f.batches]), {})
    rates = torch.full((5,), 1e-4)
    expected = [float(numbered(number)[0].value({"lr": rates})) for number in range(3)]
    objective = Objective(numbered, numbers=(1, 2))
    assert expected[1] != expected[2] and objective(rates) == (expected[1] + expected[2]) / 2
    assert objective.of((0, 1))(rates) == (expected[0] + expected[1]) / 2 and len(objective.seconds) == 3


@pytest.mark.filterwarnings("ignore::mgd.errors.UnstableTraining")
def test_the_descent_takes_a_smaller_step_where_a_training_diverges_and_says_so():
    found = descend_on_schedule(steep(), torch.full((3,), math.log(1e-5)), 6, outer=8.0)
    assert found.history[1].diverged >= 1 and len(found.notes) == sum(step.diverged for step in found.history)
    assert "left the finite numbers" in found.notes[0] and "outer learning rate of 4" in found.notes[0]
    assert min(found.values) < 0.5 * found.values[0] and all(map(math.isfinite, found.values))


def test_every_step_may_be_a_knot():
    found = descend_on_schedule(steep(12), torch.full((12,), math.log(1e-4)), 5)
    assert found.best["log_lr"].shape == (12,) and min(found.values) < 0.9 * found.values[0]


def test_several_trainings_take_turns_and_the_best_is_that_of_a_round():
    f = steep()
    x, y = f.batches[0]
    other = f.replaced(batches=[(x, -y)] * T, objective=lambda model: 1e4 + F.mse_loss(model(x), -y))
    seen = []
    found = descend_on_schedule(
        [f, other], torch.full((3,), math.log(1e-5)), 9, observe=lambda step, result, variables: seen.append(step.value)
    )
    assert found.values == seen and all((value > 1e4) == (i % 2 == 1) for i, value in enumerate(seen))
    means = [math.inf, *((a + b) / 2 for a, b in itertools.pairwise(seen))]
    assert [step.score for step in found.history] == pytest.approx(means)
    assert found.best_step == int(np.argmin(means)) and min(means) < means[1]
    with pytest.raises(BadArgument, match="of one length"):
        descend_on_schedule([f, f.replaced(batches=f.batches[:3])], torch.zeros(2), 1)
    with pytest.raises(BadArgument, match="of one length"):
        descend_on_schedule([], torch.zeros(2), 1)
    with pytest.raises(BadArgument, match="one training with directory"):
        descend_on_schedule([f, other], torch.zeros(2), 1, directory="somewhere")


def test_trainings_by_number_are_followed_once_each_and_their_noise_is_averaged():
    f = steep(12)
    numbers, path = [], KnotPath()

    def trainings(number):
        numbers.append(number)
        return f.replaced(batches=[(x, y + 0.1 * number) for x, y in f.batches]), {}

    start = torch.full((12,), math.log(1e-4))
    found = descend_on_numbered(trainings, start, 9, observe=path.observe)
    assert numbers == list(range(9)) and f.value({"lr": path.answer(8).exp()}) < 0.9 * found.values[0]
    assert torch.equal(path.answer(0), start) and torch.equal(path.answer(2), path.knots[2])
    torch.testing.assert_close(path.answer(8), (path.knots[7] + path.knots[8]) / 2)


def test_a_descent_on_trainings_by_number_knows_all_that_are_done(tmp_path):
    f = steep(8)
    start, scale = torch.full((8,), math.log(1e-4)), {}

    def trainings(number):
        return f.replaced(batches=[(x, y + scale.get(number, 0.1) * number) for x, y in f.batches]), {}

    run = lambda steps, **options: descend_on_numbered(trainings, start, steps, **options)
    whole = run(6)
    run(4, directory=tmp_path)
    scale[2] = 0.2
    with pytest.raises(StaleRun, match="the batches of training 2"):
        run(6, directory=tmp_path)
    scale.clear()
    scale[5] = 0.2  # which is still to come
    assert run(5, directory=tmp_path).values == whole.values[:5]
    scale.clear()
    found = run(6, directory=tmp_path)
    assert found.values == whole.values and torch.equal(found.variables["log_lr"], whole.variables["log_lr"])


def test_the_outer_rate_falls_with_the_root_of_the_steps():
    x = torch.zeros(1, requires_grad=True)
    optimizer, moved = SlowingAdam([x], lr=0.5), []
    for _ in range(10):
        before, x.grad = float(x.detach()), torch.ones(1)
        optimizer.step()
        moved.append(before - float(x.detach()))
    assert moved == pytest.approx([0.5 / math.sqrt(1 + i / SLOWING) for i in range(10)], rel=1e-4)
    assert optimizer.param_groups[0]["lr"] == 0.5  # what a descent halves where a training diverges


# --- intervals -----------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_scipy():
    values = [1.0, 2.0, 4.0, 8.0]
    expected = stats.ttest_1samp(values, 0.0).confidence_interval()
    assert intervals.mean(values) == pytest.approx((3.75, expected.low, expected.high))
    x = np.random.default_rng(0).normal(size=40)
    y = x + np.random.default_rng(1).normal(size=40)
    x, y = x.round(1), y.round(1)  # some are equal
    rho, low, high = intervals.spearman(x.tolist(), y.tolist())
    assert 0.1 < low < rho < high < 0.95 and rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert intervals.spearman([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == (0.0, 0.0, 0.0)
    assert intervals.spearman([1.0, 2.0, 3.0, 4.0], [9.0, 7.0, 5.0, 1.0])[0] == pytest.approx(-1.0)
    with pytest.raises(BadArgument, match="at least 3 pairs"):
        intervals.spearman([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(BadArgument, match="at least 2 values"):
        intervals.mean([1.0])


# --- the recipe ----------------------------------------------------------------------------------------------------

QUICK = recipe.replace(recipe.Settings().quick(), wrong=0.8)
TINY = recipe.replace(
    QUICK, steps=6, knots=6, width=8, held_out=50, tested=50, meta_steps=4, budget=20, trainings=2, seeds=2
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def found(kept):
    """Too short for an effect."""
    return recipe.run(data.digits(), data.digits(train=False), TINY, seed=0, resume=kept)


@pytest.fixture(scope="module")
def whole():
    return recipe.run(data.digits(), data.digits(train=False), QUICK, seed=0)


def test_training_held_out_and_test_images_are_disjoint():
    task = Task.make(data.digits(), data.digits(train=False), 500, 300, 400, seed=0)
    keys = [{bytes(x.numpy().tobytes()) for x in part.images} for part in (task.train, task.held_out, task.test)]
    assert [len(part) for part in keys] == [500, 300, 400]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    seen = torch.cat([i for _, _, i in task.batches(50, 20, seed=1)])
    assert torch.bincount(seen).tolist() == [2] * 500
    with pytest.raises(BadData, match="at least 400 training"):
        Task.make(data.digits()[:300], data.digits(train=False), 100, 100, 100, 0)


def test_one_rate_for_each_step_beats_every_shape_where_steps_are_not_alike(whole):
    ours = whole.judged[recipe.DESCENT]
    for name in (recipe.START, recipe.GRID, recipe.TPE, recipe.CMA):
        assert whole.judged[name].mean > ours.mean + 0.05, name
    assert whole.contrast(recipe.DESCENT) < 0.5 < whole.contrast(recipe.TPE)  # it has found the steps with wrong labels
    assert whole.records[recipe.DESCENT].spent[-1] < 1.2 * QUICK.budget


def test_trainings_differ_in_all_but_which_steps_have_wrong_labels():
    task = Task.make(data.digits(), data.digits(train=False), 800, 50, 50, seed=0)
    trainings = Trainings(task, 8, 100, 8, 0.5, 0.05, seed=3)
    assert int(trainings.noisy.sum()) == 4
    (f, z), (g, w), (again, _) = trainings(1), trainings(2), trainings(1)
    assert not torch.equal(z["init"]["1.weight"], w["init"]["1.weight"])
    assert not torch.equal(f.batches[0][0], g.batches[0][0]) and torch.equal(f.batches[3][1], again.batches[3][1])
    right = {bytes(x.numpy().tobytes()): int(y) for x, y in zip(task.train.images, task.train.labels, strict=True)}
    shares = [
        np.mean([right[bytes(x.numpy().tobytes())] != int(y) for x, y in zip(*batch, strict=True)])
        for batch in f.batches
    ]
    for share, noisy in zip(shares, trainings.noisy.tolist(), strict=True):
        assert 0.3 < share < 0.6 if noisy else share == 0  # of half, a tenth are drawn right
    assert not bool(Trainings(task, 8, 100, 8, 0.0, 0.05, seed=3).noisy.any())
    value = float(f.value(z | {"lr": torch.full((8,), 0.05)}))
    fresh = copy.deepcopy(f.model)
    fresh.load_state_dict(z["init"])
    for x, y in f.batches:
        gradients = torch.autograd.grad(F.cross_entropy(fresh(x), y), list(fresh.parameters()))
        with torch.no_grad():
            for p, g in zip(fresh.parameters(), gradients, strict=True):
                p -= 0.05 * g
    assert value == pytest.approx(float(task.held_out.loss(fresh).detach()), rel=1e-5)


def test_work_is_counted_as_measured(found):
    descent = found.records[recipe.DESCENT]
    assert descent.spent == pytest.approx([found.trace + found.ratio * (i + 1) for i in range(TINY.meta_steps)])
    counts = {name: (len(record.values), record.spent[-1]) for name, record in found.records.items()}
    del counts[recipe.DESCENT]
    assert counts == {recipe.GRID: (20, 20), recipe.TPE: (10, 20), recipe.TOLD: (10, 20), recipe.CMA: (20, 20)}


def test_the_result_is_complete_and_json(found):
    result = json.loads(json.dumps(found.to_dict()))
    assert {"data", "searches", "descent", "schedules", "judged", "seconds", "settings", "seed"} <= set(result)
    assert len(result["searches"][recipe.TPE]["values"]) == 10
    for name in (recipe.DESCENT, recipe.GRID, recipe.CMA + recipe.HALF):
        assert len(result["schedules"][name]) == TINY.steps and len(result["judged"][name]["loss"]) == TINY.seeds
    assert len(result["steps_with_wrong_labels"]) == TINY.steps // 2
    assert result["judged"][recipe.DESCENT]["more_than_the_descent"] is None
    low, high = sorted(np.subtract(*(result["judged"][name]["loss"] for name in (recipe.GRID, recipe.DESCENT))))
    assert result["judged"][recipe.GRID]["more_than_the_descent"][0] == pytest.approx((low + high) / 2, abs=1e-4)


def test_a_finished_run_is_read_from_its_directory_and_another_one_is_refused(found, kept, monkeypatch):
    trained = []
    value = TrainingFunction.value
    monkeypatch.setattr(TrainingFunction, "value", lambda self, z: (trained.append(z), value(self, z))[1])
    again = recipe.run(data.digits(), data.digits(train=False), TINY, seed=0, resume=kept)
    assert len(trained) == PAIRS  # the timing alone
    for name, record in found.records.items():
        assert again.records[name].values == record.values
        assert torch.equal(again.schedules[name], found.schedules[name])
    assert again.judged[recipe.TPE].loss == found.judged[recipe.TPE].loss
    for changes, seed, says in (({}, 1, "seed"), ({"wrong": 0.5}, 0, "wrong"), ({"trainings": 1}, 0, "trainings")):
        with pytest.raises(StaleRun, match=says):
            other = recipe.replace(TINY, **changes)
            recipe.run(data.digits(), data.digits(train=False), other, seed=seed, resume=kept)


def test_more_meta_steps_go_on_where_a_run_ended(found, kept):
    longer = recipe.run(
        data.digits(), data.digits(train=False), recipe.replace(TINY, meta_steps=5), seed=0, resume=kept
    )
    assert longer.descent.values[:4] == found.descent.values and len(longer.descent.values) == 5
    assert longer.records[recipe.GRID].values == found.records[recipe.GRID].values


def test_a_schedule_with_which_a_training_diverges_is_infinitely_bad_and_has_no_interval():
    task = Task.make(data.digits(), data.digits(train=False), 400, 50, 50, seed=0)
    trainings = Trainings(task, 4, 20, 8, 0.0, 0.05, seed=0)
    rates = {"ours": torch.full((4,), 0.05), "bad": torch.full((4,), 1e30), "good": torch.full((4,), 0.1)}
    judged = judge(task, trainings, range(3), rates, "ours", Reporter())
    assert judged["bad"].loss == [math.inf] * 3 and judged["bad"].more is None and judged["ours"].more is None
    expected = intervals.mean(np.subtract(judged["good"].loss, judged["ours"].loss))
    assert judged["good"].more == pytest.approx(expected)


def test_the_verdict_follows_from_the_intervals(found):
    words = ("better than", "worse than", "not clearly better or worse than")
    for more, expected in zip(((0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.1, -0.1, 0.3)), words, strict=True):
        judged = {name: recipe.replace(entry, more=more) for name, entry in found.judged.items()}
        said = report.verdict(recipe.replace(found, judged=judged))
        assert f"is {expected} grid, TPE, TPE, told which steps and CMA-ES," in said


def test_terminal_and_page(found, tmp_path):
    from matplotlib.image import imread

    console = Console(width=80, record=True, file=io.StringIO())
    page = report.page(found)
    show(page, console)
    text = console.export_text()
    assert f"{found.judged[recipe.TPE].mean:.4f}" in text and "…" not in text
    paths = write(page, tmp_path)
    assert {path.name for path in paths} == {"index.html", "descent.png", "schedules.png", "test.png"}
    for path in paths[1:]:
        assert imread(path)[..., :3].std() > 0.05


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"steps": 0}, "steps >= 1"),
        ({"knots": 99}, "at most one knot per step, 24"),
        ({"start": 0.0}, "a start between"),
        ({"outer": 0.0}, "outer > 0"),
        ({"budget": 30}, "multiple of 20"),
        ({"trainings": 80}, "no less than the 80 trainings"),
        ({"wrong": 1.5}, "between 0 and 1"),
    ],
)
def test_settings_that_mean_nothing(bad, says):
    with pytest.raises(BadArgument, match=says):
        recipe.run(data.digits(), data.digits(train=False), recipe.replace(QUICK, **bad))
