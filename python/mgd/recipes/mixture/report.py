"""What the mixtures show: shares, test losses, the paths of the descents, and which source helps which text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mgd.recipes.mixture.recipe import BY_SIZE, FORWARD, GRID, REVERSE, TARGETS, Found
from mgd.ui import charts
from mgd.ui.page import Page, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def page(found: Found) -> Page:
    return Page(
        "How much of each text?",
        lead(found),
        [("Mixtures, and what they are worth on test text", judging(found)), ("Shares", shares(found))],
        lambda: _sections(found),
        verdict(found),
    )


def lead(found: Found) -> str:
    s, target = found.settings, " and ".join(found.sources[:TARGETS])
    return (
        f"A GPT of one layer and width {s.width} learns bytes, {s.steps} steps of {s.batch} passages of "
        f"{s.context} bytes, from {len(found.sources)} sources. The target is {target}, of each of which there are "
        f"{s.few} passages; of the others {s.many:,}. Objective: bits per byte on the target's held-out text. A "
        f"metagradient costs {found.reverse:.2f} trainings, a forward sweep along all shares {found.forward:.2f}; "
        f"in {s.forward_steps} meta-steps by both, the shares differ by at most {found.agreement:.1e} of their length."
    )


def verdict(found: Found) -> str:
    ways = {name: found.judged[name].less for name in (REVERSE, GRID)}
    texts = []
    for name, less in ways.items():
        assert less is not None
        clear = less[1] > 0
        texts.append(
            f"the mixture of {'a metagradient descent' if name == REVERSE else 'the grid'} "
            f"{'has' if clear else 'does NOT clearly have'} fewer bits per byte than shares by size "
            f"({less[0]:+.3f}, 95% interval {less[1]:+.3f} to {less[2]:+.3f}; {found.spent[name]:.0f} trainings)"
        )
    return f"On test text, {'; '.join(texts)}."


def judging(found: Found) -> Table:
    rows = [["mixture", "trainings\nto find it", "held-out\nbits/byte", "test\nbits/byte", "less than\nby size", "±"]]
    for name, entry in found.judged.items():
        spent, held = found.spent.get(name), found.held_out.get(name)
        less = ["", ""] if entry.less is None else [f"{entry.less[0]:+.4f}", f"{entry.less[0] - entry.less[1]:.4f}"]
        rows.append(
            [
                name,
                "" if spent is None else f"{spent:.0f}",
                "" if held is None else f"{held:.4f}",
                f"{np.mean(entry.bits):.4f}",
                *less,
            ]
        )
    return rows


def shares(found: Found) -> Table:
    rows = [["mixture", *found.sources]]
    return rows + [[name, *(f"{x:.1%}" for x in mixture.tolist())] for name, mixture in found.mixtures.items()]


def effect(found: Found) -> Table:
    """Per hundredth of the batch more of a source, at the cost of all in equal parts."""
    change = 0.01 * (found.table - found.table.mean(0))
    rows = [["one percent more of", *found.sources]]
    return rows + [
        [name, *(f"{x:+.4f}" for x in row)] for name, row in zip(found.sources, change.tolist(), strict=True)
    ]


def _sections(found: Found) -> list[Section]:
    return [
        Section(
            "The paths of the shares",
            "From equal shares; every meta-step draws its batches anew. What counts is the mean over the last quarter.",
            paths(found),
            "shares",
            shares(found),
        ),
        Section(
            "What each mixture is worth",
            f"Bits per byte on the target's test text, after {found.settings.seeds} trainings from other initial "
            "weights with other batches. ± is half of a 95% interval over trainings, of the difference from shares by "
            "size in the same trainings.",
            tested(found),
            "test",
            judging(found),
        ),
        Section(
            "Which source helps which text?",
            "The change of every text's held-out bits per byte (columns) by one percent of the batch more of a source "
            "(rows), at equal shares. One forward sweep gives the whole table.",
            None,
            "",
            effect(found),
        ),
    ]


def paths(found: Found) -> Figure:
    fig, axes = charts.figure(9, 4.5)
    path = torch.stack(found.paths[REVERSE].shares)
    ahead = torch.stack(found.paths[FORWARD].shares)
    for k, name in enumerate(found.sources):
        (line,) = axes.plot(path[:, k].tolist(), linewidth=2, label=name)
        axes.plot(ahead[:, k].tolist(), ".", color=line.get_color(), markersize=5)
    axes.legend(frameon=False, fontsize=8)
    charts.label(axes, "Shares: by metagradients (lines) and by forward mode (dots)", "meta-step", "share")
    return fig


def tested(found: Found) -> Figure:
    fig, axes = charts.figure(8, 0.5 * len(found.judged) + 1.2)
    for i, (name, entry) in enumerate(found.judged.items()):
        colour = charts.BAD if name == BY_SIZE else charts.GOOD
        axes.plot(entry.bits, [i] * len(entry.bits), "o", mfc="none", mec=colour, alpha=0.6, markersize=5)
        axes.plot(np.mean(entry.bits), i, "|", color=colour, markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(found.judged)), list(found.judged))
    axes.invert_yaxis()
    charts.label(axes, "", "bits per byte on test text", "")
    return fig
