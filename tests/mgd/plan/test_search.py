"""The search against every layout of small problems, long random searches of large ones, and smaller budgets."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from mgd.errors import BudgetTooSmall
from mgd.plan.budget import TIERS, Budget, Costs, Sizes
from mgd.plan.layout import Layout
from mgd.plan.placement import Placements, Shape
from mgd.plan.plan import Plan, plan
from mgd.plan.reversal import Revolve
from mgd.plan.shapes import Bound, Shapes
from mgd.plan.tally import Slots

GB = 10**9


def planned(T: int, sizes: Sizes, limits: dict[str, int], costs: Costs) -> Plan:
    disk = ("x", limits["disk"]) if "disk" in limits else None
    return plan(T, sizes, Budget(limits.get("device"), limits.get("host"), disk), costs)


def problem(draw: random.Random, T: int, tiers: int) -> tuple[Sizes, dict[str, int], Costs]:
    """Sizes, limits and costs at random; the tiers' speeds between those that matter much and not at all."""
    gradient = draw.randint(1, 20)
    sizes = Sizes(draw.choice((3 * gradient, draw.randint(1, 40))), gradient)
    names = sorted(draw.sample(TIERS, tiers), key=TIERS.index)
    unit = T * (gradient + 0.3 * sizes.snapshot) / tiers
    limits = {name: int(sizes.snapshot + draw.random() ** 2 * unit) for name in names}
    write, read = ({name: gradient * 10 ** draw.uniform(-1, 2.5) for name in TIERS} for _ in range(2))
    costs = Costs(
        hvp=draw.uniform(0.5, 4),
        update=10 ** draw.uniform(-3, 0),
        write=write,
        read=read,
        overlap=draw.choice((("host", "disk"), ("disk",), (), TIERS)),
        copy=draw.choice((math.inf, 50.0 * gradient)),
    )
    return sizes, limits, costs


def ways(count: int, size: int, room: np.ndarray) -> np.ndarray:
    """All ways to split so many objects over the tiers."""
    bounds = itertools.combinations_with_replacement(range(count + 1), len(room) - 1)
    counts = np.diff([(*bound, count) for bound in bounds], axis=1, prepend=0)
    return counts[(counts * size <= room).all(1)]


def exhaustive(T: int, sizes: Sizes, limits: dict[str, int], costs: Costs) -> float:
    """The least time of all layouts: every length, every number of snapshots, every way to place all objects."""
    room, best = np.array(list(limits.values())), math.inf
    for length in range(1, T + 1):
        segments = -(-T // length)
        for outer in range(segments > 1, max(1, segments)):
            for inner in range(length > 1, max(1, length)):
                if (outer + inner) * sizes.snapshot + (length - 1) * sizes.gradient > room.sum():
                    break
                outers, inners = (ways(count, sizes.snapshot, room) for count in (outer, inner))
                logs = ways(length - 1, sizes.gradient, room)
                held = sizes.snapshot * (outers[:, None] + inners)
                a, b = np.nonzero((held <= room).all(-1))
                pair, c = np.nonzero((held[a, b][:, None] + sizes.gradient * logs <= room).all(-1))
                if len(pair):
                    placements = Placements(Shape(T, length, outer, inner), sizes, limits, costs)
                    best = min(best, placements.seconds(outers, inners, logs, a[pair], b[pair], c).min())
    return best


def test_many_placements_at_once_take_as_long_as_each_layout():
    draw = random.Random(1)
    for _ in range(200):
        T, tiers = draw.randint(2, 80), draw.randint(1, 3)
        sizes, limits, costs = problem(draw, T, tiers)
        length = draw.randint(1, T)
        segments = -(-T // length)
        outer = draw.randint(1, segments - 1) if segments > 1 else 0
        inner = draw.randint(1, length - 1) if length > 1 else 0
        free = np.full(tiers, 10**9)
        kinds = [ways(count, 1, free) for count in (outer, inner, length - 1)]
        rows = [np.array([draw.randrange(len(kind)) for _ in range(5)]) for kind in kinds]
        shape = Shape(T, length, outer, inner)
        seconds = Placements(shape, sizes, limits, costs, 3).seconds(*kinds, *rows)
        bound = Bound(T, sizes, dict.fromkeys(limits, 10**9), costs, 3)
        least = bound(Shapes(*(np.array([float(x)]) for x in (length, outer, inner))))
        for k in range(5):
            o, i, g = (tuple(kind[row[k]].tolist()) for kind, row in zip(kinds, rows, strict=True))
            layout = Layout(tuple(limits), sizes, T, length, Revolve(max(1, outer)), Slots(o), Slots(i), g)
            assert seconds[k] == pytest.approx(sum(p.seconds(layout.tiers, costs) for p in layout.phases(3)))
            assert least[0] <= seconds[k]


@pytest.mark.parametrize("seed", range(12))
def test_no_layout_of_a_small_problem_is_faster_by_one_percent(seed):
    draw = random.Random(seed)
    for tiers, most in ((1, 60), (2, 60), (2, 30), (3, 16)):
        T = draw.randint(2, most)
        sizes, limits, costs = problem(draw, T, tiers)
        least = exhaustive(T, sizes, limits, costs)
        assert planned(T, sizes, limits, costs).predicted_seconds <= 1.01 * least, (T, sizes, limits, costs)


@pytest.mark.parametrize(
    ("limits", "hours"),
    [
        ({"device": 40 * GB, "host": 200 * GB, "disk": 4000 * GB}, 6.27),
        ({"host": 200 * GB, "disk": 4000 * GB}, 6.26),
        ({"host": 200 * GB}, 9.37),
    ],
    ids=lambda limits: "+".join(limits) if isinstance(limits, dict) else "",
)
def test_a_large_model_with_many_snapshots_on_the_slow_tier(limits, hours):
    """1.2 billion parameters, AdamW in float32: what layouts found by hand and by long random searches take."""
    made = planned(5000, Sizes(14_400_000_000, 4_800_000_000), limits, Costs(step=0.9))
    assert made.predicted_seconds / 3600 <= 1.001 * hours


def test_more_memory_or_a_faster_tier_is_never_slower():
    draw = random.Random(5)
    for _ in range(60):
        T, tiers = draw.randint(2, 24), draw.randint(1, 3)
        sizes, limits, costs = problem(draw, T, tiers)
        try:
            before = planned(T, sizes, limits, costs).predicted_seconds
        except BudgetTooSmall:
            continue
        tier = draw.choice(TIERS)
        room = limits.get(tier, 0) + draw.choice((0, 1, sizes.gradient, 10 * sizes.snapshot))
        more = {name: limits.get(name, 0) for name in TIERS if name in limits or name == tier} | {tier: room}
        assert planned(T, sizes, more, costs).predicted_seconds <= before * (1 + 1e-9)
        for way in ("write", "read"):
            rates = dict(getattr(costs, way))
            rates[tier] *= draw.uniform(1, 4)
            faster = Costs(**{k: getattr(costs, k) for k in costs.__dataclass_fields__} | {way: rates})
            assert planned(T, sizes, limits, faster).predicted_seconds <= before * (1 + 1e-9)
