"""The look of every picture. Needs matplotlib, which is imported when a picture is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

INK, GOOD, BAD, SOFT = "#1f2430", "#1b7f79", "#c8453b", "#9aa3b2"


def require_matplotlib() -> None:
    """Raise before the work starts whose pictures are asked for."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        from mgd.errors import MissingPackage

        raise MissingPackage("pictures", "matplotlib", "plots") from error


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure (sizes in inches), drawn without a display, and its axes."""
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


def label(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    """The title, and the labels of both axes."""
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set(xlabel=x, ylabel=y)


def colour_legend(axes: Axes, entries: Sequence[tuple[str, str]]) -> None:
    """A legend of `(text, colour)`."""
    from matplotlib.patches import Patch

    axes.legend(handles=[Patch(color=colour, label=text) for text, colour in entries], frameon=False)


def picture(axes: Axes, pixels: Tensor, white: float) -> None:
    """An image `[channels, height, width]` whose values run from 0 to `white`; a single channel is drawn dark on
    white."""
    array = pixels.permute(1, 2, 0).numpy()
    axes.imshow(array[..., 0] if array.shape[2] == 1 else array, cmap="gray_r", vmin=0, vmax=white)


def gallery(title: str, images: Tensor, labels: Sequence[str], truths: Sequence[str], columns: int = 8) -> Figure:
    """Images (uint8 `[k, channels, height, width]`), each with the label that the training saw and, where that one is
    wrong, the true label."""
    rows = -(-len(images) // columns)
    fig, axes = figure(1.25 * columns, 1.62 * rows + 0.4, rows=rows, columns=columns, squeeze=False)
    fig.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, word, truth in zip(axes.flat, images, labels, truths, strict=False):
        picture(axis, image, white=255)
        right = word == truth
        axis.set_title(word if right else f"“{word}”", fontsize=9, color=INK if right else BAD, pad=3)
        axis.text(
            0.5, -0.04, "" if right else f"is: {truth}", transform=axis.transAxes, ha="center", va="top", fontsize=8
        )
    return fig
