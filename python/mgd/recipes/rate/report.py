"""The recipe `rate` as tables and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mgd.recipes.rate.data import CORRUPTIONS, readable
from mgd.recipes.rate.models import LN2
from mgd.recipes.rate.recipe import Found
from mgd.recipes.rate.selection import EVERYTHING, RATER
from mgd.ui import charts
from mgd.ui.page import Page, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOAL = 0.7  # of the steps on everything
COLOURS = ("#1b7f79", "#3d6fb6", "#8a5fb0", "#d08a2e", "#c8453b", "#5a6272", "#7aa63c")
SHOWN = 6  # passages of the highest and of the lowest rating


def page(found: Found) -> Page:
    tables = [
        ("Ratings of domains, and what a training on each alone teaches about the target", domains(found)),
        ("Do ratings tell clean from corrupted passages of one domain? (area under the ROC curve)", detection(found)),
        (f"Fresh models, trained on {share(found)} of the pool", selection(found)),
        ("Where the time of learning to rate went", cost(found)),
    ]
    return Page("Which text is worth training on?", lead(found), tables, lambda: sections(found), verdict(found))


def lead(found: Found) -> str:
    s = found.settings
    return (
        f"A pool of {s.each * len(found.domains):,} passages of {s.context} bytes, from {', '.join(found.domains)}; a "
        f"quarter of each text's passages is corrupted. A rater was trained for {s.meta_steps:,} meta-steps by "
        f"metagradients through windows of {s.window} steps of {s.population} small GPTs, so that their loss on "
        f"held-out text of {found.target} falls. It saw no label of any kind."
    )


def verdict(found: Found) -> str:
    agree, pairs = found.agreeing_pairs
    needed = found.selection.needed_on_average(RATER)
    reached = "never" if needed is None else f"{needed:.0%} of the steps"
    return (
        f"Of {pairs} pairs of domains, {agree} are rated in the order of what training on them alone teaches; "
        f"corrupted passages of {found.target} are found with an AUC of {found.auc[found.target]['all']:.2f}; a model "
        f"trained on the best rated {share(found)} is as good as the one trained on everything after: {reached}."
    )


def share(found: Found) -> str:
    """The share of the pool that is kept, say 25% or 12.5%."""
    return f"{100 * found.selection.keep:g}%"


def domains(found: Found) -> Table:
    means = found.mean_ratings()
    rows = [["domain", "mean rating", "test loss after training\non it alone (bits/byte)"]]
    return rows + [[d, f"{means[d]:+.2f}", f"{found.transfer[d]:.3f}"] for d in best_first(found)]


def best_first(found: Found) -> list[str]:
    """The domains in the order of tables and pictures: the best rated one first."""
    means = found.mean_ratings()
    return sorted(found.domains, key=lambda domain: -means[domain])


def _coloured(found: Found) -> list[tuple[str, str]]:
    """Every domain with its colour."""
    return list(zip(best_first(found), COLOURS, strict=False))


def detection(found: Found) -> Table:
    rows = [["domain", *CORRUPTIONS, "all"]]
    kinds = (*CORRUPTIONS, "all")
    return rows + [[d, *(f"{found.auc[d][kind]:.2f}" for kind in kinds)] for d in best_first(found) if d in found.auc]


def selection(found: Found) -> Table:
    rows = [
        [
            "trained on",
            "final test loss\n(bits/byte)",
            "steps to what everything\nreaches in the end",
            f"of it {found.target}",
            "corrupted",
        ]
    ]
    for name, kept in found.selection.ways.items():
        needed = ["never" if share is None else f"{share:.0%}" for share in found.selection.needed(name)]
        target = kept.composition[found.target]
        rows.append([name, f"{kept.final:.3f}", ", ".join(needed), f"{target:.0%}", f"{kept.corrupted:.0%}"])
    return rows


def cost(found: Found) -> Table:
    total = sum(found.seconds.values())
    rows = [["", "seconds", "share"]]
    rows += [
        [kind, f"{seconds:.1f}", f"{seconds / total:.1%}"]
        for kind, seconds in sorted(found.seconds.items(), key=lambda x: -x[1])
    ]
    windows = sum(len(step.values) for step in found.history)
    return [*rows, [f"all, {windows:,} windows", f"{total:.1f}", f"{1e3 * total / windows:.0f} ms per window"]]


def sections(found: Found) -> list[Section]:
    s, (agree, pairs) = found.settings, found.agreeing_pairs
    return [
        Section(
            "Ratings by domain",
            "Of passages that the rater never saw, from a part of each text that is not in the pool. The wide part of "
            "a shape is where most passages are; the bar is the median.",
            violins(found),
            "ratings",
            domains(found),
        ),
        Section(
            "Rating and transfer",
            "A small model was trained on each domain alone, and judged by test text of the target. Of "
            f"{pairs} pairs of domains, {agree} have the better rating where that loss is lower.",
            scatter(found),
            "transfer",
        ),
        Section(
            "How ratings were learned",
            "Mean rating of the clean passages of each domain, above; below, the held-out loss of the inner models "
            "after each window, which jumps where one is made anew.",
            course(found),
            "course",
        ),
        Section(
            "Corrupted passages",
            "Half of the judged passages of each text had 20 to 50% of their characters shuffled, left out or "
            "replaced. 0.5 is chance.",
            table=detection(found),
        ),
        Section(
            "Training on what is kept",
            f"Fresh models, {s.steps} steps each, {s.repeats} seeds, on the best {share(found)} of the "
            "pool by each measure. One perplexity filter is a model trained on the pool, the other one trained on the "
            "target's held-out text: it is given what the rater has to discover." + _choice(found),
            curves(found),
            "selection",
            selection(found),
        ),
        Section("The best rated passages", "", table=extremes(found, best=True)),
        Section("The worst rated passages", "", table=extremes(found, best=False)),
        Section(
            "What it cost",
            "Seconds of learning to rate. The first window traces the second derivatives; scoring is the rater, "
            "forward and backward.",
            table=cost(found),
        ),
    ]


def _choice(found: Found) -> str:
    """How the share was chosen, if there was a choice."""
    losses = found.selection.shares
    told = ", ".join(f"{loss:.3f} with {share:.1%}" for share, loss in losses.items())
    return f" The share was chosen by the held-out loss that the best rated lead to: {told}." if losses else ""


def violins(found: Found) -> Figure:
    fig, axis = charts.figure(8, 4)
    names, data, colours = [], [], []
    for domain, colour in _coloured(found):
        for clean in (True, False):
            mask = found.evaluated.where(domain, clean)
            if bool(mask.any()):
                names.append(domain if clean else "corrupted")
                data.append(found.ratings[mask].tolist())
                colours.append(colour if clean else charts.SOFT)
    shapes = axis.violinplot(data, showmedians=True, widths=0.85)
    for body, colour in zip(shapes["bodies"], colours, strict=True):
        body.set(facecolor=colour, alpha=0.75)
    for part in ("cmedians", "cbars", "cmins", "cmaxes"):
        shapes[part].set(color=charts.INK, linewidth=0.8)
    axis.set_xticks(range(1, len(names) + 1), names, rotation=30, ha="right")
    charts.label(axis, "Ratings of passages by domain, clean and corrupted", y="rating")
    return fig


def scatter(found: Found) -> Figure:
    fig, axis = charts.figure(6, 4)
    for domain, colour in _coloured(found):
        ratings = found.ratings[found.evaluated.where(domain, clean=True)]
        x, y, spread = found.transfer[domain], float(ratings.mean()), float(ratings.std())
        axis.errorbar(x, y, yerr=spread, marker="o", color=colour, capsize=3, linestyle="none")
        axis.annotate(domain, (x, y), xytext=(7, 5), textcoords="offset points", fontsize=9)
    axis.margins(x=0.18)
    x_label = "test loss after training on this domain alone (bits per byte)"
    charts.label(axis, "What teaches the target is rated high", x_label, "rating, mean ± deviation")
    return fig


def course(found: Found) -> Figure:
    fig, (above, below) = charts.figure(8, 6, rows=2, sharex=True, height_ratios=[1.5, 1])
    steps = list(found.course)
    for domain, colour in _coloured(found):
        above.plot(
            [0, *steps], [0.0, *(found.course[k][domain] for k in steps)], color=colour, label=domain, marker="."
        )
    above.legend(frameon=False, fontsize=9, ncols=3)
    charts.label(above, "Ratings while they are learned", y="mean rating")
    for i in range(found.settings.population):
        values = [float("nan") if (value := s.values[i]) is None else value / LN2 for s in found.history]
        below.plot([s.step for s in found.history], values, linewidth=0.7, alpha=0.8, label=f"inner model {i + 1}")
    below.legend(frameon=False, fontsize=9, ncols=3)
    below.set(xlabel="meta-step", ylabel="held-out loss\n(bits per byte)")
    return fig


def curves(found: Found) -> Figure:
    fig, axis = charts.figure(8, 4.6)
    s = found.selection
    colours = dict(zip(s.ways, (charts.INK, charts.SOFT, "#d08a2e", "#3d6fb6", charts.GOOD), strict=True))
    for name, kept in s.ways.items():
        mean = kept.mean_curve()
        axis.plot(mean.steps, mean.losses, color=colours[name], label=name, linewidth=2 if name == RATER else 1.2)
        lows, highs = ([f(c.losses[k] for c in kept.curves) for k in range(len(mean.steps))] for f in (min, max))
        axis.fill_between(mean.steps, lows, highs, color=colours[name], alpha=0.15, linewidth=0)
    goal = s.ways[EVERYTHING].final
    axis.axhline(goal, color=charts.INK, linewidth=0.8, linestyle=":")
    axis.axvline(GOAL * s.steps, color=charts.INK, linewidth=0.8, linestyle="--")
    axis.set_ylim(top=min(axis.get_ylim()[1], goal + 1.5))
    where = {"transform": axis.get_xaxis_transform(), "fontsize": 9}
    axis.text(GOAL * s.steps, 0.02, f" {GOAL:.0%} of the steps", va="bottom", **where)
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    charts.label(axis, f"Fresh models on {share(found)} of the pool", "training step", "test loss (bits per byte)")
    return fig


def extremes(found: Found, best: bool) -> Table:
    order = found.ratings.argsort(descending=best)[:SHOWN]
    rows = [["passage", "rating", "from"]]
    for i in order.tolist():
        rows.append([readable(found.evaluated.tokens[i]), f"{float(found.ratings[i]):+.2f}", found.evaluated.name(i)])
    return rows
