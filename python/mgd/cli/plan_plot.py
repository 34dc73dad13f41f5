"""A picture of a plan: where the current state is, action by action, and what each tier holds meanwhile."""

from __future__ import annotations

import io
import itertools
import os
from typing import TYPE_CHECKING, Any

from mgd.errors import BadArgument
from mgd.plan.actions import Advance, Drop, Load, Reverse, Save
from mgd.ui import charts
from mgd.util.files import write_file
from mgd.util.text import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mgd.plan.plan import Plan

_COLOURS = {"model": "#c0392b", "update": "#2e86c1", "load": "#b0b0b0", "reverse": "#1e8449"}
_TIER_COLOURS = {"device": "#7d3c98", "host": "#ca6f1e", "disk": "#566573"}

#: More actions than this are too many to draw.
MOST_ACTIONS = 200_000


def drawable(plan: Plan) -> bool:
    """Whether the plan has few enough actions for a picture."""
    return next(itertools.islice(plan.actions(), MOST_ACTIONS, None), None) is None


def trace(plan: Plan) -> tuple[list[tuple[str, float, float, int, int]], list[tuple[float, dict[str, int]]]]:
    """Follow the plan in predicted seconds of computation, without transfers.

    Returns the strokes (kind, seconds from, to, position from, to) and the bytes held (seconds, {tier: bytes}) after
    each action.
    """
    costs, sizes = plan.costs, plan.sizes
    strokes: list[tuple[str, float, float, int, int]] = []
    now, position = 0.0, 0
    snapshots: dict[int, str] = {}
    log: dict[int, str] = {}
    kept: set[int] = set()  # steps whose residuals are held
    room = plan.layout.kept
    held = dict.fromkeys(plan.limits, 0)
    history = [(0.0, dict(held))]

    def stroke(kind: str, seconds: float, to: int) -> None:
        nonlocal now, position
        if strokes and strokes[-1][0] == kind != "reverse" and strokes[-1][4] == position:
            _, begin, _, low, _ = strokes.pop()
            strokes.append((kind, begin, now + seconds, low, to))
        else:
            strokes.append((kind, now, now + seconds, position, to))
        now, position = now + seconds, to

    if not drawable(plan):
        raise BadArgument(f"expected a plan of at most {MOST_ACTIONS:,} actions to draw; got more: plan fewer steps")
    for action in plan.actions():
        if isinstance(action, Advance):
            for step in range(position, action.stop):
                if step in log:
                    stroke("update", costs.update, step + 1)
                    continue
                stroke("model", costs.step, step + 1)
                if action.log is not None:
                    log[step] = action.log
                    if len(kept) < room:
                        kept.add(step)
                    held[action.log] += sizes.gradient
                    history.append((now, dict(held)))
        elif isinstance(action, Save):
            snapshots[action.step] = action.tier
            held[action.tier] += sizes.snapshot
        elif isinstance(action, Load):
            stroke("load", 0.0, action.step)
        elif isinstance(action, Drop):
            held[snapshots.pop(action.step)] -= sizes.snapshot
        elif isinstance(action, Reverse):
            has_residuals = action.step in kept
            if action.step in log:
                held[log.pop(action.step)] -= sizes.gradient
            else:
                strokes.append(("model", now, now + costs.step, position, position))
                now += costs.step
                has_residuals = sizes.residuals > 0 and (position < plan.T - 1 or len(kept) < room)
            kept.discard(action.step)
            stroke("reverse", costs.hvp_kept if has_residuals else costs.hvp, position)
        history.append((now, dict(held)))
    return strokes, history


def draw(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draw the plan to `path` (.png): position above, bytes held in each tier below, over time."""
    buffer = io.BytesIO()
    picture(plan).savefig(buffer, format="png")
    write_file(path, buffer.getvalue())


def picture(plan: Plan) -> Figure:
    """Position above, bytes held in each tier below, over time."""
    from matplotlib.collections import LineCollection

    strokes, history = trace(plan)
    fig, (above, below) = charts.figure(10, 6, rows=2, sharex=True, height_ratios=(3, 1))
    names = {"model": "model step", "update": "update from the log", "load": "load", "reverse": "adjoint step"}
    for kind, name in names.items():
        lines: Any = [[(x0, y0), (x1, y1)] for k, x0, x1, y0, y1 in strokes if k == kind]
        width = 0.6 if kind == "load" else 2.0
        above.add_collection(LineCollection(lines, colors=_COLOURS[kind], linewidths=width, label=name))
    above.autoscale_view()
    above.legend(loc="upper right", fontsize="small")
    title = f"{plan.schedule}: {plan.T:,} steps, {plan.model_steps:,} model steps, {plan.update_steps:,} updates"
    charts.label(above, title, y="position (training step)")
    seconds = [second for second, _ in history]
    for tier, limit in plan.limits.items():
        amounts = [held[tier] for _, held in history]
        if any(amounts):
            label = f"{tier}, of {format_bytes(limit)}"
            below.plot(seconds, amounts, drawstyle="steps-post", color=_TIER_COLOURS[tier], label=label)
    if below.lines:
        below.legend(loc="upper right", fontsize="small")
    below.set_ylim(bottom=0)
    below.yaxis.set_major_formatter(lambda value, _: format_bytes(max(0.0, value)))
    below.set(xlabel="seconds of computation, as predicted", ylabel="held")
    return fig
