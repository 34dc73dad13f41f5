"""The demonstration's charts: what each learning rate did, and how the wrong labels stand out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgd.ui import charts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def schedule(rate: Tensor, gradient: Tensor) -> Figure:
    """The learning rate of every step `[T]`, and what 10% more of it at one step would do to the objective."""
    fig, (above, below) = charts.figure(8, 5, rows=2, sharex=True, height_ratios=[1, 1.6])
    steps = range(len(rate))
    above.plot(steps, rate.tolist(), color=charts.INK)
    above.set_ylim(bottom=0)
    charts.label(above, "The learning rate of every step ...", "", "learning rate")
    effect, unit = _scaled(0.1 * rate.double() * gradient.double())
    below.bar(
        steps, effect.tolist(), width=1.0, color=[charts.BAD if value > 0 else charts.GOOD for value in effect.tolist()]
    )
    below.axhline(0, color=charts.INK, linewidth=0.8)
    charts.label(
        below,
        "... and what 10% more of it at that step alone would do",
        "training step",
        f"change in held-out loss{unit}",
    )
    charts.colour_legend(
        below, [("worse: the rate is too high here", charts.BAD), ("better: the rate is too low here", charts.GOOD)]
    )
    return fig


def separation(harm: Tensor, wrong: Tensor) -> Figure:
    """Left: the distribution of the metagradient `[n]` for images with right and with wrong labels (bool `[n]`).
    Right: how many of the wrong labels are found, against how many images are looked at, the most harmful first."""
    fig, (left, right) = charts.figure(10, 4, columns=2)
    values, unit = _scaled(harm.double())
    edges = torch.linspace(float(values.min()), float(values.max()), 41, dtype=torch.float64)
    for mask, colour in ((~wrong, charts.SOFT), (wrong, charts.BAD)):
        left.hist(values[mask].tolist(), bins=edges.tolist(), color=colour, alpha=0.75)
    left.axvline(0, color=charts.INK, linewidth=0.8)
    charts.label(
        left, "Wrong labels stand out ...", f"change in held-out loss per unit of weight{unit}", "training images"
    )
    charts.colour_legend(left, [("label is right", charts.SOFT), ("label is wrong", charts.BAD)])
    total, count = int(wrong.sum()), len(wrong)
    hits = wrong[harm.argsort(descending=True)].cumsum(0)
    right.plot(
        [0, total, count], [0, total, total], color=charts.INK, linestyle=":", linewidth=1, label="best possible"
    )
    right.plot(range(1, count + 1), hits.tolist(), color=charts.BAD, linewidth=2, label="by metagradient")
    right.plot([0, count], [0, total], color=charts.SOFT, linestyle="--", linewidth=1, label="in random order")
    right.set(xlim=(0, count), ylim=(0, max(1, total) * 1.04))
    right.legend(loc="lower right", frameon=False)
    charts.label(
        right,
        "... so looking at the most harmful first finds them",
        "images looked at, the most harmful first",
        f"wrong labels found, of {total}",
    )
    return fig


def _scaled(values: Tensor) -> tuple[Tensor, str]:
    """The values in a unit that makes them of order one, and the unit as a suffix of an axis label."""
    largest = float(values.abs().max())
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    if -2 < power < 4:
        return values, ""
    exponent = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return values / 10.0**power, f" (×10{exponent})"
