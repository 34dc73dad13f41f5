"""What the search for a learning-rate schedule shows: tables, the schedules, and the searches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mgd.recipes.intervals import Interval
from mgd.recipes.lr_schedule.recipe import DESCENT, GRID, START, Found
from mgd.ui import charts
from mgd.ui.page import Page, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {DESCENT: charts.BAD, GRID: charts.INK, "random search": charts.SOFT, "TPE": "#3f6fb5", "CMA-ES": charts.GOOD}


def page(found: Found) -> Page:
    tables = [
        ("Searching: held-out loss against trainings spent", searching(found)),
        ("Judging: the best schedules on test images", judging(found)),
    ]
    return Page(
        "A learning-rate schedule by metagradients", lead(found), tables, lambda: _sections(found), verdict(found)
    )


def lead(found: Found) -> str:
    s, task = found.settings, found.task
    return (
        f"{task.name}: a ResNet-9-style network of {found.parameters:,} parameters, {s.steps} steps of AdamW with "
        f"{s.batch} of {len(task.train):,} training images each. From a flat learning rate of {s.start:g}, "
        f"{s.meta_steps} metagradients move {s.knots} knots of the schedule so that the loss on "
        f"{len(task.held_out):,} held-out images falls. A metagradient costs {found.ratio:.2f} trainings "
        f"({found.training_seconds:.2f} s each, measured)"
        + (f", the first {found.trace:.1f} more for its trace" if found.trace >= 0.05 else "")
        + f"; the searches without gradients train {s.budget} times each."
    )


def verdict(found: Found) -> str:
    record, judged = found.searches[DESCENT], found.judged
    if found.early is None:
        return (
            f"The descent did not reach the held-out loss of the grid's best, {found.searches[GRID].lowest:.4f}; "
            f"its own best is {record.lowest:.4f}."
        )
    elsewhere = judged[DESCENT].elsewhere
    return (
        f"The descent was as good as the best of the grid at meta-step {found.early}, after "
        f"{record.spent[found.early]:.0f} trainings of work: {found.fraction:.0%} of the grid's. On test images "
        f"its final schedule is {_comparison(judged[DESCENT].here)}: {judged[DESCENT].loss[0]:.4f} against "
        f"{judged[GRID].loss[0]:.4f} ({_words(judged[DESCENT].here)})"
        + (
            "."
            if elsewhere is None
            else f"; after other trainings it is {_comparison(elsewhere)} ({_words(elsewhere)})."
        )
    )


def _comparison(difference: Interval | None) -> str:
    """What the 95% interval of a loss, less the grid's, allows to say."""
    if difference is None or difference[1] <= 0 <= difference[2]:
        return "not clearly better or worse"
    return "better" if difference[2] < 0 else "worse"


def budgets(found: Found) -> list[int]:
    """Where the searches are compared: quarters of their budget."""
    return [max(1, round(part * found.settings.budget)) for part in (0.125, 0.25, 0.5, 1.0)]


def searching(found: Found) -> Table:
    columns = budgets(found)
    grid = found.searches[GRID].lowest
    rows = [["best held-out loss after trainings:", *map(str, columns), "as good as\nthe grid after", "diverged"]]
    for name, record in found.searches.items():
        first = record.first_at(grid)
        lowest = [record.lowest_within(budget) for budget in columns]
        rows.append(
            [
                name,
                *(f"{value:.4f}" if math.isfinite(value) else "-" for value in lowest),
                "never" if first is None else f"{record.spent[first]:.0f}",
                str(sum(not math.isfinite(value) for value in record.values)),
            ]
        )
    return rows


def judging(found: Found) -> Table:
    rows = [["test images", "loss", "accuracy", "loss, less\nthe grid's", "the same, other\ntrainings"]]
    for name, judged in found.judged.items():
        rows.append(
            [name, f"{judged.loss[0]:.4f}", f"{judged.accuracy[0]:.1%}", _words(judged.here), _words(judged.elsewhere)]
        )
    return rows


def _words(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    mean, low, high = interval
    return f"{mean:+.4f} ±{(high - low) / 2:.4f}"


def _sections(found: Found) -> list[Section]:
    s = found.settings
    return [
        Section(
            "The search",
            "The lowest held-out loss that each method has found, against the work it has spent, in trainings. A "
            f"metagradient counts as {found.ratio:.2f} trainings, as measured. All methods call the same function. "
            "Grid, random search and TPE choose among one-cycle, linear and cosine schedules by peak, start and end; "
            "CMA-ES moves the same knots as the descent, from the same start. The grid has an order and no strategy: "
            "its curve shows when its best point came.",
            curves(found),
            "search",
            searching(found),
        ),
        Section("The schedules", "The best schedule of each method.", rates(found), "schedules"),
        Section(
            "On test images",
            f"{len(found.task.test):,} images that no search has seen. The first columns are of the training that the "
            "schedules were sought on; the last column is the mean over "
            f"{s.seeds} trainings from other initial weights with the images in another order, on which nothing was "
            "sought. ± is half of a 95% interval: over test images for the one training, over trainings for "
            "the others.",
            tested(found),
            "test",
            judging(found),
        ),
    ]


def curves(found: Found) -> Figure:
    fig, axes = charts.figure(8, 4.5)
    for name, record in found.searches.items():
        values = np.minimum.accumulate(record.values)
        descent = name == DESCENT
        axes.step(
            record.spent, values, where="post", color=COLOURS[name], linewidth=2.4 if descent else 1.5, label=name
        )
        axes.plot([record.spent[-1]], [values[-1]], "o", color=COLOURS[name], markersize=5 if descent else 3)
    start = found.searches[DESCENT].values[0]
    low = min(record.lowest for record in found.searches.values())
    axes.axhline(start, color=charts.SOFT, linewidth=0.8, linestyle=":")
    axes.annotate("flat, the start", (1, start), (0, 3), "data", "offset points", fontsize=8, color=charts.SOFT)
    axes.set(ylim=(low - 0.08 * (start - low), start + 0.35 * (start - low)), xlim=(0, None))
    axes.legend(frameon=False)
    charts.label(axes, "Held-out loss against work", "work spent (trainings)", "lowest held-out loss so far (nats)")
    return fig


def rates(found: Found) -> Figure:
    fig, axes = charts.figure(8, 4.5)
    for name, schedule in found.schedules.items():
        early = name not in COLOURS and name != START
        style = {"color": COLOURS.get(name, charts.BAD if early else charts.SOFT), "linestyle": "-"}
        if name not in COLOURS:
            style["linestyle"] = "--" if early else ":"
        axes.plot(schedule.tolist(), linewidth=2.4 if name == DESCENT else 1.3, label=name, **style)
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    charts.label(axes, "Learning rates found", "training step", "learning rate of AdamW (logarithmic)")
    return fig


def tested(found: Found) -> Figure:
    """Test loss and accuracy of every schedule: of the training sought on, filled, and of the others, open."""
    fig, axes = charts.figure(10, 0.5 * len(found.judged) + 1.6, columns=2, sharey=True)
    names = list(found.judged)
    for axis, field, label in zip(axes, ("loss", "accuracy"), ("test loss (nats)", "test accuracy"), strict=True):
        for i, name in enumerate(names):
            values = getattr(found.judged[name], field)
            colour = COLOURS.get(name, charts.BAD if name != START else charts.SOFT)
            axis.plot(values[1:], [i] * (len(values) - 1), "o", mfc="none", mec=colour, alpha=0.6, markersize=5)
            axis.plot(np.mean(values[1:]), i, "|", color=colour, markersize=16, markeredgewidth=2)
            axis.plot(values[0], i, "D", color=colour, markersize=7)
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", color="#e3e6ec")
        charts.label(axis, "", label, "")
    axes[0].invert_yaxis()
    axes[0].set_title("◆ the training sought on   ○ other trainings   | their mean", loc="left", fontsize=9)
    return fig
