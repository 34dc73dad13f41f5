"""What the selection shows: tables for terminal and page, and pictures."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgd.recipes.select.run import ALL, RANDOM, SELECTED, Found, names
from mgd.ui import charts
from mgd.ui.charts import BAD, GOOD, INK, SOFT
from mgd.ui.page import Page, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (GOOD, BAD, "#d99a2b", SOFT)  # of the kinds


def page(found: Found) -> Page:
    title = found.setting.title
    tables = [("What a training on each choice reaches", comparison(found)), ("What was kept", kept(found))]
    by_pool, by_held, held, _ = names(found.setting)
    others = (ALL, RANDOM, by_pool, by_held, held)
    gains = ", ".join(f"{found.gain(name) * 100:+.1f} points over {name}" for name in others)
    return Page(title, lead(found), tables, lambda: _sections(found), f"Selected: {gains}.")


def lead(found: Found) -> str:
    setting, choice = found.setting, found.choices[SELECTED]
    s = setting.settings
    return (
        f"{setting.lead()} {s.steps} steps of AdamW whatever is kept. After {s.meta_steps} trainings, each with the "
        f"metagradient of the held-out loss with respect to how often each candidate is used, {choice.examples:,} "
        f"{setting.examples} are kept. {choice.precision:.0%} of them are {setting.examples} of the task with "
        f"{setting.truths} ({setting.good.double().mean():.0%} of the pool)."
    )


def comparison(found: Found) -> Table:
    setting = found.setting
    rows = [["trained on", setting.examples, setting.truths, *setting.measures]]
    for name, c in found.choices.items():
        precision = "-" if c.precision is None else f"{c.precision:.0%}"
        further = [f"{mean(values):.1%}" for values in c.further.values()]
        rows.append([name, f"{c.examples:,}", precision, f"{c.accuracy:.1%} ± {c.spread * 100:.1f}", *further])
    return rows


def kept(found: Found) -> Table:
    counts = found.setting.by_kind(found.selection.counts)
    highest = len(next(iter(counts.values())))
    rows = [["kind", "in the pool", "dropped", *(f"used {times}×" for times in range(1, highest))]]
    for name, numbers in counts.items():
        total = max(1, sum(numbers))
        rows.append([name, f"{sum(numbers):,}", *(f"{number:,} ({number / total:.0%})" for number in numbers)])
    return rows


def _sections(found: Found) -> list[Section]:
    setting, s = found.setting, found.setting.settings
    examples, measure = setting.examples, setting.measures[0]
    dropped, keeps = found.selection.counts == 0, found.selection.counts == found.selection.counts.max()
    notes = "\n\n".join(found.selection.descent.notes)
    return [
        Section(
            f"{measure[0].upper()}{measure[1:]} against meta-step",
            f"Each meta-step trains on the counts so far and changes a share of {s.share:.0%} of them. The selection "
            f"is that of the lowest held-out loss (dot). Lines: other choices, means of {s.repeats} trainings with "
            f"initial parameters and orders that the selection did not see. Filters keep the {examples} of "
            f"{setting.filtered}, as many as suit the held-out {examples} best. Judged by test {examples} that nothing "
            "else looks at." + (f"\n\n{notes}" if notes else ""),
            accuracy(found),
            "accuracy",
            comparison(found),
        ),
        Section(
            "What is kept, against meta-step",
            f"Precision: the share of the kept {examples} that belong to the task and have {setting.truths}. Recall: "
            f"the share of such {examples} that are kept.",
            precision(found),
            "precision",
        ),
        Section("How often each kind is used", "", histogram(found), "counts", kept(found)),
        _gallery(found, dropped, "Dropped", "dropped", f"Drawn at random from the dropped {examples}."),
        _gallery(found, keeps, "Kept", "kept", f"Drawn at random from the {examples} with the highest count."),
    ]


def accuracy(found: Found) -> Figure:
    """Test accuracy by meta-step, with the other choices as lines."""
    fig, axes = charts.figure(9, 4.6)
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
    by_pool, by_held, held, truth = names(found.setting)
    lines = {
        ALL: (BAD, "-"),
        RANDOM: (SOFT, "--"),
        by_pool: ("#d99a2b", "--"),
        by_held: ("#d99a2b", "-"),
        held: (INK, ":"),
    }
    for name, (colour, style) in lines.items():
        c = found.choices[name]
        axes.axhline(100 * c.accuracy, color=colour, linestyle=style, linewidth=1.2, label=name)
        axes.axhspan(
            100 * (c.accuracy - c.spread), 100 * (c.accuracy + c.spread), color=colour, alpha=0.08, linewidth=0
        )
    axes.axhline(100 * found.choices[truth].accuracy, color=GOOD, linestyle=":", linewidth=1.2, label=truth)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="meta-step (trainings with a metagradient)", ylabel=f"{found.setting.measures[0]} (%)")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def precision(found: Found) -> Figure:
    """Precision and recall of the kept examples, and their number, by meta-step."""
    fig, (left, right) = charts.figure(10, 3.8, columns=2)
    left.plot([100 * step["precision"] for step in found.trace], color=GOOD, label="precision")
    left.plot([100 * step["recall"] for step in found.trace], color=INK, label="recall")
    left.axhline(
        100 * float(found.setting.good.double().mean()), color=SOFT, linestyle="--", label="precision of the pool"
    )
    left.set(xlabel="meta-step", ylabel="share (%)", ylim=(0, 102))
    left.legend(frameon=False, loc="lower left")
    right.plot([step["examples"] for step in found.trace], color=INK, label=f"{found.setting.examples} kept")
    right.plot([step["total"] for step in found.trace], color=SOFT, label="sum of their counts")
    right.set(xlabel="meta-step", ylabel=found.setting.examples)
    right.set_ylim(bottom=0)
    right.legend(frameon=False, loc="lower left")
    return fig


def histogram(found: Found) -> Figure:
    """For every kind, the share of its examples that has each count."""
    examples, counts = found.setting.examples, found.setting.by_kind(found.selection.counts)
    highest = max(len(numbers) for numbers in counts.values())
    fig, axes = charts.figure(8, 3.8)
    width = 0.8 / len(counts)
    for i, (name, numbers) in enumerate(counts.items()):
        places = [times + (i - (len(counts) - 1) / 2) * width for times in range(len(numbers))]
        shares = [100 * number / max(1, sum(numbers)) for number in numbers]
        axes.bar(places, shares, width, color=COLOURS[i], label=f"{name} ({sum(numbers):,} {examples})")
    axes.set(xlabel="final count (0: dropped)", ylabel=f"{examples} of the kind (%)", xticks=range(highest))
    axes.legend(frameon=False)
    return fig


def _gallery(found: Found, mask: Tensor, title: str, name: str, text: str) -> Section:
    """Some of the examples, and what they really are: a picture or a table, as the setting shows them."""
    some = mask.nonzero()[:, 0]
    if len(some) == 0:
        return Section(title, "None.")
    generator = torch.Generator().manual_seed(found.setting.settings.seed)
    some = some[torch.randperm(len(some), generator=generator)[:24]]
    figure, table = found.setting.show(some, f"{title}: what the pool says, and what it is.")
    return Section(
        title, f"{text} In red, in quotation marks: what is not true." if figure else text, figure, name, table
    )
