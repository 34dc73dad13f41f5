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

from mgd import TrainingFunction, schedules
from mgd.errors import BadArgument, BadData, StaleRun
from mgd.recipes import data, intervals
from mgd.recipes.lr_schedule import recipe, report, search
from mgd.recipes.lr_schedule.descent import (
    PAIRS,
    SLOWING,
    KnotPath,
    SlowingAdam,
    descend_on_numbered,
    descend_on_schedule,
)
from mgd.recipes.lr_schedule.judging import judge
from mgd.recipes.lr_schedule.search import Objective, Record, Shape
from mgd.recipes.lr_schedule.trainings import Trainings
from mgd.recipes.small_images import Task
from mgd.ui.console import Reporter, show
from mgd.ui.page import write
from mgd.util.run_directory import RunDirectory
from mgd_kernels import SGD

T = 40

# --- schedules -----------------------------------------------------------------------------------------------------


def test_knots_are_met_and_logarithms_are_straight_between_them():
    knots = torch.tensor([-3.0, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    rates = schedules.from_knots(knots, 5)
    torch.testing.assert_close(rates.log(), torch.tensor([-3.0, -2.0, -1.0, -1.5, -2.0], dtype=torch.float64))
    rates.log().sum().backward()
    torch.testing.assert_close(knots.grad, torch.tensor([1.5, 2.0, 1.5], dtype=torch.float64))
    torch.testing.assert_close(schedules.from_knots(knots, 3), knots.exp())
    assert schedules.from_knots(torch.tensor([-1.0]), 4).tolist() == pytest.approx([math.exp(-1)] * 4)
    for bad in (torch.zeros(6), torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(BadArgument, match="between 1 and 5 knots"):
            schedules.from_knots(bad, 5)


def test_shapes_begin_peak_and_end_where_they_say():
    for kind in ("one-cycle", "linear"):
        rates = Shape(kind, 0.1, 0.2, 0.05).rates(101)
        assert rates[[0, 25, 100]].tolist() == pytest.approx([0.02, 0.1, 0.005])
        assert bool((rates[:25].diff() > 0).all()) and bool((rates[25:].diff() < 0).all())
    linear = Shape("linear", 0.1, 0.2, 0.05).rates(101)
    assert linear[25:].diff().tolist() == pytest.approx([-0.095 / 75] * 75, rel=1e-3)
    cosine = Shape("cosine", 0.1, 0.2, 0.1).rates(101)
    assert cosine[[0, 50, 100]].tolist() == pytest.approx([0.1, 0.055, 0.01])
    with pytest.raises(BadArgument, match="expected a shape of"):
        Shape("square", 0.1, 0.2, 0.1).rates(3)


def test_the_grid_has_200_different_schedules_within_the_ranges_of_the_other_searches():
    grid = list(search.shapes(10))
    assert len(grid) == len({str(shape) for shape in grid}) == 200
    assert len({tuple(shape.rates(T).tolist()) for shape in grid}) == 200
    for shape in grid:
        assert search.PEAKS[0] < shape.peak < search.PEAKS[1]
        assert search.PARTS[0] <= min(shape.start, shape.end) <= max(shape.start, shape.end) <= search.PARTS[1]


# --- searches ------------------------------------------------------------------------------------------------------

AIM = schedules.one_cycle(T, 0.1, 0.02, 0.002)
START = torch.full((4,), math.log(0.02))
SEARCHES = {
    "grid": lambda record: search.grid(record, T),
    "tpe": lambda record: search.tpe(record, T, 0),
    "cma": lambda record: search.cma_es(record, T, START, 0),
}


def away(rates):
    return float((rates.log() - AIM.log()).square().mean())


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_keeps_to_its_budget_finds_what_is_near_and_repeats_itself(name):
    record, again = Record(name, away, 60), Record(name, away, 60)
    SEARCHES[name](record)
    SEARCHES[name](again)
    assert len(record.values) == 60 and record.spent == list(range(1, 61)) and record.values == again.values
    assert away(record.best) == record.lowest == min(record.values)
    assert record.lowest < 0.5 * np.mean(record.values)
    assert away(record.answer_within(10)) == min(record.values[:10]) and record.answer_within(0.5) is None


def test_values_of_several_trainings_cost_as_many():
    record = Record("tpe", away, 42, cost=4)
    search.tpe(record, T, 0)
    assert len(record.values) == 10 and record.spent[-1] == 40 and record.left == 0


def test_tpe_that_is_told_which_steps_finds_their_rates():
    marked = torch.arange(T) % 2 == 0
    aim = torch.where(marked, 0.01 * AIM, AIM)
    far = lambda rates: float((rates.log() - aim.log()).square().mean())
    lowest = {}
    for told in (None, marked):
        record = Record("tpe", far, 50)
        search.tpe(record, T, 0, marked=told)
        lowest[told is None] = record.lowest
    assert lowest[False] < 0.5 * lowest[True]


def test_cma_es_on_noise_answers_with_the_mean_of_its_generations():
    """A generation has one noise, large beside what there is to gain; the answer still comes closer."""
    asked = []

    def fresh(generation):
        noise = 100.0 * math.sin(generation)
        return lambda rates: (asked.append(generation), away(rates) + noise)[1]

    record = Record("cma", away, 120)
    search.cma_es(record, T, START, 0, fresh=fresh)
    assert asked == sorted(asked) and len(asked) == 120 and set(asked) == set(range(1, asked[-1] + 1))
    assert away(record.best) < 0.5 * away(record.answers[0][1])
    assert torch.equal(record.answers[0][1], schedules.from_knots(START, T)) and record.answers[0][0] == 0


@pytest.mark.parametrize("name", SEARCHES)
def test_divergent_trainings_are_infinitely_bad_and_end_no_search(name):
    record = Record(name, lambda rates: math.inf if float(rates.max()) > 0.04 else away(rates), 40)
    SEARCHES[name](record)
    assert len(record.values) == 40 and math.inf in record.values
    assert math.isfinite(record.lowest) and float(record.best.max()) <= 0.04
    nothing = Record(name, lambda rates: math.inf, 40)
    SEARCHES[name](nothing)
    assert nothing.values == [math.inf] * 40


def test_a_grid_of_part_of_a_peak_is_refused():
    with pytest.raises(BadArgument, match="multiple of 20"):
        search.grid(Record("grid", away, 30), T)
    with pytest.raises(BadArgument, match="multiple of 20"):
        search.grid(Record("grid", away, 60, cost=2), T)


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
