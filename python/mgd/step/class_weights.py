"""Cross-entropies with class weights, which may be metaparameters: torch has no derivative with respect to those.

Weights that need no gradient go the same way, so that a step has the same bits with and without one. Off the CPU,
losses of more than two dimensions are taken over rows: torch's own have no deterministic form on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_kernels import functional


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As `torch.nn.functional.cross_entropy`, differentiable in `weight` for class indices."""
    if _over_rows(input, target):
        rows = input.movedim(1, -1).flatten(0, -2)
        losses = cross_entropy(
            rows, target.flatten(), weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
        return losses.view(target.shape) if losses.ndim else losses
    if weight is not None and not target.is_floating_point() and size_average is None and reduce is None:
        losses, weights = _weighted(functional.cross_entropy, input, target, weight, ignore_index)
        if label_smoothing:
            classes = 0 if input.ndim == 1 else 1
            every = (F.log_softmax(input, classes).movedim(classes, -1) * weight).sum(-1)
            share = label_smoothing / len(weight)
            losses = (1 - label_smoothing) * losses - share * torch.where(target != ignore_index, every, 0)
        return _reduced(losses, weights, reduction)
    return functional.cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    )  # fmt: skip


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As `torch.nn.functional.nll_loss`, differentiable in `weight`."""
    if _over_rows(input, target):
        rows = input.movedim(1, -1).flatten(0, -2)
        losses = nll_loss(rows, target.flatten(), weight, size_average, ignore_index, reduce, reduction)
        return losses.view(target.shape) if losses.ndim else losses
    if weight is not None and size_average is None and reduce is None:
        return _reduced(*_weighted(F.nll_loss, input, target, weight, ignore_index), reduction)
    return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)


def _over_rows(input: Tensor, target: Tensor) -> bool:
    indices = input.ndim > 2 and input.device.type != "cpu" and not target.is_floating_point()
    return indices and target.shape == input.shape[:1] + input.shape[2:]


def _weighted(
    loss: Callable[..., Tensor], input: Tensor, target: Tensor, weight: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The loss of each target times the weight of its class, and these weights."""
    losses = loss(input, target, ignore_index=ignore_index, reduction="none")
    counted = target != ignore_index
    weights = torch.where(counted, weight[target.where(counted, 0)], 0)
    return losses * weights, weights


def _reduced(losses: Tensor, weights: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / weights.sum()
