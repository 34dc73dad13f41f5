"""Pictures and pages: what a recipe found, for somebody who was not there. Needs matplotlib."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mgd.errors import MissingPackage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GOOD, BAD, SOFT = "#1f2430", "#1b7f79", "#c8453b", "#9aa3b2"


def require_matplotlib() -> None:
    """Raise early, before the work whose pictures are asked for."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingPackage("pictures", "matplotlib", "plots") from error


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure (inches) of the project's look, drawn without a display, and its axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 10,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        fig = Figure(figsize=(width, height), dpi=120, layout="constrained")
        return fig, fig.subplots(rows, columns, **options)


def schedule(rate: Tensor, gradient: Tensor) -> Figure:
    """The learning rate of every step `[T]`, and what 10% more of it at one step would do to the objective."""
    fig, (above, below) = figure(8, 5, rows=2, sharex=True, height_ratios=[1, 1.6])
    steps = range(len(rate))
    above.plot(steps, rate.tolist(), color=INK)
    above.set_ylim(bottom=0)
    label(above, "The learning rate of every step ...", "", "learning rate")
    effect, unit = _scaled(0.1 * rate.double() * gradient.double())
    below.bar(steps, effect.tolist(), width=1.0, color=[BAD if value > 0 else GOOD for value in effect.tolist()])
    below.axhline(0, color=INK, linewidth=0.8)
    label(
        below,
        "... and what 10% more of it at that step alone would do",
        "training step",
        f"change in held-out loss{unit}",
    )
    _legend(below, [("worse: the rate is too high here", BAD), ("better: the rate is too low here", GOOD)])
    return fig


def separation(harm: Tensor, wrong: Tensor) -> Figure:
    """Left: the distribution of the metagradient `[n]` for images with right and with wrong labels (bool `[n]`).
    Right: how many of the wrong labels are found when so many images are looked at, the most harmful first."""
    fig, (left, right) = figure(10, 4, columns=2)
    values, unit = _scaled(harm.double())
    edges = torch.linspace(float(values.min()), float(values.max()), 41, dtype=torch.float64)
    for mask, colour in ((~wrong, SOFT), (wrong, BAD)):
        left.hist(values[mask].tolist(), bins=edges.tolist(), color=colour, alpha=0.75)
    left.axvline(0, color=INK, linewidth=0.8)
    label(left, "Wrong labels stand out ...", f"change in held-out loss per unit of weight{unit}", "training images")
    _legend(left, [("label is right", SOFT), ("label is wrong", BAD)])
    total, count = int(wrong.sum()), len(wrong)
    found = wrong[harm.argsort(descending=True)].cumsum(0)
    right.plot([0, total, count], [0, total, total], color=INK, linestyle=":", linewidth=1, label="best possible")
    right.plot(range(1, count + 1), found.tolist(), color=BAD, linewidth=2, label="by metagradient")
    right.plot([0, count], [0, total], color=SOFT, linestyle="--", linewidth=1, label="in random order")
    right.set(xlim=(0, count), ylim=(0, max(1, total) * 1.04))
    right.legend(loc="lower right", frameon=False)
    label(
        right,
        "... so looking at the most harmful first finds them",
        "images looked at, the most harmful first",
        f"wrong labels found, of {total}",
    )
    return fig


def gallery(title: str, images: Tensor, given: Sequence[str], true: Sequence[str], columns: int = 8) -> Figure:
    """Images (uint8 `[k, channels, height, width]`) with the label that training saw, and the true one."""
    rows = -(-len(images) // columns)
    fig, axes = figure(1.25 * columns, 1.62 * rows + 0.4, rows=rows, columns=columns, squeeze=False)
    fig.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, label, truth in zip(axes.flat, images, given, true, strict=False):
        pixels = image.permute(1, 2, 0).numpy()
        if image.shape[0] == 1:
            axis.imshow(pixels[..., 0], cmap="gray_r", vmin=0, vmax=255)
        else:
            axis.imshow(pixels)
        right = label == truth
        axis.set_title(label if right else f"“{label}”", fontsize=9, color=INK if right else BAD, pad=3)
        axis.text(
            0.5, -0.04, "" if right else f"is: {truth}", transform=axis.transAxes, ha="center", va="top", fontsize=8
        )
    return fig


def label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set(xlabel=x, ylabel=y)


def _scaled(values: Tensor) -> tuple[Tensor, str]:
    """The values in a unit that makes them of order one, and the unit as a suffix of an axis label."""
    largest = float(values.abs().max())
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    if -2 < power < 4:
        return values, ""
    exponent = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return values / 10.0**power, f" (×10{exponent})"


def _legend(axes: Axes, entries: Sequence[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    axes.legend(handles=[Patch(color=colour, label=text) for text, colour in entries], frameon=False)


# --- pages -----------------------------------------------------------------------------------------------------------


@dataclass
class Section:
    """title, text: of a part of a page. figure: with its file name (without .png). table: rows, the first a header."""

    title: str
    text: str
    figure: Figure | None = None
    name: str = ""
    table: Sequence[Sequence[str]] = ()


def page(folder: str | Path, title: str, lead: str, sections: Sequence[Section]) -> list[Path]:
    """Write every figure as PNG and a self-contained `index.html` into `folder`; gives the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    body, paths = [], []
    for section in sections:
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        body += [f"<p>{html.escape(part)}</p>" for part in section.text.split("\n\n") if part]
        if section.table:
            body.append(_table(section.table))
        if section.figure is not None:
            buffer = io.BytesIO()
            section.figure.savefig(buffer, format="png")
            path = folder / f"{section.name}.png"
            path.write_bytes(buffer.getvalue())
            paths.append(path)
            data = base64.b64encode(buffer.getvalue()).decode()
            body.append(f'<img alt="{html.escape(section.title, quote=True)}" src="data:image/png;base64,{data}">')
        body.append("</section>")
    index = folder / "index.html"
    index.write_text(_PAGE.format(title=html.escape(title), lead=html.escape(lead), body="\n".join(body)), "utf-8")
    return [index, *paths]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = [[html.escape(str(cell)) for cell in row] for row in rows]
    lines = ["<table><thead><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr></thead><tbody>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rest]
    return "\n".join([*lines, "</tbody></table>"])


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1f2430; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1, h2 {{ line-height: 1.2 }} h2 {{ margin-top: 2.5rem }} .lead {{ font-size: 1.1rem }}
img {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid #e3e6ec }}
th:first-child, td:first-child {{ text-align: left }}
</style></head><body>
<h1>{title}</h1><p class="lead">{lead}</p>
{body}
</body></html>
"""
