"""What the sweep over ways to train shows: a table, and smoothness beside the error of a metagradient's prediction."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mgd.recipes.smoothness.recipe import BASE, Found
from mgd.ui import charts
from mgd.ui.page import Page, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def page(found: Found) -> Page:
    return Page(
        "Which trainings are smooth?",
        lead(found),
        [("Ways to train, the smoothest first", ranking(found))],
        lambda: _sections(found),
        verdict(found),
    )


def lead(found: Found) -> str:
    s = found.settings
    return (
        f"{found.data}: a ResNet-9-style network, {s.steps} steps of AdamW, one choice changed at a time (as it stands:"
        " GroupNorm before GELU, average pooling, width 8, batches of 48, eps_root 1e-8). Metaparameters are the "
        f"weights of all training examples, changed by {' and '.join(map(str, s.sizes))} along the metagradient's own "
        f"direction and {s.directions} random one{'s' * (s.directions != 1)}; everything is the mean of {s.seeds} "
        f"seed{'s' * (s.seeds != 1)}. Smoothness is 1 where all parameters keep the direction in which they began. "
        "The prediction's error is how far the change of the held-out loss by one step of sign descent is from what "
        "the metagradient says, relative to it."
    )


def verdict(found: Found) -> str:
    if found.rho is None or found.interval is None:
        return f"{len(found.measured)} ways to train are too few to say whether smoothness foretells the error."
    low, high = found.interval
    words = "predicts" if high < 0 else "does NOT clearly predict"
    return (
        f"Smoothness {words} how well a metagradient step can be foreseen: Spearman's rank correlation with the "
        f"prediction's error is {found.rho:.2f} (95% interval {low:.2f} to {high:.2f}, by resampling the "
        f"{len(found.measured)} ways to train)."
    )


def ranking(found: Found) -> Table:
    """By smoothness; a choice that diverged comes last."""
    base = found.measured[BASE]
    rows = [
        [
            "way to train",
            "smooth-\nness",
            "against\nas it stands",
            "prediction's\nerror",
            "test\naccuracy",
            "against\nas it stands",
        ]
    ]
    for name, m in sorted(found.measured.items(), key=lambda pair: _key(pair[1].smoothness)):
        if math.isnan(m.smoothness):
            rows.append([name, "diverged", "", "", "", ""])
            continue
        change = "" if name == BASE else f"{m.smoothness - base.smoothness:+.3f}"
        gain = "" if name == BASE else f"{100 * (m.accuracy - base.accuracy):+.1f} pp"
        rows.append([name, f"{m.smoothness:.3f}", change, f"{m.error:.1%}", f"{m.accuracy:.1%}", gain])
    return rows


def _key(smoothness: float) -> float:
    return math.inf if math.isnan(smoothness) else -smoothness


def _sections(found: Found) -> list[Section]:
    return [
        Section(
            "Can smooth trainings be predicted?",
            "Each point is a way to train. Across: its metasmoothness. Up: by how much the metagradient was wrong "
            f"about what a step along it does.\n\n{verdict(found)}",
            scatter(found),
            "smoothness-and-error",
        ),
        Section(
            "What smoothness costs",
            "Accuracy on test images after the same number of steps.",
            costs(found),
            "smoothness-and-accuracy",
            ranking(found),
        ),
    ]


def scatter(found: Found) -> Figure:
    fig, axes = charts.figure(8.5, 5.5)
    _points(axes, found, "error")
    axes.set_yscale("log")
    charts.label(
        axes,
        "Smoothness, and what a step along the metagradient does",
        "metasmoothness",
        "error of the predicted change, relative to it (logarithmic)",
    )
    return fig


def costs(found: Found) -> Figure:
    fig, axes = charts.figure(8.5, 5.5)
    _points(axes, found, "accuracy")
    charts.label(axes, "", "metasmoothness", "test accuracy")
    return fig


def _points(axes, found: Found, quantity: str) -> None:
    """Numbered points and, beside them, whose number is whose."""
    known = {name: m for name, m in found.measured.items() if not math.isnan(m.smoothness)}
    for number, (name, m) in enumerate(known.items(), 1):
        colour = charts.BAD if name == BASE else charts.GOOD
        y = getattr(m, quantity)
        axes.plot(m.smoothness, y, "o", color=colour, markersize=6, label=f"{number}  {name}")
        axes.annotate(str(number), (m.smoothness, y), (5, 4), textcoords="offset points", fontsize=8)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=0, markerscale=0)
