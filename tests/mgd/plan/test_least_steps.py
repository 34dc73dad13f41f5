"""The number of model steps of plans without a log, against the optimum of Griewank & Walther (2000)."""

from __future__ import annotations

from math import comb

import pytest

from mgd.plan.budget import Budget, Sizes
from mgd.plan.plan import plan

SIZES = Sizes(snapshot=12, gradient=4)
SNAPSHOTS = (1, 2, 3, 4, 7, 10, 25, 200)


def advances(T: int, s: int) -> int:
    """t(T, s) = r T - C(s+r, s+1), r the least with T <= C(s+r, s)."""
    r = 0
    while comb(s + r, s) < T:
        r += 1
    return r * T - comb(s + r, s + 1)


def planned(T: int, s: int) -> int:
    return plan(T, SIZES, Budget(host=s * SIZES.snapshot), schedule="revolve").model_steps


@pytest.mark.parametrize("s", SNAPSHOTS)
def test_revolve_advances_no_more_than_the_closed_form(s):
    """Beside the advances, each of the T steps computes its gradient where it is reversed, the last one as well."""
    for T in range(1, 201):
        assert planned(T, s) == advances(T, s) + T, T


@pytest.mark.parametrize("s", [1, 2, 3, 7])
def test_as_many_as_another_implementation(s):
    schedules = pytest.importorskip("checkpoint_schedules")
    for T in (2, 3, 7, 8, 9, 40, 120):
        steps = 0
        for action in schedules.Revolve(T, s):
            if isinstance(action, schedules.Forward):
                steps += min(action.n1, T) - action.n0
            elif isinstance(action, schedules.EndReverse):
                break
        assert planned(T, s) == steps, T


def test_one_step_needs_no_memory():
    for schedule in ("auto", "log", "revolve", "binary", "all"):
        made = plan(1, SIZES, Budget(host=0), schedule=schedule)
        assert (made.model_steps, made.peak) == (1, {"host": 0})
        assert "nothing is stored" in made.explain()
