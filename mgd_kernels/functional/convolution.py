"""Convolutions whose second derivatives are convolutions of the first kind.

torch computes the derivative of an input's gradient with respect to the weights as a convolution whose kernel is an
image as large as the output: as many multiplications as the weights' gradient itself, 1.5 to 5 times slower on a CPU.
Here it is that gradient. With x, w, b input, weight and bias, gy the cotangent of y = conv(x, w) + b, and cx, cw, cb
cotangents of gx, gw, gb:

    ggy = conv(cx, w) + conv(x, cw) + cb,  gx' = input gradient of (gy, cw),  gw' = weight gradient of (gy, cx).

They serve any device and floating-point dtype in reverse mode; from the third derivative on, torch's formulas take
over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from mgd_kernels.functional._library import only_autograd

aten = torch.ops.aten
# Stride, padding, dilation, whether it is transposed, output padding, groups: as `aten.convolution` takes them.
Settings = tuple[list[int], list[int], list[int], bool, list[int], int]


class _Convolution(Function):
    @staticmethod
    def forward(ctx, x, w, b, settings: Settings):
        ctx.save_for_backward(x, w)
        ctx.bias, ctx.settings = None if b is None else list(b.shape), settings
        return aten.convolution(x, w, b, *settings)

    @staticmethod
    def backward(ctx, gy):
        arguments = gy, *ctx.saved_tensors, ctx.bias, ctx.settings, list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            return *_Backward.apply(*arguments), None
        return *_gradients(*arguments), None


class _Backward(Function):
    @staticmethod
    def forward(ctx, gy, x, w, bias, settings, mask):
        ctx.save_for_backward(gy, x, w)
        ctx.bias, ctx.settings = bias, settings
        ctx.set_materialize_grads(False)
        return _gradients(gy, x, w, bias, settings, mask)

    @staticmethod
    def backward(ctx, cx, cw, cb):
        gy, x, w = ctx.saved_tensors
        wanted, settings = ctx.needs_input_grad, ctx.settings
        ggy = gx = gw = None
        if wanted[0]:
            pairs = [pair for pair in ((cx, w), (x, cw)) if pair[0] is not None and pair[1] is not None]
            terms = [aten.convolution(*pair, cb if i == 0 else None, *settings) for i, pair in enumerate(pairs)]
            if not terms and cb is not None:
                terms = [cb.view(1, -1, *[1] * (gy.ndim - 2)).expand_as(gy)]
            ggy = sum(terms[1:], start=terms[0]) if terms else None
        if wanted[1] and cw is not None:
            gx = _gradients(gy, x, cw, None, settings, [True, False, False])[0]
        if wanted[2] and cx is not None:
            gw = _gradients(gy, cx, w, None, settings, [False, True, False])[1]
        return ggy, gx, gw, None, None, None


def _gradients(
    gy: Tensor, x: Tensor, w: Tensor, bias: list[int] | None, settings: Settings, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias, of which `mask` says which are wanted."""
    return aten.convolution_backward(gy, x, w, bias, *settings, mask)


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None, dimensions: int, padding: Any) -> bool:
    """Whether there will be a derivative by autograd alone, of a batch with padding in numbers."""
    tensors = [x for x in (input, weight, bias) if x is not None]
    return (
        torch.is_grad_enabled()
        and any([x.requires_grad for x in tensors])
        and input.ndim == dimensions + 2
        and not isinstance(padding, str)
        and all([x.is_floating_point() and x.layout is torch.strided for x in tensors])
        and len({x.dtype for x in tensors}) == 1
        and not torch.is_autocast_enabled(input.device.type)
        and only_autograd()
    )


def _each(value: int | Sequence[int], dimensions: int) -> list[int]:
    """One number per dimension."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dimensions if len(numbers) == 1 else numbers


def _apply(
    input, weight, bias, dimensions, stride, padding, dilation, groups, transposed=False, output_padding=0
) -> Tensor:
    stride, padding, dilation, output_padding = (
        _each(value, dimensions) for value in (stride, padding, dilation, output_padding)
    )
    return _Convolution.apply(input, weight, bias, (stride, padding, dilation, transposed, output_padding, groups))


def _convolution(torchs: Callable[..., Tensor], dimensions: int) -> Callable[..., Tensor]:
    def convolution(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if not _fits(input, weight, bias, dimensions, padding):
            return torchs(input, weight, bias, stride, padding, dilation, groups)
        return _apply(input, weight, bias, dimensions, stride, padding, dilation, groups)

    return _named_as(torchs, convolution)


def _transposed(torchs: Callable[..., Tensor], dimensions: int) -> Callable[..., Tensor]:
    def convolution(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        if not _fits(input, weight, bias, dimensions, padding):
            return torchs(input, weight, bias, stride, padding, output_padding, groups, dilation)
        return _apply(input, weight, bias, dimensions, stride, padding, dilation, groups, True, output_padding)

    return _named_as(torchs, convolution)


def _named_as(torchs: Callable[..., Tensor], function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    function.__name__ = torchs.__name__
    function.__doc__ = f"As `torch.nn.functional.{torchs.__name__}`."
    return function


conv1d, conv2d, conv3d = (_convolution(f, n) for n, f in enumerate((F.conv1d, F.conv2d, F.conv3d), start=1))
conv_transpose1d, conv_transpose2d, conv_transpose3d = (
    _transposed(f, n) for n, f in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), start=1)
)
