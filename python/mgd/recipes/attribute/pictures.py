"""Pictures of an attribution: scores by method, predictions against the truth, and the examples themselves."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgd.recipes.attribute.judging import OURS, Judged
from mgd.recipes.attribute.task import Task
from mgd.ui import charts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {OURS: charts.GOOD, "EK-FAC": charts.BAD, "TRAK": "#c08a2e", "gradient products": charts.SOFT}
ROUGH = "metagradient, rough training"
MOST_POINTS = 2000
GAP = 0.35  # between columns, in widths of a picture


def scores_by_fraction(smooth: Judged, rough: Judged | None) -> Figure:
    """The linear datamodeling score of every method against the share of examples dropped, with its 95% interval."""
    fig, axis = charts.figure(7.5, 4.2)
    curves = {method: (by, COLOURS.get(method, charts.INK), "-") for method, by in smooth.scores.items()}
    if rough is not None:
        curves[ROUGH] = (rough.scores[OURS], charts.GOOD, ":")
    for i, (name, (by, colour, style)) in enumerate(curves.items()):
        places = [j + 0.06 * (i - (len(curves) - 1) / 2) for j in range(len(by))]
        means = [score.mean for score in by.values()]
        bars = [[s.mean - s.low for s in by.values()], [s.high - s.mean for s in by.values()]]
        bars = [[max(0.0, x) for x in row] for row in bars]
        axis.errorbar(places, means, yerr=bars, color=colour, linestyle=style, marker="o", ms=4, capsize=3, label=name)
    fractions = list(smooth.true)
    axis.set_xticks(range(len(fractions)), [f"{p:.0%}" for p in fractions])
    axis.axhline(0, color=charts.INK, linewidth=0.8)
    axis.axhline(1, color=charts.SOFT, linewidth=0.8, linestyle=":")
    title = "Do the scores predict what leaving examples out does?"
    charts.label(axis, title, "training examples dropped", "linear datamodeling score")
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def prediction_against_truth(judged: Judged, methods: list[str]) -> Figure:
    """Each point is a query and a subset: the predicted change of its loss, and the true one, at the smallest and the
    largest fraction. Methods without a scale of their own are scaled to fit best."""
    fractions = [min(judged.true), max(judged.true)]
    fig, axes = charts.figure(4.2 * len(methods), 7.6, rows=2, columns=len(methods), squeeze=False)
    for row, fraction in zip(axes, fractions, strict=True):
        true = judged.true[fraction].reshape(-1)
        for axis, method in zip(row, methods, strict=True):
            guess = judged.predicted[method][fraction].reshape(-1)
            note = ""
            if method != OURS:
                guess, note = guess * float(guess @ true / (guess @ guess)), ", scaled to fit"
            points = slice(0, MOST_POINTS)
            axis.scatter(
                guess[points].tolist(), true[points].tolist(), s=7, alpha=0.5, linewidths=0, color=COLOURS[method]
            )
            edge = 1.05 * float(torch.cat([guess, true]).abs().max())
            axis.plot([-edge, edge], [-edge, edge], color=charts.INK, linewidth=0.8, linestyle=":")
            axis.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal")
            axis.locator_params(nbins=5)
            score = judged.scores[method][fraction].mean
            axis.set_title(f"{method}: {fraction:.0%} dropped, score {score:.3f}", loc="left", fontsize=10)
            axis.set(xlabel=f"predicted change of loss{note}", ylabel="true change of loss")
    return fig


def examples(task: Task, rows: list[tuple[int, Tensor, Tensor, Tensor]], count: int) -> Figure:
    """One query per line: its picture, the most helpful training images, and the most harmful ones.

    rows: the query, its row of scores, and the two lists of training examples.
    """
    assert task.pictures is not None and task.query_pictures is not None
    columns = 2 * count + 3  # the query and, each behind an empty column, the helpful and the harmful ones
    widths = [1, GAP, *[1] * count, GAP, *[1] * count]
    fig, axes = charts.figure(
        0.95 * sum(widths), 1.4 * len(rows) + 0.5, len(rows), columns, squeeze=False, width_ratios=widths
    )
    for text, column, colour in (
        ("Test image", 0, charts.INK),
        ("The most helpful training images, and their scores", 2, charts.GOOD),
        ("The most harmful ones", count + 3, charts.BAD),
    ):
        place = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes[0, column].annotate(text, (0, 1), (0, 22), fontsize=10, fontweight="bold", color=colour, **place)
    for line, (query, scores, helpful, harmful) in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        _show(line[0], task.query_pictures[query], task.query_labels[query], charts.INK)
        for shown, first, colour in ((helpful, 2, charts.GOOD), (harmful, count + 3, charts.BAD)):
            for j, i in enumerate(shown[:count].tolist()):
                _show(line[first + j], task.pictures[i], task.labels[i], colour)
                line[first + j].text(
                    0.5, -0.04, f"{scores[i]:+.1e}", transform=line[first + j].transAxes, ha="center", va="top",
                    fontsize=6.5,
                )  # fmt: skip
    return fig


def _show(axis, image: Tensor, title: str, colour: str) -> None:
    charts.picture(axis, image, white=255)
    axis.set_title(title, fontsize=7.5, color=colour, pad=2)


def cut(text: str, width: int = 110) -> str:
    """A text on one line."""
    return textwrap.shorten(text.encode("unicode_escape").decode().replace("\\n", " ⏎ "), width, placeholder=" …")
