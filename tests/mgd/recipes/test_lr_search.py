"""The schedules that the learning-rate recipe searches among, and its searches on a known problem."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mgd import schedules
from mgd.errors import BadArgument
from mgd.recipes.lr_schedule import search
from mgd.recipes.lr_schedule.search import Record, Shape

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
