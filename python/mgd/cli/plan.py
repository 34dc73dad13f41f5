"""Plans from the command line: sizes and rates from words, and the budget from `TIER=SIZE`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from mgd.errors import BadArgument
from mgd.plan.budget import TIERS, Budget, Costs, Sizes
from mgd.plan.plan import Plan, plan
from mgd.plan.scale import DEVICES, Forecast, Scale, forecast
from mgd.ui.options import parse_count
from mgd.ui.page import Page, Section
from mgd.util.text import parse_bytes

MOST_STEPS, MOST_RANKS = 10**10, 10**6  # a plan takes seconds at these
_SLOTS = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def parse_budget(parts: Sequence[str]) -> Budget:
    """A budget from "device=1GB", "host=8GB", "disk=100GB" or "disk=DIR:100GB", each at most once."""
    sizes: dict[str, str] = {}
    for part in parts:
        tier, equals, size = part.partition("=")
        if tier not in TIERS or not equals:
            raise BadArgument(f"expected TIER=SIZE with a tier among {', '.join(TIERS)}; got {part!r}")
        if tier in sizes:
            raise BadArgument(f"expected each tier once; got {tier!r} twice")
        sizes[tier] = size
    if "disk" not in sizes:
        return Budget(device=sizes.get("device"), host=sizes.get("host"))
    directory, _, size = sizes["disk"].rpartition(":")
    return Budget(device=sizes.get("device"), host=sizes.get("host"), disk=(directory or "runs/log", size))


def plan_for(
    steps: int,
    parameters: str,
    optimizer: str = "adamw",
    dtype: str = "float32",
    budget: Sequence[str] = (),
    schedule: str = "auto",
    step_seconds: float | None = None,
    residuals: str | None = None,
) -> Plan:
    """The plan of a training: states in float32 (float64 where the gradients are), gradients in `dtype`.

    residuals: the size of what a captured step can keep for its second derivatives, in the budget's fastest memory.

    Raises BadArgument for a word without a meaning, BudgetTooSmall where nothing fits.
    """
    _check_words(optimizer, dtype)
    _check_numbers(steps, step_seconds)
    count, size = parse_count(parameters), _BYTES[dtype]
    limits = parse_budget(budget)
    sizes = Sizes(
        snapshot=(1 + _SLOTS[optimizer]) * max(4, size) * count,
        gradient=size * count,
        residuals=0 if residuals is None else parse_bytes(residuals),
        memory="host" if limits.device is None else "device",
    )
    costs = Costs() if step_seconds is None else Costs(step=step_seconds)
    return plan(steps, sizes, limits, costs, schedule=schedule)


def forecast_for(
    ranks: int,
    steps: int,
    parameters: str,
    on: tuple[str, str],
    optimizer: str = "adamw",
    dtype: str = "bfloat16",
    budget: Sequence[str] = (),
    schedule: str = "auto",
    tokens: str | None = None,
) -> Forecast:
    """What a metagradient takes of each rank: states in float32 or float64, gradients in `dtype`.

    on: the device and the network of each rank. budget: likewise. tokens: per step, of all ranks.

    Raises BadArgument for a word without a meaning, BudgetTooSmall where nothing fits.
    """
    _check_words(optimizer, dtype)
    _check_numbers(steps)
    if ranks > MOST_RANKS:
        raise BadArgument(f"expected at most {MOST_RANKS:,} ranks; got {ranks:,}")
    device, network = on
    if device not in DEVICES:
        raise BadArgument(f"expected a device among {', '.join(DEVICES)}; got {device!r}")
    size = _BYTES[dtype]
    scale = Scale(parse_count(parameters), ranks, _SLOTS[optimizer], max(4, size), size)
    limits = parse_budget(budget) if budget else None
    count = None if tokens is None else parse_count(tokens, "tokens of a step (--tokens)")
    rate = parse_rate(network)
    return forecast(steps, scale, DEVICES[device], rate, tokens=count, budget=limits, schedule=schedule)


def check_options(ranks: int | None, forecasts: Sequence[object], measured: Sequence[object]) -> None:
    """Raise BadArgument for options that would do nothing."""
    if ranks is None and any(value is not None for value in forecasts):
        raise BadArgument("expected --ranks with --device, --network and --tokens, which are of each rank")
    if ranks is not None and any(value is not None for value in measured):
        raise BadArgument("expected no --step-seconds and no --residuals with --ranks, whose forecast measures nothing")


def parse_rate(text: str) -> float:
    """Bytes per second from "400Gb" (bits), "50GB" (bytes), with or without "/s"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([MGT])(b|B)(?:/s)?\s*", text)
    if match is None or not float(match[1]):
        raise BadArgument(
            f'expected a rate such as "400Gb" (bits per second) or "50GB" (bytes) for --network; got {text!r}'
        )
    bits = float(match[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[match[2]]
    return bits / 8 if match[3] == "b" else bits


def _check_numbers(steps: int, step_seconds: float | None = None) -> None:
    if steps > MOST_STEPS:
        raise BadArgument(f"expected at most {MOST_STEPS:,} steps; got {steps:,}")
    if step_seconds is not None and not 0 < step_seconds < math.inf:
        raise BadArgument(f"expected the seconds of a step above 0 and finite; got {step_seconds}")


def _check_words(optimizer: str, dtype: str) -> None:
    if optimizer not in _SLOTS:
        raise BadArgument(f"expected an optimizer among {', '.join(_SLOTS)}; got {optimizer!r}")
    if dtype not in _BYTES:
        raise BadArgument(f"expected a dtype among {', '.join(_BYTES)}; got {dtype!r}")


def page(plan: Plan) -> Page:
    """The plan as text, and a picture of its schedule over time where it is short enough to draw."""

    def sections() -> list[Section]:
        from mgd.cli.plan_plot import MOST_ACTIONS, drawable, picture

        text = Section("The plan", listing=plan.explain())
        if not drawable(plan):
            note = f"This plan has more than {MOST_ACTIONS:,} actions, too many to draw."
            return [Section("Position and memory over time", note), text]
        return [Section("Position and memory over time", "", picture(plan), "plan"), text]

    lead = f"{plan.T:,} training steps by the schedule {plan.schedule!r}."
    return Page("Plan of a metagradient", lead, sections=sections)
