"""Pictures of the benchmarks' results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mgd.ui.charts import BAD, GOOD, INK, SOFT, figure, label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinct also in grey: the phases in the order in which they come.
_PHASES = {
    "training": "#9aa3b2",
    "replay": "#c8453b",
    "rebuild": "#e3a857",
    "update": "#d9c78f",
    "store": "#6d5a8d",
    "objective": "#4d5566",
    "optimizer vjp": "#4f9fc9",
    "hvp": "#1b7f79",
}
_LINES = ["#1b7f79", "#c8453b", "#6d5a8d", "#4f9fc9", "#e3a857", "#4d5566", "#9aa3b2", "#1f2430"]


def throughput(results: Sequence[dict[str, Any]]) -> Figure:
    """Left: each method's time in plain trainings, with the 20% and 80% quantiles. Right: its peak memory."""
    bars = [(found, name, entry) for found in results for name, entry in found["methods"].items() if "ratio" in entry]
    places, labels, heads, y = [], [], [], 0.0
    for i, (found, name, entry) in enumerate(bars):
        if i == 0 or found is not bars[i - 1][0]:
            y += 1.2
            heads.append((y - 0.9, f"{found['case']}, {found['steps']} steps"))
        places.append(y)
        per = f", one of {entry['objectives']}" if entry["objectives"] > 1 else ""
        labels.append(("mgd " if entry["ours"] else "torch ") + name + per)
        y += 1.0
    fig, (left, right) = figure(11, 0.34 * y + 1.5, columns=2, sharey=True)
    colours = [GOOD if entry["ours"] else SOFT for *_, entry in bars]
    ratios = [entry["ratio"] for *_, entry in bars]
    middles = [r["median"] for r in ratios]
    spread = [[r["median"] - r["q20"] for r in ratios], [r["q80"] - r["median"] for r in ratios]]
    left.barh(places, middles, color=colours, xerr=spread, ecolor=INK, error_kw={"linewidth": 1})
    for place, value in zip(places, ratios, strict=True):
        left.text(value["q80"], place, f" {value['median']:.2f}", va="center", fontsize=8)
    left.axvline(1, color=INK, linestyle=":", linewidth=1)
    left.set_yticks(places, labels, fontsize=9)
    left.set_ylim(y - 0.3, -0.2)
    left.set_xlim(0, 1.15 * max(r["q80"] for r in ratios))
    label(left, "Time of one metagradient", "times plain training of the same steps (dotted)")
    known = [(p, c, entry) for p, c, (*_, entry) in zip(places, colours, bars, strict=True) if entry.get("peak_bytes")]
    if known:
        for place, colour, entry in known:
            guessed = "peak_extrapolated_from" in entry
            megabytes = entry["peak_bytes"] / 1e6
            right.barh(
                place,
                megabytes,
                color="none" if guessed else colour,
                edgecolor=colour,
                linestyle="--" if guessed else "-",
            )
            right.text(
                megabytes, place, f" {megabytes:,.0f}" + (" extrapolated" if guessed else ""), va="center", fontsize=8
            )
        right.set_xscale("log")
        sizes = [e["peak_bytes"] for *_, e in known] + [f["training"].get("peak_bytes") or 1e6 for f in results]
        right.set_xlim(max(1e5, min(sizes)) / 2e6, max(sizes) / 2e5)
        for found in results:
            if "peak_bytes" in found["training"]:
                inside = [p for p, (f, *_) in zip(places, bars, strict=True) if f is found]
                if inside:
                    x = max(found["training"]["peak_bytes"], 1e5) / 1e6
                    right.vlines(x, inside[0] - 0.5, inside[-1] + 0.5, color=INK, linestyle=":", linewidth=1)
    label(right, "Peak memory", "MB above the loaded model and data; dotted: training alone")
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
    for place, text in heads:
        left.text(0, place, text, fontweight="bold", fontsize=9, va="center", transform=left.get_yaxis_transform())
    return fig


def phases(results: Sequence[dict[str, Any]]) -> Figure:
    """Seconds of each phase of this package's methods, in plain trainings, one below the other."""
    bars = [
        (f"{found['case']}, {name}", entry)
        for found in results
        for name, entry in found["methods"].items()
        if entry.get("phases") and "ratio" in entry
    ]
    fig, axes = figure(9, 0.4 * len(bars) + 1.6)
    shown: set[str] = set()
    for place, (_, entry) in enumerate(bars):
        total, left = sum(entry["phases"].values()), 0.0
        for phase, colour in _PHASES.items():
            width = entry["phases"].get(phase, 0.0) / total * entry["ratio"]["median"]
            if width:
                axes.barh(place, width, left=left, color=colour, label=None if phase in shown else phase)
                shown.add(phase)
                left += width
    axes.axvline(1, color=INK, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    label(axes, "Where the time goes", "times plain training of the same steps (dotted)")
    axes.legend(frameon=False, fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def memory(found: dict[str, Any]) -> Figure:
    """Peak memory, and time in plain trainings, against the number of steps; hollow points are extrapolated."""
    fig, (left, right) = figure(11, 4.6, columns=2)
    for i, (name, points) in enumerate(found["methods"].items()):
        colour = _LINES[i % len(_LINES)]
        for axes, key in ((left, "peak_bytes"), (right, "ratio")):
            known = [
                (p["steps"], p[key] / (1e6 if key == "peak_bytes" else 1), p["extrapolated"])
                for p in points
                if p.get(key)
            ]
            if not known:
                continue
            real = [point for point in known if not point[2]]
            axes.plot([p[0] for p in real], [p[1] for p in real], color=colour, marker="o", markersize=4, label=name)
            if len(real) < len(known):
                rest = known[max(0, len(real) - 1) :]
                axes.plot([p[0] for p in rest], [p[1] for p in rest], color=colour, linestyle="--", linewidth=1)
                guessed = [p for p in known if p[2]]
                axes.plot(
                    [p[0] for p in guessed], [p[1] for p in guessed], color=colour, marker="o", markersize=4,
                    markerfacecolor="white", linestyle="none",
                )  # fmt: skip
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(found["steps"], [f"{t:,}" for t in found["steps"]])
        axes.minorticks_off()
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    right.axhline(1, color=INK, linestyle=":", linewidth=1)
    label(left, "Peak memory", "training steps T", "MB above the loaded model and data")
    label(right, "Time", "training steps T", "times plain training of the same steps (dotted)")
    left.legend(frameon=False, fontsize=8)
    return fig


def bars(
    title: str, unit: str, entries: Sequence[tuple[str, float, str]], line: tuple[float, str] | None = None
) -> Figure:
    """Horizontal bars of `(name, value, text)`, the ones above the line first, with a line to compare them with."""
    fig, axes = figure(9, 0.4 * len(entries) + 1.5)
    axes.barh(range(len(entries)), [value for _, value, _ in entries], color=GOOD)
    for place, (_, value, text) in enumerate(entries):
        axes.text(value, place, f" {text}", va="center", fontsize=8)
    if line:
        axes.axvline(line[0], color=BAD, linestyle=":", linewidth=1.2)
        axes.text(line[0], len(entries) - 0.4, f" {line[1]}", color=BAD, fontsize=8, va="center")
    axes.set_yticks(range(len(entries)), [name for name, *_ in entries], fontsize=9)
    axes.set_ylim(len(entries) - 0.1, -0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 1.2)
    axes.tick_params(axis="y", length=0)
    label(axes, title, unit)
    return fig
