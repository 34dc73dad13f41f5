"""Searching for schedules: the shapes, the searches on objectives that are known, and the recipe on digits."""

from __future__ import annotations

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
from mgd.recipes.lr_schedule.descent import descend_on_schedule
from mgd.recipes.lr_schedule.search import Objective, Record, Shape
from mgd.recipes.small_images import Task
from mgd.ui.console import show
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

AIM = schedules.one_cycle(T, 5e-3, 1e-3, 1e-4)
START = torch.full((4,), math.log(1e-3))
SEARCHES = {
    "grid": lambda record: search.grid(record, T),
    "random": lambda record: search.random(record, T, 0),
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
    assert record.lowest < 0.5 * np.median(record.values)
    assert record.lowest_within(10) == min(record.values[:10]) and record.lowest_within(0.5) == math.inf
    first = record.first_at(record.lowest)
    assert record.values[first] == record.lowest and record.first_at(-1.0) is None


@pytest.mark.parametrize("name", SEARCHES)
def test_divergent_trainings_are_infinitely_bad_and_end_no_search(name):
    record = Record(name, lambda rates: math.inf if float(rates.max()) > 2e-3 else away(rates), 40)
    SEARCHES[name](record)
    assert len(record.values) == 40 and math.inf in record.values
    assert math.isfinite(record.lowest) and float(record.best.max()) <= 2e-3
    nothing = Record(name, lambda rates: math.inf, 40)
    SEARCHES[name](nothing)
    assert nothing.values == [math.inf] * 40


def test_a_grid_of_part_of_a_peak_is_refused():
    with pytest.raises(BadArgument, match="multiple of 20"):
        search.grid(Record("grid", away, 30), T)


# --- one objective, and what diverges ------------------------------------------------------------------------------


def steep():
    """A linear regression whose training by SGD overflows above a learning rate of about 0.02."""
    torch.manual_seed(0)
    x = 10 * torch.randn(64, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])

    def loss(model, batch, z):
        return F.mse_loss(model(batch[0]), batch[1])

    return TrainingFunction(
        nn.Linear(3, 1), loss, [(x, y)] * T, optimizer=SGD(lr=1e-3), objective=lambda model: F.mse_loss(model(x), y)
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


@pytest.mark.filterwarnings("ignore::mgd.errors.UnstableTraining")
def test_the_descent_takes_a_smaller_step_where_a_training_diverges_and_says_so():
    found = descend_on_schedule(steep(), torch.full((3,), math.log(1e-5)), 6, outer=8.0)
    assert found.history[1].diverged >= 1 and len(found.notes) == sum(step.diverged for step in found.history)
    assert "left the finite numbers" in found.notes[0] and "outer learning rate of 4" in found.notes[0]
    assert min(found.values) < 0.5 * found.values[0] and all(map(math.isfinite, found.values))


def test_every_step_may_be_a_knot():
    found = descend_on_schedule(steep(), torch.full((T,), math.log(1e-5)), 8)
    assert found.best["log_lr"].shape == (T,) and min(found.values) < 0.9 * found.values[0]


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


# --- intervals -----------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_scipy():
    values = [1.0, 2.0, 4.0, 8.0]
    expected = stats.ttest_1samp(values, 0.0).confidence_interval()
    assert intervals.mean(values) == pytest.approx((3.75, expected.low, expected.high))
    x = np.random.default_rng(0).normal(size=40)
    rho, low, high = intervals.spearman(x.tolist(), (x + np.random.default_rng(1).normal(size=40)).tolist())
    assert 0.1 < low < rho < high < 0.95
    assert intervals.spearman([1.0, 2.0, 3.0, 4.0], [9.0, 7.0, 5.0, 1.0])[0] == pytest.approx(-1.0)
    with pytest.raises(BadArgument, match="at least 3 pairs"):
        intervals.spearman([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(BadArgument, match="at least 2 values"):
        intervals.mean([1.0])


# --- the recipe ----------------------------------------------------------------------------------------------------

QUICK = recipe.Settings().quick()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def found(kept):
    return recipe.run(data.digits(), data.digits(train=False), QUICK, seed=0, resume=kept)


def test_training_held_out_and_test_images_are_disjoint():
    task = Task.make(data.digits(), data.digits(train=False), 500, 300, 400, seed=0)
    keys = [{bytes(x.numpy().tobytes()) for x in part.images} for part in (task.train, task.held_out, task.test)]
    assert [len(part) for part in keys] == [500, 300, 400]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    seen = torch.cat([i for _, _, i in task.batches(50, 20, seed=1)])
    assert torch.bincount(seen).tolist() == [2] * 500
    with pytest.raises(BadData, match="at least 400 training"):
        Task.make(data.digits()[:300], data.digits(train=False), 100, 100, 100, 0)


def test_descent_finds_a_better_schedule_than_its_start_on_images_that_nothing_saw(found):
    descent = found.searches[recipe.DESCENT]
    assert descent.lowest < 0.8 * descent.values[0]
    judged = found.judged
    assert judged[recipe.DESCENT].loss[0] < judged[recipe.START].loss[0]
    assert np.mean(judged[recipe.DESCENT].loss[1:]) < np.mean(judged[recipe.START].loss[1:])


def test_work_is_counted_as_measured(found):
    descent = found.searches[recipe.DESCENT]
    assert found.ratio > 1.5  # a metagradient holds a training
    assert descent.spent == pytest.approx([found.trace + found.ratio * (i + 1) for i in range(QUICK.meta_steps)])
    for name in (recipe.GRID, "random search", "TPE", "CMA-ES"):
        assert found.searches[name].spent[-1] == QUICK.budget
    # CMA-ES begins where the descent begins.
    assert found.searches["CMA-ES"].values[0] == pytest.approx(descent.values[0], rel=1e-6)


def test_the_result_is_complete_and_json(found):
    result = json.loads(json.dumps(found.to_dict()))
    assert {"data", "searches", "descent", "schedules", "judged", "seconds", "settings", "seed"} <= set(result)
    assert len(result["searches"]["TPE"]["values"]) == QUICK.budget
    assert len(result["schedules"][recipe.DESCENT]) == QUICK.steps
    assert len(result["judged"][recipe.GRID]["loss"]) == QUICK.seeds + 1


def test_a_finished_run_is_read_from_its_directory_and_another_one_is_refused(found, kept):
    again = recipe.run(data.digits(), data.digits(train=False), QUICK, seed=0, resume=kept)
    for name, record in found.searches.items():
        assert again.searches[name].values == record.values
        assert torch.equal(again.schedules[name], found.schedules[name])
    assert again.judged["TPE"].loss == found.judged["TPE"].loss
    with pytest.raises(StaleRun, match="seed"):
        recipe.run(data.digits(), data.digits(train=False), QUICK, seed=1, resume=kept)


def test_terminal_and_page(found, tmp_path):
    from matplotlib.image import imread

    console = Console(width=80, record=True, file=io.StringIO())
    page = report.page(found)
    show(page, console)
    text = console.export_text()
    assert f"{found.searches['TPE'].lowest:.4f}" in text and "…" not in text
    paths = write(page, tmp_path)
    assert {path.name for path in paths} == {"index.html", "search.png", "schedules.png", "test.png"}
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
    ],
)
def test_settings_that_mean_nothing(bad, says):
    with pytest.raises(BadArgument, match=says):
        recipe.run(data.digits(), data.digits(train=False), recipe.replace(QUICK, **bad))
