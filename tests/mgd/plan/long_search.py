"""Long random searches of three problems, whose results `test_search.py` knows.

python tests/mgd/plan/long_search.py SECONDS
"""

from __future__ import annotations

import math
import random
import sys
import time

from mgd.plan import placement
from mgd.plan.budget import Costs, Sizes
from mgd.plan.placement import Placements, Shape

#: Steps, sizes, limits and costs: transfers take much of the time of each.
PROBLEMS = {
    "adam on two tiers": (
        3000,
        Sizes(3_000_000, 1_000_000),
        {"host": 300_000_000, "disk": 2_000_000_000},
        Costs(step=0.01, hvp=0.03, update=3e-4, write={"disk": 1e8}, read={"disk": 2e8}, overlap=("disk",), copy=5e9),
    ),
    "slow steps on three tiers": (
        800,
        Sizes(3_000_000, 1_000_000),
        {"device": 20_000_000, "host": 60_000_000, "disk": 400_000_000},
        Costs(step=0.01, hvp=0.03, update=1e-4, write={"host": 4e8, "disk": 5e7}, read={"host": 4e8, "disk": 1e8}),
    ),
    "large gradients": (
        20_000,
        Sizes(1_000_000, 1_000_000),
        {"host": 500_000_000, "disk": 5_000_000_000},
        Costs(step=0.02, hvp=0.04, update=2e-3, write={"disk": 2e8}, read={"disk": 2e8}, overlap=("disk",), copy=2e9),
    ),
}


def long_search(chain: int, sizes: Sizes, limits: dict[str, int], costs: Costs, seconds: float) -> float:
    """The least time of the plans of random shapes, half of them near the best so far."""
    draw, best, shape = random.Random(0), math.inf, (1, 1, 0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if draw.random() < 0.5 and best < math.inf:
            length, outer, inner = (max(0, round(x * draw.uniform(0.8, 1.25)) + draw.randint(-1, 1)) for x in shape)
        else:
            length = round(chain ** draw.random())
            outer, inner = round((chain / length) ** draw.random()), round(length ** draw.random())
        length = min(max(1, length), chain)
        segments = -(-chain // length)
        outer = min(max(1, outer), segments - 1) if segments > 1 else 0
        inner = min(max(1, inner), length - 1) if length > 1 else 0
        found = Placements(Shape(chain, length, outer, inner), sizes, limits, costs).best()
        if found is not None and found[0] < best:
            best, shape = found[0], (length, outer, inner)
    return best


if __name__ == "__main__":
    placement.COMBINATIONS = 50_000
    for name, problem in PROBLEMS.items():
        print(
            f'    "{name}": {long_search(*problem, float(sys.argv[1]) if len(sys.argv) > 1 else 600):.6g},', flush=True
        )
