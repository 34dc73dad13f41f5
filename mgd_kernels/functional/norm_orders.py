"""The second derivatives of any norm in torch's operators: right however often they are differentiated.

torch's own take the saved mean and deviation for constants, so that the third derivatives with respect to the input of
its LayerNorm, BatchNorm and InstanceNorm are wrong. Names as in `norm.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_kernels.functional._library import only_autograd

aten = torch.ops.aten


@dataclass(frozen=True)
class Layout:
    """shape: of the input in which what is normalised together are whole dimensions, `dims`. parameters: the shape in
    which weight and bias broadcast to it. centred: not of an RMS norm, which subtracts no mean."""

    shape: Sequence[int]
    dims: tuple[int, ...]
    parameters: Sequence[int]
    centred: bool = True

    @staticmethod
    def of_layers(width: int, centred: bool = True) -> Layout:
        return Layout((-1, width), (1,), (1, width), centred)

    @staticmethod
    def of_groups(x: Tensor, groups: int) -> Layout:
        batch, channels = x.shape[:2]
        return Layout((batch, groups, channels // groups, -1), (2, 3), (1, groups, channels // groups, 1))

    @staticmethod
    def of_batches(x: Tensor) -> Layout:
        return Layout((*x.shape[:2], -1), (0, 2), (1, x.shape[1], 1))

    def mean(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, keepdim=True)


def norm_double(
    c: Tensor | None, cw: Tensor | None, cb: Tensor | None, gy: Tensor, x: Tensor, weight: Tensor | None, eps: float,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The cotangents ggy, gx, gw of gy, x and weight. What is absent of c, cw, cb is 0; of weight, 1.

    With x̂ = (x - m) r, P u = u - m(u) - x̂ m(x̂ u) and a = weight gy, where m is the mean over a set (for an RMS norm
    x̂ = x r, P u = u - x̂ m(x̂ u)):

        ggy = weight r P c + cw x̂ + cb    gw = Σ gy r P c
        gx = r P(cw gy) - r² [m(c P a) x̂ + m(x̂ a) P c + m(x̂ c) P a]
    """
    original, m = x.shape, layout.mean
    x, gy = x.reshape(layout.shape), gy.reshape(layout.shape)
    c = x.new_zeros(1).expand(x.shape) if c is None else c.reshape(layout.shape)
    weight, cw, cb = (None if p is None else p.reshape(layout.parameters) for p in (weight, cw, cb))
    centred = x - m(x) if layout.centred else x
    r = (m(centred * centred) + eps).rsqrt()
    normal = centred * r

    def project(u: Tensor) -> Tensor:
        rest = u - normal * m(normal * u)
        return rest - m(u) if layout.centred else rest

    a = gy if weight is None else weight * gy
    pa, pc = project(a), project(c)
    ggy = r * pc if weight is None else weight * r * pc
    gx = -r * r * (m(c * pa) * normal + m(normal * a) * pc + m(normal * c) * pa)
    if cw is not None:
        ggy, gx = ggy + cw * normal, gx + r * project(cw * gy)
    if cb is not None:
        ggy = ggy + cb
    gw = (gy * r * pc).sum_to_size(layout.parameters)
    return ggy.reshape(original), gx.reshape(original), gw.reshape(-1)


# --- torch's norms, whose second derivatives are `norm_double` ----------------------------------------------------


def _wanted(ctx, *inputs: Tensor | None) -> list[bool]:
    return [x is not None and needed for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)]


class _Norm(torch.autograd.Function):
    """torch's layer norm over the last dimensions `shape`, or its batch norm in training where that is None."""

    @staticmethod
    def forward(ctx, x, weight, bias, shape, eps):
        if shape is None:
            y, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        else:
            y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.options = shape, eps
        return y

    @staticmethod
    def backward(ctx, gy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        shape, eps = ctx.options
        wanted = _wanted(ctx, x, weight, bias)
        if only_autograd():
            return *_NormBackward.apply(gy, x, weight, bias, mean, rstd, shape, eps, wanted), None, None
        return *_first(gy, x, weight, bias, mean, rstd, shape, eps, wanted), None, None  # a batch of cotangents


def _first(gy, x, weight, bias, mean, rstd, shape, eps, wanted):
    if shape is None:
        return aten.native_batch_norm_backward(gy, x, weight, None, None, mean, rstd, True, eps, wanted)
    return aten.native_layer_norm_backward(gy, x, shape, mean, rstd, weight, bias, wanted)


class _NormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gy, x, weight, bias, mean, rstd, shape, eps, wanted):
        ctx.save_for_backward(gy, x, weight)
        ctx.set_materialize_grads(False)
        ctx.options = shape, eps
        return _first(gy, x, weight, bias, mean, rstd, shape, eps, wanted)

    @staticmethod
    def backward(ctx, c, cw, cb):
        nothing = (None,) * 9
        if c is None and cw is None and cb is None:
            return nothing
        gy, x, weight = ctx.saved_tensors
        shape, eps = ctx.options
        layout = Layout.of_batches(x) if shape is None else Layout.of_layers(shape.numel())
        ggy, gx, gw = norm_double(c, cw, cb, gy, x, weight, eps, layout)
        return ggy, gx, None if weight is None else gw.view(weight.shape), *nothing[3:]


def torchs_layer_norm(input, normalized_shape, weight, bias, eps) -> Tensor:
    """torch's layer norm, with derivatives of any order where autograd alone observes it, and its tensors are wide."""
    if _serves(input, weight, bias):
        return _Norm.apply(input, weight, bias, torch.Size(normalized_shape), eps)
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def torchs_batch_norm(input, weight, bias, eps) -> Tensor:
    """torch's batch norm in training, without running statistics; as `torchs_layer_norm`."""
    if input.ndim > 1 and input.numel() > input.shape[1] and _serves(input, weight, bias):
        return _Norm.apply(input, weight, bias, None, eps)
    return F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)


def _serves(*tensors: Tensor | None) -> bool:
    """Not 16-bit tensors, whose statistics torch holds in float32."""
    present = [x for x in tensors if x is not None]
    return (
        only_autograd()
        and torch.is_grad_enabled()
        and all(x.dtype is present[0].dtype and x.dtype.itemsize >= 4 and x.numel() for x in present)
        and not torch.is_autocast_enabled(present[0].device.type)
    )
