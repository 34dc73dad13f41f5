"""What `mgd bench peers` shows: a table in the terminal, and a Markdown table with a plot in the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgd.bench.peers.methods import PEERS
from mgd.ui import machine
from mgd.ui.charts import GOOD, INK, SOFT, figure, label
from mgd.ui.page import Table
from mgd.util.text import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNSUPPORTED = "mgd.bench.baselines.Unsupported: "  # of a peer that was left out, for the reason that follows
AGREE = 1e-2  # of float32 from float64, relative to the norm: see `mgd.bench.throughput`
BEGIN, END = "<!-- peers: only `make bench-peers` writes below -->", "<!-- peers: end -->"
CAPTION = (
    "trainings: processor time of a later call over that of plain eager training in the same process. first call: its "
    "processor time at T/2 steps, compilers included; mgd captures in a later one, when that pays. memory: growth of a "
    "fresh process at T steps. per step: what one more step adds, from T/2 to T. difference: from float64, the largest "
    "of all metaparameters, relative to its norm; in brackets those that have no gradient."
)


def title(found: dict[str, Any]) -> str:
    trained = found.get("training", {}).get("parameters", 0)
    return f"{found['workload']}, T = {found['steps']}, {trained:,} trained parameters"


def _worst(one: dict[str, Any]) -> float:
    """The largest difference; NaN if one is not a number, which JSON has as null."""
    values = list(one["difference"].values())
    return max(values) if values and all(value is not None and value == value for value in values) else float("nan")


def rows(found: dict[str, Any]) -> Table:
    lines = [["peer", "trainings", "first call", "memory", "per step", "difference"]]
    if "training" not in found:
        return [*lines, [found.get("error", "not measured"), *5 * [""]]]
    alone = found["training"]["seconds"]["median"]
    lines.append(["plain training", "1", f"{alone:.2f} s each", "", "", ""])
    for name, one in found["peers"].items():
        if "error" in one:
            lines.append([name, one["error"].removeprefix(UNSUPPORTED), *4 * [""]])
            continue
        (half, low), (whole, high) = sorted((int(steps), count) for steps, count in one["bytes"].items())
        worst = _worst(one)
        without = f" (no {', '.join(one['missing'])})" if one["missing"] else ""
        lines.append(
            [
                name,
                f"{one['seconds']['median'] / one.get('alone', alone):.2f}",
                f"{one['first_seconds']:.1f} s",
                format_bytes(max(0, high)),
                format_bytes(max(0, high - low) / (whole - half)),
                f"{worst:.0e}{without}" + ("" if worst <= AGREE else " WRONG"),
            ]
        )
    return lines


def disagreeing(results: Sequence[dict[str, Any]]) -> list[str]:
    """Which peers, on which workload, are far from float64, or not a number."""
    return [
        f"{name} on {found['workload']}"
        for found in results
        for name, one in found["peers"].items()
        if "error" not in one and not _worst(one) <= AGREE
    ]


def markdown(whole: dict[str, Any]) -> str:
    """One table: a row for a peer on a workload."""
    lines = [["workload", "peer", "trainings", "first call", "memory", "per step", "difference"]]
    lines.append(["---", "---", *4 * ["---:"], "---"])
    for found in whole["results"]:
        head = f"**{found['workload']}**, T = {found['steps']}"
        for name, *cells in rows(found)[1:]:
            if len(cells) == 5 and not any(cells[1:]) and name in PEERS:  # an error: where the difference stands
                cells = [*4 * [""], cells[0].replace("|", "\\|").replace("<", "&lt;")]
            lines.append([head, f"**{name}**" if name == "mgd" else name, *cells])
            head = ""
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") for cells in lines)


def plot(results: Sequence[dict[str, Any]]) -> Figure:
    """Left: time in plain trainings; right: memory. A group of bars for each workload."""
    places, names, values, heads, y = [], [], [], [], 0.0
    for found in results:
        y += 1.2
        heads.append((y - 0.9, f"{found['workload']}, T = {found['steps']}"))
        for name, one in found["peers"].items():
            if "error" not in one:
                places.append(y)
                names.append(name)
                values.append(
                    (
                        one["seconds"]["median"] / one.get("alone", found["training"]["seconds"]["median"]),
                        max(one["bytes"].values()),
                    )
                )
                y += 1.0
    fig, (left, right) = figure(10, 0.24 * y + 1.2, columns=2, sharey=True)
    over_the_line: dict[str, Any] = {
        "va": "center", "fontsize": 8, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}
    }  # fmt: skip
    colours = [GOOD if name == "mgd" else SOFT for name in names]
    for axes, heights, text in (
        (left, [ratio for ratio, _ in values], "{:.2f}"),
        (right, [count / 1e6 for _, count in values], "{:,.0f}"),
    ):
        axes.barh(places, heights, color=colours)
        for place, height in zip(places, heights, strict=True):
            axes.text(height, place, " " + text.format(height), **over_the_line)
        axes.tick_params(axis="y", length=0)
    left.axvline(1, color=INK, linestyle=":", linewidth=1)
    left.set_yticks(places, names, fontsize=8)
    left.set_ylim(y - 0.3, -0.2)
    label(left, "Time of one metagradient", "times plain training (dotted)")
    label(right, "Memory", "MB that a process grows by")
    for place, text in heads:
        left.text(0, place, text, fontweight="bold", transform=left.get_yaxis_transform(), **over_the_line)
    return fig


def enter(page: Path, whole: dict[str, Any]) -> None:
    """Put table and plot between the two marks of a Markdown page; the plot is a PNG beside it."""
    text = page.read_text("utf-8")
    plot(whole["results"]).savefig(page.with_suffix(".png"))
    versions = ", ".join(f"{name} {version}" for name, version in whole["versions"].items())
    peers = "\n".join(f"- `{name}`: {peer.what}." for name, peer in PEERS.items())
    body = "\n\n".join(
        [
            f"{machine.describe(whole['machine'])}. {versions}. Processor time, one thread.",
            peers,
            f"![Time and memory of every peer]({page.stem}.png)",
            markdown(whole),
            CAPTION[0].upper() + CAPTION[1:],
        ]
    )
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(f"{text[:start]}\n\n{body}\n\n{text[end:]}", "utf-8")
