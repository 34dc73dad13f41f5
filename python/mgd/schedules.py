"""Learning-rate schedules as tensors `[steps]`: interpolated from knots (to descend on), the common shapes, and what
schedulers of torch and transformers give.

All fit `lr=` of an optimizer, `fixed={"lr": ...}` and `z["lr"]` alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


def constant(steps: int, rate: float, warmup: int = 0) -> Tensor:
    """float32 `[steps]`: a line from 0 during `warmup` steps, then `rate`."""
    return _warmed_up(steps, rate, rate, warmup, lambda x: x)


def warmup_cosine(steps: int, peak: float, warmup: int, end: float = 0.0) -> Tensor:
    """float32 `[steps]`: a line from 0 to `peak` during `warmup` steps, then half a cosine towards `end`, which it
    would reach one step after the last. As `get_cosine_schedule_with_warmup` of transformers."""
    return _warmed_up(steps, peak, end, warmup, lambda x: (1 - torch.cos(torch.pi * x)) / 2)


def warmup_linear(steps: int, peak: float, warmup: int, end: float = 0.0) -> Tensor:
    """float32 `[steps]`: a line from 0 to `peak` during `warmup` steps, then a line towards `end`, which it would reach
    one step after the last. As `get_linear_schedule_with_warmup` of transformers."""
    return _warmed_up(steps, peak, end, warmup, lambda x: x)


def wsd(steps: int, peak: float, warmup: int, decay: int, end: float = 0.0) -> Tensor:
    """float32 `[steps]`: warm-up, stable, decay (arXiv 2404.06395): a line from 0 to `peak` during `warmup` steps, then
    `peak`, and during the last `decay` steps a line towards `end`, which it would reach one step after the last.

    Raises BadArgument if warm-up and decay take more than `steps`.
    """
    _times(steps)
    if decay < 0 or warmup + decay > steps:
        raise BadArgument(f"expected warmup + decay <= {steps} steps; got {warmup} + {decay}")
    stable = constant(steps - decay, peak, warmup) if decay < steps else torch.zeros(0)
    return torch.cat([stable, _warmed_up(decay, peak, end, 0, lambda x: x)]) if decay else stable


def from_torch(
    scheduler: Callable[[torch.optim.Optimizer], Any], steps: int, lr: float | Sequence[float] = 1e-3
) -> Tensor:
    """The learning rates of a scheduler of `torch.optim.lr_scheduler` or transformers, float64 `[steps]`.

    scheduler: makes it from an optimizer, as in `lambda optimizer: CosineAnnealingLR(optimizer, 100)`; it is stepped
    once after each training step. lr: the optimizer's learning rate, or one per parameter group, which gives
    `[steps, G]`.

    Raises BadArgument for a scheduler that waits for a metric.
    """
    _times(steps)
    rates = [lr] if isinstance(lr, float | int) else list(lr)
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD(groups, lr=rates[0], momentum=0.9)  # some schedulers turn the momentum, too
    made, table = scheduler(optimizer), []
    if isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau) or not hasattr(made, "step"):
        raise BadArgument(f"expected a scheduler that is stepped without a metric; got {type(made).__name__}")
    for _ in range(steps):
        table.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()  # torch warns of a scheduler whose optimizer makes no steps; without gradients it is nothing
        made.step()
    found = torch.tensor(table, dtype=torch.float64)
    return found[:, 0] if isinstance(lr, float | int) else found


def _warmed_up(steps: int, peak: float, end: float, warmup: int, ease: Callable[[Tensor], Tensor]) -> Tensor:
    """A line from 0 to `peak` during `warmup` steps, then from `peak` to `end`, reached at step number `steps`."""
    _times(steps)
    if not 0 <= warmup <= steps:
        raise BadArgument(f"expected warmup between 0 and {steps} steps; got {warmup}")
    step = torch.arange(steps, dtype=torch.float64)
    down = ease((step - warmup) / max(1, steps - warmup))
    return torch.where(step < warmup, peak * step / max(1, warmup), peak + (end - peak) * down).float()


def _rise_and_fall(steps: int, peak: float, start: float, end: float, ease: Callable[[Tensor], Tensor]) -> Tensor:
    time = _times(steps)
    up, down = ease(time / WARM), ease((time - WARM) / (1 - WARM))
    return torch.where(time < WARM, start + (peak - start) * up, peak + (end - peak) * down).float()


def _times(steps: int) -> Tensor:
    """Each step's position in the training, float64 `[steps]`: 0 for the first step, 1 for the last."""
    if steps < 1:
        raise BadArgument(f"expected at least one step; got {steps}")
    return torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
