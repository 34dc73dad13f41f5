"""Batch norm in training: value, batch statistics, gradient, and gradient of the gradient; names as in `norm.py`.

x [batch, channels, ...]; weight, bias, mean, var (biased) and rstd [channels]. The statistics are outputs too, with
the cotangents gmean and gvar; ggmean and ggvar are the cotangents of these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_kernels.functional._library import BACKWARD, DOUBLE_BACKWARD, FORWARD, contiguous, like, operator
from mgd_kernels.functional.norm import by_channel, channel_kernel
from mgd_kernels.functional.norm_orders import Layout, norm_double, torchs_batch_norm


def _batch_norm(x, weight, bias, eps):
    (x,), (weight, bias) = contiguous(x.shape, x), contiguous(x.shape[1:2], weight, bias)
    y, mean, var, rstd = like(x), *(like(x, x.shape[1]) for _ in range(3))
    channel_kernel(FORWARD, x, 0, eps, weight=weight, bias=bias, mean=mean, var=var, rstd=rstd, y=y)
    return y, mean, var, rstd


def _batch_norm_backward(gy, gmean, gvar, x, mean, rstd, weight, eps):
    gy, x = contiguous(x.shape, torch.zeros_like(x) if gy is None else gy, x)
    gmean, gvar, mean, rstd, weight = contiguous(x.shape[1:2], gmean, gvar, mean, rstd, weight)
    gx, gw, gb = like(x), like(x, x.shape[1]), like(x, x.shape[1])
    channel_kernel(
        BACKWARD, x, 0, 0, weight=weight, gy=gy, gmean=gmean, gvar=gvar, mean=mean, rstd=rstd, gx=gx, gw=gw, gb=gb
    )  # fmt: skip
    return gx, gw, gb


def _batch_norm_double_backward(c, cw, cb, gy, gvar, x, mean, rstd, weight, eps):
    c, gy, x = contiguous(
        x.shape, torch.zeros_like(x) if c is None else c, torch.zeros_like(x) if gy is None else gy, x
    )
    cw, cb, gvar, mean, rstd, weight = contiguous(x.shape[1:2], cw, cb, gvar, mean, rstd, weight)
    ggy, ggmean, ggvar, gx, gw = like(x), like(mean), like(mean), like(x), like(mean)
    channel_kernel(
        DOUBLE_BACKWARD, x, 0, 0, weight=weight, gy=gy, gvar=gvar, c=c, cw=cw, cb=cb, mean=mean, rstd=rstd, gx=gx,
        ggy=ggy, ggmean=ggmean, ggvar=ggvar, gw=gw,
    )  # fmt: skip
    return ggy, ggmean, ggvar, gx, gw


def _differentiate_batch_norm(ctx, gy, gmean, gvar, _rstd):
    if gy is None and gmean is None and gvar is None:
        return None, None, None, None
    x, mean, rstd, weight, bias = ctx.saved_tensors
    gx, gw, gb = batch_norm_backward(gy, gmean, gvar, x, mean, rstd, weight, ctx.arguments[3])
    return gx, None if weight is None else gw, None if bias is None else gb, None


def _differentiate_batch_norm_twice(ctx, c, cw, cb):
    if c is None and cw is None and cb is None:
        return (None,) * 8
    gy, gmean, gvar, x, mean, rstd, weight = ctx.saved_tensors
    ggy, ggmean, ggvar, gx, gw = batch_norm_double_backward(
        c, cw, cb, gy, gvar, x, mean, rstd, weight, ctx.arguments[7]
    )
    return (
        None if gy is None else ggy,
        None if gmean is None else ggmean,
        None if gvar is None else ggvar,
        gx,
        None,
        None,
        None if weight is None else gw,
        None,
    )


def _plain_batch_norm(c, cw, cb, gy, gvar, x, mean, rstd, weight, eps):
    layout, per_channel = Layout.of_batches(x), [1, -1, *[1] * (x.ndim - 2)]
    dims = [d for d in range(x.ndim) if d != 1]
    c = torch.zeros_like(x) if c is None else c
    ggy, gx, gw = norm_double(c, cw, cb, torch.zeros_like(x) if gy is None else gy, x, weight, eps, layout)
    centred, ggmean = x - x.mean(dims, keepdim=True), c.mean(dims)
    if gvar is not None:  # the gradient of the variance is 2 centred / n
        gx = gx + (2 * x.shape[1] / x.numel()) * gvar.view(per_channel) * (c - ggmean.view(per_channel))
    return ggy, ggmean, 2 * (c * centred).mean(dims), gx, gw


batch_norm_forward = operator(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _batch_norm,
    lambda x, weight, bias, eps: (like(x), *(like(x, x.shape[1]) for _ in range(3))),
    lambda args, out: (args[0], out[1], out[3], args[1], args[2]),
    _differentiate_batch_norm,
    non_differentiable=slice(3, 4),
    gpu=True,
)
batch_norm_backward = operator(
    "batch_norm_backward(Tensor? gy, Tensor? gmean, Tensor? gvar, Tensor x, Tensor mean, Tensor rstd, Tensor? weight,"
    " float eps) -> (Tensor, Tensor, Tensor)",
    _batch_norm_backward,
    lambda gy, gmean, gvar, x, mean, rstd, weight, eps: (like(x), like(mean), like(mean)),
    lambda args, out: args[:7],
    _differentiate_batch_norm_twice,
    gpu=True,
)
batch_norm_double_backward = operator(
    "batch_norm_double_backward(Tensor? c, Tensor? cw, Tensor? cb, Tensor? gy, Tensor? gvar, Tensor x, Tensor mean,"
    " Tensor rstd, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _batch_norm_double_backward,
    lambda c, cw, cb, gy, gvar, x, mean, rstd, weight, eps: (like(x), like(mean), like(mean), like(x), like(mean)),
    plain=_plain_batch_norm,
    gpu=True,
)


def batch_norm_with_statistics(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`input` `[B, C, ...]` normalised over all but the channels, and its differentiable mean and unbiased variance
    `[C]`; None where the kernel does not serve."""
    count = input.numel() // max(1, input.shape[1]) if input.ndim > 1 else 0
    if not by_channel(input, weight, bias) or count < 2:
        return None
    y, mean, var, _ = batch_norm_forward(input, weight, bias, eps)
    return y, mean, var * (count / (count - 1))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `torch.nn.functional.batch_norm`, and in training the running statistics, which are updated in place, are
    differentiable functions of the input."""
    outputs = batch_norm_with_statistics(input, weight, bias, eps) if training else None
    if outputs is None and training and running_mean is running_var is None:
        return torchs_batch_norm(input, weight, bias, eps)
    if outputs is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y, *statistics = outputs
    for running, now in zip((running_mean, running_var), statistics, strict=True):
        if running is not None:
            running.mul_(1 - momentum).add_(now.to(running.dtype), alpha=momentum)
    return y
