"""What the selection shows: tables for terminal and page, and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgd import plots
from mgd.plots import BAD, GOOD, INK, SOFT
from mgd.recipes.form import Page, Table
from mgd.recipes.select.images import KINDS, by_kind
from mgd.recipes.select.run import ALL, HELD, LOSS, LOSS_HELD, RANDOM, SELECTED, TRUTH, Found

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"clean": GOOD, "wrong": BAD, "duplicate": "#d99a2b", "irrelevant": SOFT}
LINES = {ALL: (BAD, "-"), RANDOM: (SOFT, "--"), LOSS: ("#d99a2b", "--"), LOSS_HELD: ("#d99a2b", "-"), HELD: (INK, ":")}


def page(found: Found) -> Page:
    tables = [("What a training on each choice reaches", comparison(found)), ("What was kept", kept(found))]
    gains = ", ".join(
        f"{found.gain(name) * 100:+.1f} points over {name}" for name in (ALL, RANDOM, LOSS, LOSS_HELD, HELD)
    )
    return Page("Which images to train on?", lead(found), tables, lambda: _sections(found), f"Selected: {gains}.")


def lead(found: Found) -> str:
    s, pool, choice = found.settings, found.pool, found.choices[SELECTED]
    numbers = {name: int((pool.kind == i).sum()) for i, name in enumerate(KINDS)}
    other = "another" if s.uniform else "a similar"
    return (
        f"{pool.images.name}: a pool of {s.pool:,} images, of which {numbers['wrong']:,} have the label of {other} "
        f"class, {numbers['duplicate']:,} are copies of a few others and {numbers['irrelevant']:,} show noise; a "
        f"network of one hidden layer, {s.steps} steps of AdamW whatever is kept. After {s.meta_steps} trainings, each "
        f"with the metagradient of the loss on {len(pool.held_out):,} held-out images with respect to how often each "
        f"image is used, {choice.examples:,} images are kept. {choice.precision:.0%} of them are images of the task "
        f"with a true label ({pool.good.double().mean():.0%} of the pool)."
    )


def comparison(found: Found) -> Table:
    rows = [["trained on", "images", "true labels", "test accuracy"]]
    for name, c in found.choices.items():
        precision = "-" if c.precision is None else f"{c.precision:.0%}"
        rows.append([name, f"{c.examples:,}", precision, f"{c.accuracy:.1%} ± {c.spread * 100:.1f}"])
    return rows


def kept(found: Found) -> Table:
    counts = by_kind(found.pool, found.selection.counts)
    highest = len(counts[KINDS[0]])
    rows = [["kind", "in the pool", "dropped", *(f"used {times}×" for times in range(1, highest))]]
    for name, numbers in counts.items():
        total = max(1, sum(numbers))
        rows.append([name, f"{sum(numbers):,}", *(f"{number:,} ({number / total:.0%})" for number in numbers)])
    return rows


def _sections(found: Found) -> list[plots.Section]:
    s = found.settings
    notes = "\n\n".join(found.selection.descent.notes)
    return [
        plots.Section(
            "Accuracy against meta-step",
            f"Each meta-step trains on the counts so far and changes a share of {s.share:.0%} of them. The selection "
            f"is that of the lowest held-out loss (dot). Lines: other choices, means of {s.repeats} trainings with "
            "initial parameters and orders that the selection did not see. Filters keep the images of lowest loss, as "
            f"many as suit the held-out images best. Judged by {len(found.pool.test):,} test images that nothing else "
            "looks at." + (f"\n\n{notes}" if notes else ""),
            accuracy(found),
            "accuracy",
            comparison(found),
        ),
        plots.Section(
            "What is kept, against meta-step",
            "Precision: the share of the kept images that belong to the task and carry a true label, copies among "
            "them. Recall: the share of such images that are kept.",
            precision(found),
            "precision",
        ),
        plots.Section("How often each kind is used", "", histogram(found), "counts", kept(found)),
        plots.Section(
            "Dropped",
            "Drawn at random from the dropped images. In red, in quotation marks: a label that is not the true one.",
            _gallery(found, found.selection.counts == 0, "Dropped: the label in the pool, and what it is."),
            "dropped",
        ),
        plots.Section(
            "Kept",
            "Drawn at random from the images with the highest count.",
            _gallery(found, found.selection.counts == found.selection.counts.max(), "Kept, with the highest count."),
            "kept",
        ),
    ]


def accuracy(found: Found) -> Figure:
    """Test accuracy by meta-step, with the other choices as lines."""
    fig, axes = plots.figure(9, 4.6)
    values = [100 * step["test_accuracy"] for step in found.trace]
    best, choice = found.selection.descent.best_step, found.choices[SELECTED]
    axes.plot(values, color=GOOD, linewidth=1.6, label="by metagradients, one training")
    axes.errorbar(
        [best],
        [100 * choice.accuracy],
        [100 * choice.spread],
        color=GOOD,
        marker="o",
        capsize=3,
        label=f"{SELECTED}, mean",
    )
    for name, (colour, style) in LINES.items():
        c = found.choices[name]
        axes.axhline(100 * c.accuracy, color=colour, linestyle=style, linewidth=1.2, label=name)
        axes.axhspan(
            100 * (c.accuracy - c.spread), 100 * (c.accuracy + c.spread), color=colour, alpha=0.08, linewidth=0
        )
    axes.axhline(100 * found.choices[TRUTH].accuracy, color=GOOD, linestyle=":", linewidth=1.2, label=TRUTH)
    axes.set(xlabel="meta-step (trainings with a metagradient)", ylabel="test accuracy (%)")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def precision(found: Found) -> Figure:
    """Precision and recall of the kept images, and their number, by meta-step."""
    fig, (left, right) = plots.figure(10, 3.8, columns=2)
    left.plot([100 * step["precision"] for step in found.trace], color=GOOD, label="precision")
    left.plot([100 * step["recall"] for step in found.trace], color=INK, label="recall")
    left.axhline(
        100 * float(found.pool.good.double().mean()), color=SOFT, linestyle="--", label="precision of the pool"
    )
    left.set(xlabel="meta-step", ylabel="share (%)", ylim=(0, 102))
    left.legend(frameon=False, loc="lower left")
    right.plot([step["examples"] for step in found.trace], color=INK, label="images kept")
    right.plot([step["total"] for step in found.trace], color=SOFT, label="sum of their counts")
    right.set(xlabel="meta-step", ylabel="images")
    right.set_ylim(bottom=0)
    right.legend(frameon=False, loc="lower left")
    return fig


def histogram(found: Found) -> Figure:
    """For every kind, the share of its images that has each count."""
    counts = by_kind(found.pool, found.selection.counts)
    fig, axes = plots.figure(8, 3.8)
    width = 0.8 / len(counts)
    for i, (name, numbers) in enumerate(counts.items()):
        places = [times + (i - (len(counts) - 1) / 2) * width for times in range(len(numbers))]
        shares = [100 * number / max(1, sum(numbers)) for number in numbers]
        axes.bar(places, shares, width, color=COLOURS[name], label=f"{name} ({sum(numbers):,} images)")
    axes.set(xlabel="final count (0: dropped)", ylabel="images of the kind (%)", xticks=range(len(counts[KINDS[0]])))
    axes.legend(frameon=False)
    return fig


def _gallery(found: Found, mask: Tensor, title: str) -> Figure | None:
    some = mask.nonzero()[:, 0]
    if len(some) == 0:
        return None
    some = some[torch.randperm(len(some), generator=torch.Generator().manual_seed(found.settings.seed))[:24]]
    pool, irrelevant = found.pool, KINDS.index("irrelevant")
    classes = pool.images.classes
    given = [classes[label] for label in pool.images.labels[some].tolist()]
    true = [
        "noise" if kind == irrelevant else classes[label]
        for kind, label in zip(pool.kind[some].tolist(), pool.truth[some].tolist(), strict=True)
    ]
    return plots.gallery(title, pool.images.images[some], given, true)
