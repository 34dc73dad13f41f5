"""Rotary position embeddings: y = x cos + rot(x) sin, rot((x1, x2)) = (-x2, x1), one pass over memory.

y is linear in x and in (cos, sin). So there are two operators, `rotary` with its transposed map and the sums that are
the cotangents of cos and sin, and each is differentiated by the other, any number of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgd_kernels.backends.cpu import _core
from mgd_kernels.errors import BadArgument
from mgd_kernels.functional._library import addresses, contiguous, like, operator, served


def _rows(x: Tensor) -> Tensor:
    """x `[B, H, L, E]`, whose last dimension at least lies in one piece."""
    if x.dtype is not torch.float32 or x.ndim != 4:
        raise BadArgument(f"expected a float32 tensor [B, H, L, E]; got {x.dtype} {list(x.shape)}")
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def _angles(batch: int, x: Tensor) -> tuple[int, ...]:
    """The shape of cos and sin. batch: 1 where all examples share them."""
    return batch, 1, *x.shape[2:]


def _rotate(x, cos, sin, transposed):
    x, y = _rows(x), like(x)
    shared = cos.shape[0] == 1
    cos, sin = contiguous(_angles(1 if shared else x.shape[0], x), cos, sin)
    _core().nn_rotary(x.shape, shared, transposed, x.stride(), *addresses((x, cos, sin, y)), torch.get_num_threads())
    return y


def _add_up(gy, x, batch):
    if gy.shape != x.shape or batch not in (1, x.shape[0]):
        raise BadArgument(f"expected two tensors of one shape; got {list(gy.shape)} and {list(x.shape)}")
    gy, x = _rows(gy), _rows(x)
    gcos, gsin = (x.new_empty(_angles(batch, x)) for _ in range(2))
    _core().nn_rotary_sums(
        x.shape, batch == 1, gy.stride(), x.stride(), *addresses((gy, x, gcos, gsin)), torch.get_num_threads()
    )
    return gcos, gsin


def _differentiate(ctx, gy):
    if gy is None:
        return None, None, None, None
    (x, cos, sin), transposed = ctx.saved_tensors, ctx.arguments[3]
    gx = rotate(gy, cos, sin, not transposed)
    if not (cos.requires_grad or sin.requires_grad):
        return gx, None, None, None
    return gx, *sums(*((x, gy) if transposed else (gy, x)), cos.shape[0]), None


def _differentiate_sums(ctx, ccos, csin):
    if ccos is None and csin is None:
        return None, None, None
    ccos = torch.zeros_like(csin) if ccos is None else ccos
    csin = torch.zeros_like(ccos) if csin is None else csin
    gy, x = ctx.saved_tensors
    return rotate(x, ccos, csin, False), rotate(gy, ccos, csin, True), None


rotate = operator(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool transposed) -> Tensor",
    _rotate,
    lambda x, cos, sin, transposed: like(x),
    lambda args, y: args[:3],
    _differentiate,
)
sums = operator(
    "rotary_sums(Tensor gy, Tensor x, SymInt batch) -> (Tensor, Tensor)",
    _add_up,
    lambda gy, x, batch: (x.new_empty(_angles(batch, x)), x.new_empty(_angles(batch, x))),
    lambda args, out: args[:2],
    _differentiate_sums,
)


def rotary_fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the operator takes these: float32, `[B, H, L, E]` and twice `[B or 1, 1, L, E]`, E even."""
    return (
        x.ndim == cos.ndim == 4
        and x.shape[-1] % 2 == 0
        and cos.shape[0] in (1, x.shape[0])
        and cos.shape == sin.shape == (cos.shape[0], 1, *x.shape[2:])
        and served(x, cos, sin)
    )


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x cos + rot(x) sin`; cos and sin can be broadcast to x `[..., E]`."""
    if rotary_fits(x, cos, sin):
        return rotate(x, cos, sin, False)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
