"""Learning-rate schedules as tensors `[steps]`: interpolated from knots (to descend on), and the common shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd.errors import BadArgument

WARM = 0.25  # share of the training during which one-cycle and linear schedules rise to their peak


def from_knots(log_rates: Tensor, steps: int) -> Tensor:
    """Rates `[steps]` whose logarithms are interpolated linearly between the knots `log_rates`, `[k]`.

    The knots are spaced evenly over the training, from its first step to its last. With k = steps every step has its
    own. Differentiable.

    Raises BadArgument unless `log_rates` is a vector of 1 to `steps` knots.
    """
    if log_rates.ndim != 1 or not 1 <= len(log_rates) <= steps:
        raise BadArgument(f"expected between 1 and {steps} knots in one dimension; got {list(log_rates.shape)}")
    if len(log_rates) == 1:
        return log_rates.exp().expand(steps)
    return F.interpolate(log_rates[None, None], size=steps, mode="linear", align_corners=True)[0, 0].exp()


def one_cycle(steps: int, peak: float, start: float, end: float) -> Tensor:
    """float32 `[steps]`: half a cosine from `start` to `peak`, then half a cosine to `end` (Smith & Topin 2018, arXiv
    1708.07120)."""
    return _rise_and_fall(steps, peak, start, end, lambda x: (1 - torch.cos(torch.pi * x)) / 2)


def linear(steps: int, peak: float, start: float, end: float) -> Tensor:
    """float32 `[steps]`: a line from `start` to `peak`, then a line to `end`."""
    return _rise_and_fall(steps, peak, start, end, lambda x: x)


def cosine(steps: int, peak: float, end: float) -> Tensor:
    """float32 `[steps]`: half a cosine from `peak` to `end` (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    return (peak + (end - peak) * (1 - torch.cos(torch.pi * _times(steps))) / 2).float()


def _rise_and_fall(steps: int, peak: float, start: float, end: float, ease: Callable[[Tensor], Tensor]) -> Tensor:
    time = _times(steps)
    up, down = ease(time / WARM), ease((time - WARM) / (1 - WARM))
    return torch.where(time < WARM, start + (peak - start) * up, peak + (end - peak) * down).float()


def _times(steps: int) -> Tensor:
    """Each step's position in the training, float64 `[steps]`: 0 for the first step, 1 for the last."""
    if steps < 1:
        raise BadArgument(f"expected at least one step; got {steps}")
    return torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
