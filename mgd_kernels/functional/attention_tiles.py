"""Attention whose matrix is never held, on a GPU: Triton's kernels, and the torch operators made of them.

Names and formulas are those of `attention_strips`. What a row's softmax needs again is kept, two numbers a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgd_kernels.backends import triton_attention
from mgd_kernels.errors import BadArgument
from mgd_kernels.functional import _library
from mgd_kernels.functional._library import like, operator, twice
from mgd_kernels.functional.attention_strips import plain_attention


def _check(q: Tensor) -> None:
    if not _library.on_gpu(q):
        raise BadArgument(f"expected tensors on a GPU; got {q.device}: `attention` takes the CPU's")


def _attention(q, k, v, mask, *options):
    _check(q)
    return triton_attention.forward(q, k, v, mask, *options)


def _backward(g, q, k, v, mask, o, statistics, *options):
    _check(q)
    return triton_attention.backward(g, q, k, v, mask, o, statistics, *options)


def _double_backward(cq, ck, cv, g, q, k, v, mask, o, statistics, *options):
    _check(q)
    return triton_attention.double_backward(cq, ck, cv, g, q, k, v, mask, o, statistics, *options)


def _differentiate(ctx, g, _):
    if g is None:
        return (None,) * 8
    if ctx.saved_tensors[3] is not None and ctx.needs_input_grad[4]:  # the first is the dispatcher's
        raise NotImplementedError("derivative with respect to the mask of tiled_attention is not implemented")
    q, k, v, mask, seed, o, statistics = ctx.saved_tensors
    scale, offset, _, dropout = ctx.arguments[4:]
    found = tiled_attention_backward(g, q, k, v, mask, o, statistics, scale, offset, seed, dropout)
    return *found, *[None] * 5


def _differentiate_twice(ctx, cq, ck, cv):
    if cq is None and ck is None and cv is None:
        return (None,) * 11
    *tensors, seed = ctx.saved_tensors
    scale, offset, _, dropout = ctx.arguments[7:]
    found = tiled_attention_double_backward(cq, ck, cv, *tensors, scale, offset, seed, dropout)
    return *found, *[None] * 7  # o and statistics count as functions of q, k and v


def plain_tiled_attention(q, k, v, mask, scale, offset, seed, dropout) -> Tensor:
    """The same in torch's operators, with the matrix in memory."""
    if seed is None:
        return plain_attention(q, k, v, mask, scale, offset, None, 0.0)
    z = triton_attention.factors(q.detach().new_empty(1).expand(*q.shape[:3], k.shape[2]), seed, dropout)
    return plain_attention(q, k, v, mask, scale, offset, None, 0.0, z.to(q.dtype))


def _plain_double_backward(cq, ck, cv, g, q, k, v, mask, o, statistics, *options):
    return twice(lambda *x: plain_tiled_attention(*x, mask, *options), [q, k, v], [g], [cq, ck, cv])


_OPTIONS = "float scale, SymInt? offset, Tensor? seed, float dropout"

tiled_attention = operator(
    f"tiled_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, {_OPTIONS}) -> (Tensor, Tensor)",
    _attention,
    lambda q, k, v, *_: (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(2, *q.shape[:3], dtype=torch.float32),
    ),
    lambda args, out: (*args[:4], args[6], *out),
    _differentiate,
    non_differentiable=slice(1, 2),
    gpu=True,
)
tiled_attention_backward = operator(
    "tiled_attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor o, Tensor statistics,"
    f" {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda g, q, k, v, *_: (like(q), like(k), like(v)),
    lambda args, out: (*args[:7], args[9]),
    _differentiate_twice,
    gpu=True,
)
tiled_attention_double_backward = operator(
    "tiled_attention_double_backward(Tensor? cq, Tensor? ck, Tensor? cv, Tensor g, Tensor q, Tensor k, Tensor v,"
    f" Tensor? mask, Tensor o, Tensor statistics, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _double_backward,
    lambda cq, ck, cv, g, q, k, v, *_: (like(g), like(q), like(k), like(v)),
    plain=_plain_double_backward,
    gpu=True,
)
