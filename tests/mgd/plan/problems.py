"""Random problems of planning, their plans, and the least time of all layouts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np

from mgd.plan.budget import TIERS, Budget, Costs, Sizes
from mgd.plan.placement import Placements, Shape
from mgd.plan.plan import Plan, plan


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


def with_residuals(draw: random.Random, sizes: Sizes, limits: dict[str, int], costs: Costs):
    """The same problem, where captured steps may keep residuals on one of its tiers."""
    kept = costs.hvp * draw.random()
    sizes = dataclasses.replace(sizes, residuals=draw.randint(1, 20) ** 2, memory=draw.choice(list(limits)))
    return sizes, limits, dataclasses.replace(costs, hvp_kept=kept)


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
                    best = min(
                        best, placements.seconds(placements.snapshots(outers, inners), logs, a[pair], b[pair], c).min()
                    )
    return best
