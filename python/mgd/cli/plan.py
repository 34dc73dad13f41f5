"""Plans from the command line: sizes from words, and the budget from `TIER=SIZE`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mgd.plan.budget import TIERS, Budget, Costs, Sizes
from mgd.plan.plan import Plan, plan

_SLOTS = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(text: str) -> int:
    """A number of parameters from text such as "124M", "1.5B", "7_000_000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmbt]?)\s*", text.lower().replace("_", "").replace(",", ""))
    if match is None or (count := round(float(match[1]) * _COUNTS[match[2]])) < 1:
        raise ValueError(f'expected a number of parameters such as "124M" or 1000000, got {text!r}')
    return count


def parse_budget(parts: Sequence[str]) -> Budget:
    """A budget from "device=1GB", "host=8GB", "disk=100GB" or "disk=DIR:100GB", each at most once."""
    given: dict[str, str] = {}
    for part in parts:
        tier, equals, size = part.partition("=")
        if tier not in TIERS or not equals:
            raise ValueError(f"expected TIER=SIZE with a tier among {', '.join(TIERS)}, got {part!r}")
        if tier in given:
            raise ValueError(f"expected each tier once, got {tier!r} twice")
        given[tier] = size
    if "disk" not in given:
        return Budget(device=given.get("device"), host=given.get("host"))
    directory, _, size = given["disk"].rpartition(":")
    return Budget(device=given.get("device"), host=given.get("host"), disk=(directory or "runs/log", size))


def plan_for(
    steps: int,
    parameters: str,
    optimizer: str = "adamw",
    dtype: str = "float32",
    budget: Sequence[str] = (),
    schedule: str = "auto",
    step_seconds: float | None = None,
) -> Plan:
    """The plan of a training: states in float32 (float64 where the gradients are), gradients in `dtype`.

    ValueError where a word means nothing; BudgetTooSmall where nothing fits.
    """
    if optimizer not in _SLOTS:
        raise ValueError(f"expected an optimizer among {', '.join(_SLOTS)}, got {optimizer!r}")
    if dtype not in _BYTES:
        raise ValueError(f"expected a dtype among {', '.join(_BYTES)}, got {dtype!r}")
    count, size = parse_count(parameters), _BYTES[dtype]
    sizes = Sizes(snapshot=(1 + _SLOTS[optimizer]) * max(4, size) * count, gradient=size * count)
    costs = Costs() if step_seconds is None else Costs(step=step_seconds)
    return plan(steps, sizes, parse_budget(budget), costs, schedule=schedule)


def draw(chosen: Plan, folder: Path) -> Path:
    """A picture of the schedule over time."""
    from mgd.cli.plan_plot import draw

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.png"
    draw(chosen, path)
    return path
