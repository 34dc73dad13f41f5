"""Pointwise functions: value, gradient, and gradient of the gradient, one pass over memory each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_kernels.backends.cpu import _core
from mgd_kernels.functional._library import (
    BACKWARD,
    DOUBLE_BACKWARD,
    FORWARD,
    channels_last,
    contiguous,
    like,
    operator,
    served,
)

# The codes of mgd::Function (csrc/nn/kernels.h).
_FUNCTIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "tanh": 3, "sigmoid": 4}


def _forward(x, function):
    (x,) = contiguous(x.shape, x)
    y = like(x)
    _core().nn_activation(
        FORWARD, _FUNCTIONS[function], x.numel(), x.data_ptr(), 0, 0, y.data_ptr(), 0, 0, torch.get_num_threads()
    )
    return y


def _backward(gy, x, function):
    gy, x = contiguous(x.shape, gy, x)
    gx = like(x)
    _core().nn_activation(
        BACKWARD,
        _FUNCTIONS[function],
        x.numel(),
        x.data_ptr(),
        gy.data_ptr(),
        0,
        0,
        gx.data_ptr(),
        0,
        torch.get_num_threads(),
    )
    return gx


def _double_backward(c, gy, x, function):
    c, gy, x = contiguous(x.shape, c, gy, x)
    ggy, gx = like(x), like(x)
    _core().nn_activation(
        DOUBLE_BACKWARD,
        _FUNCTIONS[function],
        x.numel(),
        x.data_ptr(),
        gy.data_ptr(),
        c.data_ptr(),
        0,
        gx.data_ptr(),
        ggy.data_ptr(),
        torch.get_num_threads(),
    )
    return ggy, gx


def _differentiate(ctx, gy):
    if gy is None:
        return None, None
    (x,) = ctx.saved_tensors
    return activation_backward(gy, x, ctx.arguments[1]), None


def _differentiate_twice(ctx, c):
    if c is None:
        return None, None, None
    gy, x = ctx.saved_tensors
    return *activation_double_backward(c, gy, x, ctx.arguments[2]), None


activation = operator(
    "activation(Tensor x, str function) -> Tensor",
    _forward,
    lambda x, function: like(x),
    lambda args, y: args[:1],
    _differentiate,
)
activation_backward = operator(
    "activation_backward(Tensor gy, Tensor x, str function) -> Tensor",
    _backward,
    lambda gy, x, function: like(x),
    lambda args, gx: args[:2],
    _differentiate_twice,
)
activation_double_backward = operator(
    "activation_double_backward(Tensor c, Tensor gy, Tensor x, str function) -> (Tensor, Tensor)",
    _double_backward,
    lambda c, gy, x, function: (like(x), like(x)),
)


def _fits(input: Tensor) -> bool:
    return served(input) and not channels_last(input)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """As `torch.nn.functional.gelu`."""
    if approximate in ("none", "tanh") and _fits(input):
        return activation(input, "gelu" if approximate == "none" else "gelu_tanh")
    return F.gelu(input, approximate=approximate)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """As `torch.nn.functional.silu`."""
    return activation(input, "silu") if not inplace and _fits(input) else F.silu(input, inplace)


def tanh(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As `torch.tanh`."""
    return activation(input, "tanh") if out is None and _fits(input) else torch.tanh(input, out=out)


def sigmoid(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As `torch.sigmoid`."""
    return activation(input, "sigmoid") if out is None and _fits(input) else torch.sigmoid(input, out=out)
