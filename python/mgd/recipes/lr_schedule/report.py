"""What the search for a learning-rate schedule shows: a table, the schedules, and what they are worth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mgd.recipes.intervals import Interval
from mgd.recipes.lr_schedule.recipe import CMA, DESCENT, GRID, HALF, START, TOLD, TPE, Found
from mgd.ui import charts
from mgd.ui.page import Page, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    START: charts.SOFT,
    DESCENT: charts.BAD,
    GRID: charts.INK,
    TPE: "#3f6fb5",
    TOLD: "#8a5bb0",
    CMA: charts.GOOD,
}


def page(found: Found) -> Page:
    tables = [("Test images, after trainings that no method has seen", judging(found))]
    return Page(
        "A learning-rate schedule by metagradients", lead(found), tables, lambda: _sections(found), verdict(found)
    )


def lead(found: Found) -> str:
    s, task = found.settings, found.task
    numbers = "the rate of every step" if s.knots == s.steps else f"{s.knots} knots of the schedule"
    noisy = int(found.noisy.sum())
    return (
        f"{task.name}: a perceptron of {found.parameters:,} parameters, {s.steps} steps of SGD with {s.batch} of "
        f"{len(task.train):,} training images each"
        + (f"; in {noisy} of the steps {s.wrong:.0%} of the labels are drawn at random" if noisy else "")
        + f". From a flat learning rate of {s.start:g}, {s.meta_steps} metagradients move {numbers}, each of another "
        f"training, so that the loss on {len(task.held_out):,} held-out images falls. A metagradient costs "
        f"{found.ratio:.2f} trainings ({found.training_seconds:.2f} s each, measured)"
        + (f", the first {found.trace:.1f} more for its trace" if found.trace >= 0.05 else "")
        + f"; the searches without gradients train {s.budget} times each."
    )


def verdict(found: Found) -> str:
    """How the descent's schedule compares with the others'."""
    groups: dict[str, list[str]] = {"better than": [], "worse than": [], "not clearly better or worse than": []}
    for name in found.records:
        if name != DESCENT:
            groups[_comparison(found.judged[name].more)].append(name)
    said = [f"{words} {_listed(names)}" for words, names in groups.items() if names]
    return (
        f"After {found.settings.seeds} trainings that no method has seen, the schedule of the descent, found for "
        f"{found.records[DESCENT].spent[-1]:.0f} trainings of work, is {'; '.join(said)}, by the 95% intervals of the "
        "test loss."
    )


def _comparison(more: Interval | None) -> str:
    """What the 95% interval of a loss, less the descent's, says of the descent."""
    if more is None or more[1] <= 0 <= more[2]:
        return "not clearly better or worse than"
    return "better than" if more[1] > 0 else "worse than"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def judging(found: Found) -> Table:
    told = found.contrast(DESCENT) is not None
    rows = [["method", "cost", "loss,\nhalf way", "loss", "loss, less\nthe descent's"]]
    if told:
        rows[0].append("wrong\n/right")
    for name in (START, *found.records):
        judged, half, record = found.judged[name], found.judged.get(name + HALF), found.records.get(name)
        row = [
            name,
            f"{record.spent[-1]:.0f}" if record else "0",
            f"{half.mean:.4f}" if half else "-",
            f"{judged.mean:.4f}",
            _words(judged.more),
        ]
        rows.append([*row, f"{found.contrast(name):.2f}"] if told else row)
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
            "On test images",
            f"{len(found.task.test):,} images that no method has seen, after {s.seeds} trainings that none has seen. "
            "Cost is in trainings. ± is half of a 95% interval over trainings, of the difference to the descent's "
            "schedule after the same trainings. The grid takes each value from the same one training, TPE from the "
            "mean of the same "
            f"{s.trainings}; CMA-ES, which moves the same numbers as the descent from the same start, from a new "
            "training in each generation. Grid and TPE choose among one-cycle, linear and cosine schedules by peak, "
            "start and end."
            + (
                " TPE that is told which steps have wrong labels has one more number, by which it multiplies their "
                "rates. The last column has those rates in units of the others, by geometric means."
                if TOLD in found.records
                else ""
            ),
            tested(found),
            "test",
            judging(found),
        ),
        Section("The schedules", "The schedule that each method hands in.", rates(found), "schedules"),
        Section(
            "The descent",
            "The held-out loss of the training of each meta-step; the trainings differ, and so some of it is noise.",
            course(found),
            "descent",
        ),
    ]


def course(found: Found) -> Figure:
    fig, axes = charts.figure(8, 4)
    record = found.records[DESCENT]
    axes.plot(record.spent, record.values, "o-", color=COLOURS[DESCENT], markersize=3, linewidth=1)
    charts.label(axes, "Held-out loss against work", "work spent (trainings)", "held-out loss (nats)")
    return fig


def rates(found: Found) -> Figure:
    fig, axes = charts.figure(8, 4.5)
    for name in (START, *found.records):
        schedule = found.schedules[name].tolist()
        style = {"linewidth": 2.4 if name == DESCENT else 1.3, "linestyle": ":" if name == START else "-"}
        axes.plot(schedule, color=COLOURS[name], label=name, **style)
    for t in found.noisy.nonzero().flatten().tolist():
        axes.axvspan(t - 0.5, t + 0.5, color="#e3e6ec", linewidth=0)
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    title = "Learning rates found" + (" (grey: steps with wrong labels)" if bool(found.noisy.any()) else "")
    charts.label(axes, title, "training step", "learning rate of SGD (logarithmic)")
    return fig


def tested(found: Found) -> Figure:
    """Test loss and accuracy of every schedule, after each training, and their means."""
    names = [START, *found.records]
    fig, axes = charts.figure(10, 0.5 * len(names) + 1.6, columns=2, sharey=True)
    for axis, field, label in zip(axes, ("loss", "accuracy"), ("test loss (nats)", "test accuracy"), strict=True):
        for i, name in enumerate(names):
            values = [value for value in getattr(found.judged[name], field) if math.isfinite(value)]
            axis.plot(values, [i] * len(values), "o", mfc="none", mec=COLOURS[name], alpha=0.6, markersize=5)
            if values:
                axis.plot(np.mean(values), i, "|", color=COLOURS[name], markersize=16, markeredgewidth=2)
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", color="#e3e6ec")
        charts.label(axis, "", label, "")
    axes[0].invert_yaxis()
    axes[0].set_title("○ a training   | their mean", loc="left", fontsize=9)
    return fig
