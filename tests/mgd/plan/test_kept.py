"""Residuals of captured steps in a plan: against every layout, against what a plan without them leaves, in words."""

from __future__ import annotations

import dataclasses
import random

import pytest
from problems import exhaustive, planned, problem, with_residuals

from mgd.plan.budget import Budget, Costs, Sizes
from mgd.plan.ideal import THRIFT, Ideal
from mgd.plan.plan import plan
from mgd.plan.search import Search


def kept_problem(seed: int, longest: int, tiers: int):
    draw = random.Random(seed)
    T = draw.randint(2, longest)
    return draw, T, *with_residuals(draw, *problem(draw, T, tiers))


def from_what_is_left(T: int, sizes: Sizes, limits: dict[str, int], costs: Costs) -> float:
    """Seconds of the plan that knows of no residuals, where as many are kept as it leaves room for."""
    plain = planned(T, dataclasses.replace(sizes, residuals=0), limits, costs).layout
    layout = dataclasses.replace(plain, sizes=sizes).keeping(limits)
    return Search(T, sizes, limits, costs).seconds(layout)


def close_to_exhaustive(seed: int) -> None:
    for tiers, longest in ((1, 30), (2, 15), (3, 8)):
        _, *what = kept_problem(seed, longest, tiers)
        least = exhaustive(*what)
        assert Ideal(*what).seconds <= least * (1 + 1e-9), seed
        assert planned(*what).predicted_seconds <= 1.01 * least, (seed, what)


def test_no_layout_of_a_small_problem_is_faster_by_one_percent():
    for seed in (*range(4), *(random.SystemRandom().randrange(1 << 32) for _ in range(4))):
        close_to_exhaustive(seed)


def test_a_plan_is_never_slower_than_one_that_keeps_what_is_left():
    for seed in range(9):
        _, *what = kept_problem(seed, 60, 1 + seed % 3)
        as_good_as_any = THRIFT * Ideal(*what).seconds
        assert planned(*what).predicted_seconds <= max(as_good_as_any, from_what_is_left(*what) * (1 + 1e-9)), seed
    gained = 0
    for seed in range(3):
        _, *what = kept_problem(seed, 1500, 1 + seed % 2)
        before, after = from_what_is_left(*what), planned(*what).predicted_seconds
        assert after <= 1.006 * before, seed
        gained += after < 0.99 * before
    assert gained, "the choice makes no difference"


def test_more_memory_is_never_slower():
    for seed in range(20):
        draw, T, sizes, limits, costs = kept_problem(seed, 60, 1 + seed % 3)
        before = planned(T, sizes, limits, costs).predicted_seconds
        more = limits | {sizes.memory: limits[sizes.memory] + draw.choice((1, sizes.residuals, T * sizes.gradient))}
        after = planned(T, sizes, more, costs).predicted_seconds
        assert after <= max(before * (1 + 1e-9), THRIFT * Ideal(T, sizes, more, costs).seconds), seed


def test_what_is_smaller_for_what_it_saves_goes_first():
    """64 steps; a gradient takes 10 bytes and saves a model step, residuals save 0.7 of one."""
    costs = Costs(write={"host": 1e9}, read={"host": 1e9})
    room = 64 * 10 + 11 * 30
    small, large = (plan(64, Sizes(30, 10, size), Budget(host=room), costs) for size in (2, 500))
    assert small.steps_kept == 64 and small.predicted_seconds < 64 * (1 + 2.3) * 1.1
    assert large.layout.kept == 0 and large.model_steps == 64
    assert large.predicted_seconds > small.predicted_seconds
    device = plan(64, Sizes(30, 10, 2, memory="device"), Budget(host=room), costs)
    assert device.layout.kept == 0, "only the training's own memory can hold them"


@pytest.mark.parametrize(
    ("size", "room", "says"),
    [
        (
            20,
            10_000,
            "64 of 64 HVPs use residuals that their step left (0.7 s less each): 64 steps keep 20 B at a time",
        ),
        (
            5_000,
            1_200,
            "0 of 64 HVPs use residuals that their step left (0.7 s less each): 0 steps keep 5 kB at a time",
        ),
        (5_000, 1_200, "There is no room for more"),
        (200, 1_500, "More would take memory from the log and the snapshots, where it saves more"),
    ],
)
def test_explain_says_how_many_are_kept_and_why(size, room, says):
    made = plan(64, Sizes(30, 10, size), Budget(host=room))
    assert says in made.explain()
    assert made.to_dict()["residuals_held"] == made.layout.kept
    assert "residuals" not in plan(64, Sizes(30, 10), Budget(host=room)).explain()


def test_sizes_and_costs_that_make_no_sense_are_refused():
    for wrong in (lambda: Sizes(3, 1, -1), lambda: Sizes(3, 1, 1, "tape"), lambda: Costs(hvp=1.0, hvp_kept=2.0)):
        with pytest.raises(ValueError, match="expected"):
            wrong()
