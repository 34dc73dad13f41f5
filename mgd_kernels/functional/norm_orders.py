"""The second derivatives of any norm in torch's operators: right however often they are differentiated.

torch's own take the saved mean and deviation for constants, so that the third derivatives with respect to the input of
its LayerNorm, BatchNorm and InstanceNorm are wrong. Names as in `norm.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """shape: of the input in which what is normalised together are whole dimensions, `dims`. parameters: the shape in
    which weight and bias broadcast to it."""

    shape: Sequence[int]
    dims: tuple[int, ...]
    parameters: Sequence[int]

    @staticmethod
    def of_layers(width: int) -> Layout:
        return Layout((-1, width), (1,), (1, width))

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

    With x̂ = (x - m) r, P u = u - m(u) - x̂ m(x̂ u) and a = weight gy, where m is the mean over a set:

        ggy = weight r P c + cw x̂ + cb    gw = Σ gy r P c
        gx = r P(cw gy) - r² [m(c P a) x̂ + m(x̂ a) P c + m(x̂ c) P a]
    """
    original, m = x.shape, layout.mean
    x, gy = x.reshape(layout.shape), gy.reshape(layout.shape)
    c = x.new_zeros(1).expand(x.shape) if c is None else c.reshape(layout.shape)
    weight, cw, cb = (None if p is None else p.reshape(layout.parameters) for p in (weight, cw, cb))
    centred = x - m(x)
    r = (m(centred * centred) + eps).rsqrt()
    normal = centred * r

    def project(u: Tensor) -> Tensor:
        return u - m(u) - normal * m(normal * u)

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
