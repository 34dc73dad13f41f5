"""Layer norm, RMS norm and group norm: value, gradient, and gradient of the gradient, two passes over memory each.

Names as in csrc/nn/kernels.h: gy, gx, gw, gb are cotangents of the output, the input, weight and bias; c, cw, cb those
of gx, gw, gb; ggy that of gy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_kernels.backends import triton_channel_norm, triton_nn
from mgd_kernels.backends.cpu import _core
from mgd_kernels.functional import _library
from mgd_kernels.functional._library import (
    BACKWARD,
    DOUBLE_BACKWARD,
    FORWARD,
    addresses,
    channels_last,
    contiguous,
    like,
    operator,
    served,
)
from mgd_kernels.functional.norm_orders import Layout, norm_double, torchs_layer_norm

_EPS = torch.finfo(torch.float32).eps  # torch's where an RMS norm is given none


def define(
    name: str,
    extent: str,
    kernel: Callable[..., None],
    sizes: Callable[[Tensor, int], tuple[int, int]],
    layout: Callable[[Tensor, int], Layout],
    gpu: bool = False,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The operators of a norm whose weight and bias are applied after it. Returns the first, which maps
    `(x, weight, bias, extent, eps)` to the output and the mean and rstd of each set of normalised elements.

    extent: the declaration of the number that says which elements are normalised together. sizes(x, extent): how long
    weight and bias are, and how many sets there are.
    """

    def forward(x, weight, bias, extent, eps):
        parameters, sets = sizes(x, extent)
        (x,), (weight, bias) = contiguous(x.shape, x), contiguous((parameters,), weight, bias)
        y, mean, rstd = like(x), like(x, sets), like(x, sets)
        kernel(FORWARD, x, extent, eps, weight=weight, bias=bias, mean=mean, rstd=rstd, y=y)
        return y, mean, rstd

    def backward(gy, x, mean, rstd, weight, extent, eps):
        parameters, sets = sizes(x, extent)
        gy, x = contiguous(x.shape, gy, x)
        (weight,), (mean, rstd) = contiguous((parameters,), weight), contiguous((sets,), mean, rstd)
        gx, gw, gb = like(x), like(x, parameters), like(x, parameters)
        kernel(BACKWARD, x, extent, eps, weight=weight, gy=gy, mean=mean, rstd=rstd, gx=gx, gw=gw, gb=gb)
        return gx, gw, gb

    def double_backward(c, cw, cb, gy, x, mean, rstd, weight, extent, eps):
        parameters, sets = sizes(x, extent)
        c, gy, x = contiguous(x.shape, torch.zeros_like(x) if c is None else c, gy, x)
        (cw, cb, weight), (mean, rstd) = contiguous((parameters,), cw, cb, weight), contiguous((sets,), mean, rstd)
        ggy, gx, gw = like(x), like(x), like(x, parameters)
        kernel(
            DOUBLE_BACKWARD, x, extent, eps, weight=weight, gy=gy, c=c, cw=cw, cb=cb, mean=mean, rstd=rstd, gx=gx,
            ggy=ggy, gw=gw,
        )  # fmt: skip
        return ggy, gx, gw

    def differentiate(ctx, gy, _mean, _rstd):
        if gy is None:
            return None, None, None, None, None
        x, mean, rstd, weight, bias = ctx.saved_tensors
        gx, gw, gb = backward_operator(gy, x, mean, rstd, weight, *ctx.arguments[3:])
        return gx, None if weight is None else gw, None if bias is None else gb, None, None

    def differentiate_twice(ctx, c, cw, cb):
        if c is None and cw is None and cb is None:
            return (None,) * 7
        gy, x, mean, rstd, weight = ctx.saved_tensors
        ggy, gx, gw = double_backward_operator(c, cw, cb, gy, x, mean, rstd, weight, *ctx.arguments[5:])
        return ggy, gx, None, None, None if weight is None else gw, None, None

    def plain_double_backward(c, cw, cb, gy, x, mean, rstd, weight, extent, eps):
        return norm_double(c, cw, cb, gy, x, weight, eps, layout(x, extent))

    def empty_gradients(x, extent):
        parameters = sizes(x, extent)[0]
        return like(x), like(x, parameters), like(x, parameters)

    def empty_outputs(x, extent):
        sets = sizes(x, extent)[1]
        return like(x), like(x, sets), like(x, sets)

    double_backward_operator = operator(
        f"{name}_double_backward(Tensor? c, Tensor? cw, Tensor? cb, Tensor gy, Tensor x, Tensor mean, Tensor rstd,"
        f" Tensor? weight, {extent}, float eps) -> (Tensor, Tensor, Tensor)",
        double_backward,
        lambda c, cw, cb, gy, x, mean, rstd, weight, extent, eps: (like(x), *empty_gradients(x, extent)[:2]),
        plain=plain_double_backward,
        gpu=gpu,
    )
    backward_operator = operator(
        f"{name}_backward(Tensor gy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, {extent}, float eps)"
        " -> (Tensor, Tensor, Tensor)",
        backward,
        lambda gy, x, mean, rstd, weight, extent, eps: empty_gradients(x, extent),
        lambda args, out: args[:5],
        differentiate_twice,
        gpu=gpu,
    )
    return operator(
        f"{name}(Tensor x, Tensor? weight, Tensor? bias, {extent}, float eps) -> (Tensor, Tensor, Tensor)",
        forward,
        lambda x, weight, bias, extent, eps: empty_outputs(x, extent),
        lambda args, out: (args[0], out[1], out[2], args[1], args[2]),
        differentiate,
        non_differentiable=slice(1, 3),
        gpu=gpu,
    )


# --- Layer norm and RMS norm: x [..., width], weight and bias [width]; each row is normalised --------------------


def _row_kernel(
    centred, pass_, x, width, eps, *, weight=None, bias=None, gy=None, c=None, cw=None, cb=None, mean=None, rstd=None,
    y=None, gx=None, ggy=None, gw=None, gb=None,
) -> None:  # fmt: skip
    if _library.on_gpu(x):
        return triton_nn.row_norm(
            centred, pass_, x, width, eps, weight=weight, bias=bias, gy=gy, c=c, cw=cw, cb=cb, mean=mean, rstd=rstd,
            y=y, gx=gx, ggy=ggy, gw=gw, gb=gb,
        )  # fmt: skip
    tensors = (x, weight, bias, gy, c, cw, cb, mean, rstd, y, gx, ggy, gw, gb)
    rows = x.numel() // width
    _core().nn_layer_norm(pass_, rows, width, eps, centred, *addresses(tensors), torch.get_num_threads())


def _rows(x, width):
    return width, x.numel() // width


def _row_layout(centred, x, width):
    return Layout.of_layers(width, centred)


_layer_norm, _rms_norm = (
    define(name, "SymInt width", partial(_row_kernel, centred), _rows, partial(_row_layout, centred), True)
    for name, centred in (("layer_norm", True), ("rms_norm", False))
)


def _by_row(input: Tensor, shape: tuple[int, ...], *parameters: Tensor | None) -> list[Tensor | None] | None:
    """The parameters of a norm over the last dimensions, of this shape, as vectors; None where it is not served."""
    fits = (
        served(input, *parameters, gpu=True, width=math.prod(shape))
        and len(shape) > 0
        and input.shape[-len(shape) :] == shape
        and all(p is None or p.shape == shape for p in parameters)
    )
    if not fits:
        return None
    return [p if p is None or len(shape) == 1 else p.reshape(-1) for p in parameters]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As `torch.nn.functional.layer_norm`."""
    shape = tuple(normalized_shape)
    parameters = _by_row(input, shape, weight, bias)
    if parameters is None:
        return torchs_layer_norm(input, normalized_shape, weight, bias, eps)
    return _layer_norm(input, *parameters, math.prod(shape), eps)[0]


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """As `torch.nn.functional.rms_norm`."""
    shape = tuple(normalized_shape)
    parameters = _by_row(input, shape, weight)
    if parameters is None:
        return F.rms_norm(input, normalized_shape, weight, eps)
    return _rms_norm(input, *parameters, None, math.prod(shape), _EPS if eps is None else eps)[0]


# --- Group norm: x [batch, channels, ...], weight and bias [channels]; each group of channels of an example --------


def channel_kernel(
    pass_, x, groups, eps, *, weight=None, bias=None, gy=None, c=None, cw=None, cb=None, gmean=None, gvar=None,
    mean=None, var=None, rstd=None, y=None, gx=None, ggy=None, ggmean=None, ggvar=None, gw=None, gb=None,
) -> None:  # fmt: skip
    """Group norm, or batch norm where `groups` is 0; mean, var and rstd: one for each group or channel."""
    if _library.on_gpu(x):
        return triton_channel_norm.channel_norm(
            pass_, x, groups, eps, weight=weight, bias=bias, gy=gy, c=c, cw=cw, cb=cb, gmean=gmean, gvar=gvar,
            mean=mean, var=var, rstd=rstd, y=y, gx=gx, ggy=ggy, ggmean=ggmean, ggvar=ggvar, gw=gw, gb=gb,
        )  # fmt: skip
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
        *addresses(tensors),
        torch.get_num_threads(),
    )


_group_norm = define(
    "group_norm",
    "int groups",
    channel_kernel,
    lambda x, groups: (x.shape[1], x.shape[0] * groups),
    Layout.of_groups,
    gpu=True,
)


def by_channel(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the channel kernels serve. They run along the inner dimensions.

    Where those are short they are no faster than torch's, whose gradient has other bits under `create_graph`.
    """
    return (
        served(x, *parameters, gpu=True)
        and x.ndim >= 3
        and not channels_last(x)
        and all(p is None or p.shape == x.shape[1:2] for p in parameters)
    )


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """As `torch.nn.functional.group_norm`."""
    if by_channel(input, weight, bias) and num_groups > 0 and input.shape[1] % num_groups == 0:
        return _group_norm(input, weight, bias, num_groups, eps)[0]
    if weight is None and input.ndim > 1 and input.requires_grad and torch.is_grad_enabled():
        # torch cannot differentiate a group norm without weights three times.
        weight = input.new_ones(input.shape[1])
    return F.group_norm(input, num_groups, weight, bias, eps)
