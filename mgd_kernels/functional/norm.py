"""Layer norm, group norm and batch norm: value, gradient, and gradient of the gradient, two passes over memory each.

Names as in csrc/nn/kernels.h: gy, gx, gw, gb are cotangents of the output, the input, weight and bias; c, cw, cb those
of gx, gw, gb; ggy that of gy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_kernels.backends.cpu import _core
from mgd_kernels.functional._library import (
    BACKWARD,
    DOUBLE_BACKWARD,
    FORWARD,
    address,
    channels_last,
    contiguous,
    like,
    operator,
    served,
    twice,
)

# --- Layer norm: x [..., width], weight and bias [width], mean and rstd [rows] ------------------------------------


def _layer(pass_, x, width, eps, weight, bias, gy, c, cw, cb, mean, rstd, y, gx, ggy, gw, gb) -> None:
    tensors = (x, weight, bias, gy, c, cw, cb, mean, rstd, y, gx, ggy, gw, gb)
    rows = x.numel() // width
    _core().nn_layer_norm(pass_, rows, width, eps, *map(address, tensors), torch.get_num_threads())


def _layer_norm(x, weight, bias, width, eps):
    (x,), (weight, bias) = contiguous(x.shape, x), contiguous((width,), weight, bias)
    rows = x.numel() // width
    y, mean, rstd = like(x), like(x, rows), like(x, rows)
    _layer(FORWARD, x, width, eps, weight, bias, None, None, None, None, mean, rstd, y, None, None, None, None)
    return y, mean, rstd


def _layer_norm_backward(gy, x, mean, rstd, weight, width, eps):
    gy, x = contiguous(x.shape, gy, x)
    (weight,), (mean, rstd) = contiguous((width,), weight), contiguous((x.numel() // width,), mean, rstd)
    gx, gw, gb = like(x), like(x, width), like(x, width)
    _layer(BACKWARD, x, width, eps, weight, None, gy, None, None, None, mean, rstd, None, gx, None, gw, gb)
    return gx, gw, gb


def _layer_norm_double_backward(c, cw, cb, gy, x, mean, rstd, weight, width, eps):
    c, gy, x = contiguous(x.shape, torch.zeros_like(x) if c is None else c, gy, x)
    cw, cb, weight = contiguous((width,), cw, cb, weight)
    mean, rstd = contiguous((x.numel() // width,), mean, rstd)
    ggy, gx, gw = like(x), like(x), like(x, width)
    _layer(DOUBLE_BACKWARD, x, width, eps, weight, None, gy, c, cw, cb, mean, rstd, None, gx, ggy, gw, None)
    return ggy, gx, gw


def _differentiate_layer_norm(ctx, gy, _mean, _rstd):
    if gy is None:
        return None, None, None, None, None
    x, mean, rstd, weight, bias = ctx.saved_tensors
    gx, gw, gb = layer_norm_backward(gy, x, mean, rstd, weight, *ctx.arguments[3:])
    return gx, None if weight is None else gw, None if bias is None else gb, None, None


def _differentiate_layer_norm_twice(ctx, c, cw, cb):
    if c is None and cw is None and cb is None:
        return (None,) * 7
    gy, x, mean, rstd, weight = ctx.saved_tensors
    ggy, gx, gw = layer_norm_double_backward(c, cw, cb, gy, x, mean, rstd, weight, *ctx.arguments[5:])
    return ggy, gx, None, None, None if weight is None else gw, None, None


def _plain_layer_norm(c, cw, cb, gy, x, mean, rstd, weight, width, eps):
    def function(x, weight, bias):
        return F.layer_norm(x.reshape(-1, width), (width,), weight, bias, eps).view(x.shape)

    ggy, gx, gw, _ = twice(function, [x, weight, x.new_zeros(width)], [gy], [c, cw, cb])
    return ggy, gx, gw


layer_norm_forward = operator(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, SymInt width, float eps) -> (Tensor, Tensor, Tensor)",
    _layer_norm,
    lambda x, weight, bias, width, eps: (like(x), like(x, x.numel() // width), like(x, x.numel() // width)),
    lambda args, out: (args[0], out[1], out[2], args[1], args[2]),
    _differentiate_layer_norm,
    non_differentiable=slice(1, 3),
)
layer_norm_backward = operator(
    "layer_norm_backward(Tensor gy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, SymInt width, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _layer_norm_backward,
    lambda gy, x, mean, rstd, weight, width, eps: (like(x), like(x, width), like(x, width)),
    lambda args, out: args[:5],
    _differentiate_layer_norm_twice,
)
layer_norm_double_backward = operator(
    "layer_norm_double_backward(Tensor? c, Tensor? cw, Tensor? cb, Tensor gy, Tensor x, Tensor mean, Tensor rstd,"
    " Tensor? weight, SymInt width, float eps) -> (Tensor, Tensor, Tensor)",
    _layer_norm_double_backward,
    lambda c, cw, cb, gy, x, mean, rstd, weight, width, eps: (like(x), like(x), like(x, width)),
    plain=_plain_layer_norm,
)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As `torch.nn.functional.layer_norm`."""
    shape = tuple(normalized_shape)
    width = math.prod(shape)
    fits = (
        served(input, weight, bias)
        and len(shape) > 0
        and input.shape[-len(shape) :] == shape
        and all(p is None or p.shape == shape for p in (weight, bias))
    )
    if not fits:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    if len(shape) > 1:
        weight, bias = (None if p is None else p.reshape(width) for p in (weight, bias))
    return layer_norm_forward(input, weight, bias, width, eps)[0]


# --- Group norm and batch norm: x [batch, channels, ...]; mean, var and rstd one for each group or channel ----------


def _channel(
    pass_, x, groups, eps, *, weight=None, bias=None, gy=None, c=None, cw=None, cb=None, gmean=None, gvar=None,
    mean=None, var=None, rstd=None, y=None, gx=None, ggy=None, ggmean=None, ggvar=None, gw=None, gb=None,
) -> None:  # fmt: skip
    batch, channels = x.shape[:2]
    tensors = (
        x, weight, bias, gy, c, cw, cb, gmean, gvar, mean, var, rstd, y, gx, ggy, ggmean, ggvar, gw, gb
    )  # fmt: skip
    _core().nn_channel_norm(
        pass_,
        batch,
        channels,
        x.numel() // (batch * channels),
        groups,
        eps,
        *map(address, tensors),
        torch.get_num_threads(),
    )


def _group_norm(x, weight, bias, groups, eps):
    (x,), (weight, bias) = contiguous(x.shape, x), contiguous(x.shape[1:2], weight, bias)
    sets = x.shape[0] * groups
    y, mean, rstd = like(x), like(x, sets), like(x, sets)
    _channel(FORWARD, x, groups, eps, weight=weight, bias=bias, mean=mean, rstd=rstd, y=y)
    return y, mean, rstd


def _group_norm_backward(gy, x, mean, rstd, weight, groups, eps):
    channels, sets = x.shape[1], x.shape[0] * groups
    (gy, x), (weight,), (mean, rstd) = (
        contiguous(x.shape, gy, x),
        contiguous((channels,), weight),
        contiguous((sets,), mean, rstd),
    )
    gx, gw, gb = like(x), like(x, channels), like(x, channels)
    _channel(BACKWARD, x, groups, 0, weight=weight, gy=gy, mean=mean, rstd=rstd, gx=gx, gw=gw, gb=gb)
    return gx, gw, gb


def _group_norm_double_backward(c, cw, cb, gy, x, mean, rstd, weight, groups, eps):
    channels, sets = x.shape[1], x.shape[0] * groups
    c, gy, x = contiguous(x.shape, torch.zeros_like(x) if c is None else c, gy, x)
    (cw, cb, weight), (mean, rstd) = contiguous((channels,), cw, cb, weight), contiguous((sets,), mean, rstd)
    ggy, gx, gw = like(x), like(x), like(x, channels)
    _channel(
        DOUBLE_BACKWARD, x, groups, 0, weight=weight, gy=gy, c=c, cw=cw, cb=cb, mean=mean, rstd=rstd, gx=gx, ggy=ggy,
        gw=gw,
    )  # fmt: skip
    return ggy, gx, gw


def _differentiate_group_norm(ctx, gy, _mean, _rstd):
    if gy is None:
        return None, None, None, None, None
    x, mean, rstd, weight, bias = ctx.saved_tensors
    gx, gw, gb = group_norm_backward(gy, x, mean, rstd, weight, *ctx.arguments[3:])
    return gx, None if weight is None else gw, None if bias is None else gb, None, None


def _differentiate_group_norm_twice(ctx, c, cw, cb):
    if c is None and cw is None and cb is None:
        return (None,) * 7
    gy, x, mean, rstd, weight = ctx.saved_tensors
    ggy, gx, gw = group_norm_double_backward(c, cw, cb, gy, x, mean, rstd, weight, *ctx.arguments[5:])
    return ggy, gx, None, None, None if weight is None else gw, None, None


def _plain_group_norm(c, cw, cb, gy, x, mean, rstd, weight, groups, eps):
    function = lambda x, weight, bias: F.group_norm(x, groups, weight, bias, eps)
    ggy, gx, gw, _ = twice(function, [x, weight, x.new_zeros(x.shape[1])], [gy], [c, cw, cb])
    return ggy, gx, gw


group_norm_forward = operator(
    "group_norm(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps) -> (Tensor, Tensor, Tensor)",
    _group_norm,
    lambda x, weight, bias, groups, eps: (like(x), like(x, x.shape[0] * groups), like(x, x.shape[0] * groups)),
    lambda args, out: (args[0], out[1], out[2], args[1], args[2]),
    _differentiate_group_norm,
    non_differentiable=slice(1, 3),
)
group_norm_backward = operator(
    "group_norm_backward(Tensor gy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, int groups, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _group_norm_backward,
    lambda gy, x, mean, rstd, weight, groups, eps: (like(x), like(x, x.shape[1]), like(x, x.shape[1])),
    lambda args, out: args[:5],
    _differentiate_group_norm_twice,
)
group_norm_double_backward = operator(
    "group_norm_double_backward(Tensor? c, Tensor? cw, Tensor? cb, Tensor gy, Tensor x, Tensor mean, Tensor rstd,"
    " Tensor? weight, int groups, float eps) -> (Tensor, Tensor, Tensor)",
    _group_norm_double_backward,
    lambda c, cw, cb, gy, x, mean, rstd, weight, groups, eps: (like(x), like(x), like(x, x.shape[1])),
    plain=_plain_group_norm,
)


def _by_channel(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the channel kernels serve. They run along the inner dimensions, so those must be long enough."""
    return (
        served(x, *parameters)
        and x.ndim >= 3
        and x.shape[2:].numel() >= 4
        and not channels_last(x)
        and all(p is None or p.shape == x.shape[1:2] for p in parameters)
    )


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """As `torch.nn.functional.group_norm`."""
    if _by_channel(input, weight, bias) and num_groups > 0 and input.shape[1] % num_groups == 0:
        return group_norm_forward(input, weight, bias, num_groups, eps)[0]
    return F.group_norm(input, num_groups, weight, bias, eps)


def _batch_norm(x, weight, bias, eps):
    (x,), (weight, bias) = contiguous(x.shape, x), contiguous(x.shape[1:2], weight, bias)
    y, mean, var, rstd = like(x), *(like(x, x.shape[1]) for _ in range(3))
    _channel(FORWARD, x, 0, eps, weight=weight, bias=bias, mean=mean, var=var, rstd=rstd, y=y)
    return y, mean, var, rstd


def _batch_norm_backward(gy, gmean, gvar, x, mean, rstd, weight, eps):
    gy, x = contiguous(x.shape, torch.zeros_like(x) if gy is None else gy, x)
    gmean, gvar, mean, rstd, weight = contiguous(x.shape[1:2], gmean, gvar, mean, rstd, weight)
    gx, gw, gb = like(x), like(x, x.shape[1]), like(x, x.shape[1])
    _channel(
        BACKWARD, x, 0, 0, weight=weight, gy=gy, gmean=gmean, gvar=gvar, mean=mean, rstd=rstd, gx=gx, gw=gw, gb=gb
    )  # fmt: skip
    return gx, gw, gb


def _batch_norm_double_backward(c, cw, cb, gy, gvar, x, mean, rstd, weight, eps):
    c, gy, x = contiguous(
        x.shape, torch.zeros_like(x) if c is None else c, torch.zeros_like(x) if gy is None else gy, x
    )
    cw, cb, gvar, mean, rstd, weight = contiguous(x.shape[1:2], cw, cb, gvar, mean, rstd, weight)
    ggy, ggmean, ggvar, gx, gw = like(x), like(mean), like(mean), like(x), like(mean)
    _channel(
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
    def function(x, weight, bias):
        var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps), mean, var

    zeros = torch.zeros_like(mean)
    given = [torch.zeros_like(x) if gy is None else gy, zeros, zeros if gvar is None else gvar]
    ggy, ggmean, ggvar, gx, gw, _ = twice(function, [x, weight, zeros], given, [c, cw, cb])
    return ggy, ggmean, ggvar, gx, gw


batch_norm_forward = operator(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _batch_norm,
    lambda x, weight, bias, eps: (like(x), *(like(x, x.shape[1]) for _ in range(3))),
    lambda args, out: (args[0], out[1], out[3], args[1], args[2]),
    _differentiate_batch_norm,
    non_differentiable=slice(3, 4),
)
batch_norm_backward = operator(
    "batch_norm_backward(Tensor? gy, Tensor? gmean, Tensor? gvar, Tensor x, Tensor mean, Tensor rstd, Tensor? weight,"
    " float eps) -> (Tensor, Tensor, Tensor)",
    _batch_norm_backward,
    lambda gy, gmean, gvar, x, mean, rstd, weight, eps: (like(x), like(mean), like(mean)),
    lambda args, out: args[:7],
    _differentiate_batch_norm_twice,
)
batch_norm_double_backward = operator(
    "batch_norm_double_backward(Tensor? c, Tensor? cw, Tensor? cb, Tensor? gy, Tensor? gvar, Tensor x, Tensor mean,"
    " Tensor rstd, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _batch_norm_double_backward,
    lambda c, cw, cb, gy, gvar, x, mean, rstd, weight, eps: (like(x), like(mean), like(mean), like(x), like(mean)),
    plain=_plain_batch_norm,
)


def batch_norm_with_statistics(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`input` `[B, C, ...]` normalised over all but the channels, and its differentiable mean and unbiased variance
    `[C]`; None where the kernel does not serve."""
    count = input.numel() // max(1, input.shape[1]) if input.ndim > 1 else 0
    if not _by_channel(input, weight, bias) or count < 2:
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
    found = batch_norm_with_statistics(input, weight, bias, eps) if training else None
    if found is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y, *statistics = found
    for running, now in zip((running_mean, running_var), statistics, strict=True):
        if running is not None:
            running.mul_(1 - momentum).add_(now.to(running.dtype), alpha=momentum)
    return y
