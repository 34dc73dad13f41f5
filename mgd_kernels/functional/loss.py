"""Cross-entropy of rows of logits with class indices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_kernels.backends.cpu import _core
from mgd_kernels.backends.triton_loss import TritonRows
from mgd_kernels.errors import BadArgument
from mgd_kernels.functional import _library
from mgd_kernels.functional._library import (
    BACKWARD,
    DOUBLE_BACKWARD,
    FORWARD,
    addresses,
    by_rows,
    contiguous,
    like,
    operator,
    served,
    twice,
)

# losses [rows] of x [rows, classes] and target int64 [rows]; gl the cotangent of losses, gx that of x, c that of gx,
# ggl that of gl. statistics [rows, 2]: a row's maximum and log sum exp(x - maximum).


def _call(pass_, x, target, ignore_index, gl=None, c=None, losses=None, statistics=None, gx=None, ggl=None) -> None:
    if target.dtype is not torch.int64 or target.shape != x.shape[:1] or target.device != x.device:
        raise BadArgument(
            f"expected target int64 {list(x.shape[:1])} on {x.device}; got {target.dtype} {list(target.shape)} on "
            f"{target.device}"
        )
    target = target.resolve_neg().contiguous()
    if _library.on_gpu(x):
        rows, at = TritonRows(target, x.shape[1], ignore_index, 0.0, 0.0, 0.0), slice(0, len(x))
        if pass_ == FORWARD:
            return rows.forward(at, x, losses, statistics)
        gx.copy_(x)  # whose place the kernels take
        if pass_ == BACKWARD:
            return rows.backward(at, gx, gl, statistics)
        ggl.copy_(rows.double_backward(at, gx, c.clone(), gl, statistics))
        return None
    tensors = (x, gl, c, target, losses, statistics, gx, ggl, None)
    _core().nn_cross_entropy(pass_, *x.shape, ignore_index, *addresses(tensors), torch.get_num_threads())


def _cross_entropy(x, target, ignore_index):
    (x,) = contiguous(x.shape, x)
    losses, statistics = like(x, x.shape[0]), like(x, x.shape[0], 2)
    _call(FORWARD, x, target, ignore_index, losses=losses, statistics=statistics)
    return losses, statistics


def _cross_entropy_backward(gl, x, target, statistics, ignore_index):
    (gl,), (x,), (statistics,) = (
        contiguous(x.shape[:1], gl),
        contiguous(x.shape, x),
        contiguous((x.shape[0], 2), statistics),
    )
    gx = like(x)
    _call(BACKWARD, x, target, ignore_index, gl=gl, statistics=statistics, gx=gx)
    return gx


def _cross_entropy_double_backward(c, gl, x, target, statistics, ignore_index):
    (gl,), (c, x), (statistics,) = (
        contiguous(x.shape[:1], gl),
        contiguous(x.shape, c, x),
        contiguous((x.shape[0], 2), statistics),
    )
    ggl, gx = like(gl), like(x)
    _call(DOUBLE_BACKWARD, x, target, ignore_index, gl=gl, c=c, statistics=statistics, gx=gx, ggl=ggl)
    return ggl, gx


def _differentiate(ctx, gl, _statistics):
    if gl is None:
        return None, None, None
    x, target, statistics = ctx.saved_tensors
    return cross_entropy_backward(gl, x, target, statistics, ctx.arguments[2]), None, None


def _differentiate_twice(ctx, c):
    if c is None:
        return None, None, None, None, None
    gl, x, target, statistics = ctx.saved_tensors
    ggl, gx = cross_entropy_double_backward(c, gl, x, target, statistics, ctx.arguments[4])
    return ggl, gx, None, None, None


def _plain_double_backward(c, gl, x, target, statistics, ignore_index):
    function = lambda x: F.cross_entropy(x, target, ignore_index=ignore_index, reduction="none")
    return twice(function, [x], [gl], [c])


cross_entropy_forward = operator(
    "cross_entropy(Tensor x, Tensor target, int ignore_index) -> (Tensor, Tensor)",
    _cross_entropy,
    lambda x, target, ignore_index: (like(x, x.shape[0]), like(x, x.shape[0], 2)),
    lambda args, out: (args[0], args[1], out[1]),
    _differentiate,
    non_differentiable=slice(1, 2),
    gpu=True,
    batch=by_rows,
)
cross_entropy_backward = operator(
    "cross_entropy_backward(Tensor gl, Tensor x, Tensor target, Tensor statistics, int ignore_index) -> Tensor",
    _cross_entropy_backward,
    lambda gl, x, target, statistics, ignore_index: like(x),
    lambda args, gx: args[:4],
    _differentiate_twice,
    gpu=True,
    batch=by_rows,
)
cross_entropy_double_backward = operator(
    "cross_entropy_double_backward(Tensor c, Tensor gl, Tensor x, Tensor target, Tensor statistics, int ignore_index)"
    " -> (Tensor, Tensor)",
    _cross_entropy_double_backward,
    lambda c, gl, x, target, statistics, ignore_index: (like(gl), like(x)),
    plain=_plain_double_backward,
    gpu=True,
    batch=by_rows,
)


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
    """As `torch.nn.functional.cross_entropy`: fused for class indices `[N]` with logits `[N, C]`."""
    fits = (
        served(input, gpu=True)
        and input.ndim == 2
        and target.dtype is torch.int64
        and target.device == input.device
        and target.shape == input.shape[:1]
        and weight is None
        and size_average is None
        and reduce is None
        and label_smoothing == 0.0
        and reduction in ("mean", "sum", "none")
    )
    if not fits:
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )  # fmt: skip
    losses, _ = cross_entropy_forward(input, target, ignore_index)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (target != ignore_index).sum()
