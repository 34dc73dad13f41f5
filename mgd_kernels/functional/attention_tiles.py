"""Attention whose matrix is never held, on a GPU: Triton's kernels, and the torch operators made of them.

Names and formulas are those of `attention_strips`. What a row's softmax needs again is kept, two numbers a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgd_kernels.backends import triton_attention
from mgd_kernels.errors import BadArgument
from mgd_kernels.functional import _library
from mgd_kernels.functional._library import like, operator, served
from mgd_kernels.functional.attention_strips import empty_cotangents, plain_attention, plain_double_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def served_by_tiles(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there are kernels for these, `[..., L, E]`, `[..., S, E]` and `[..., S, D]`, on a GPU."""
    return (
        _library.on_gpu(q)
        and q.dtype == k.dtype == v.dtype
        and not torch._C._are_functorch_transforms_active()
        and served(q, k, v, gpu=True, dtypes=DTYPES)
        and triton_attention.served(q.device, q.shape[-1], v.shape[-1])
    )


def _check(q, k, v, mask, seed, like_q=(), like_k=(), like_o=(), statistics=None, mask_gradient=False) -> None:
    """The kernels take addresses: what is not checked here could read memory that is not ours."""
    if not _library.on_gpu(q):
        raise BadArgument(f"expected tensors on a GPU; got {q.device}: `attention` takes the CPU's")
    batch, heads, length, width = q.shape
    shared, keys, depth = v.shape[1:]
    rows = batch, heads, length
    expected = [(x, q.shape, q.dtype) for x in like_q]
    expected += [(x, (batch, shared, keys, width), q.dtype) for x in (k, *like_k)]
    expected += [(x, (*rows, depth), q.dtype) for x in like_o]
    expected += [(v, (batch, shared, keys, depth), q.dtype), (statistics, (2, *rows), torch.float32)]
    expected += [(seed, (), torch.int64)]
    wrong = [f"{x.dtype} {list(x.shape)}" for x, *wanted in expected if x is not None and [x.shape, x.dtype] != wanted]
    if mask is not None and (
        mask.ndim != 4
        or mask.dtype not in (torch.bool, q.dtype)
        or any(m not in (1, n) for m, n in zip(mask.shape, (*rows, keys), strict=True))
    ):
        wrong.append(f"a mask {mask.dtype} {list(mask.shape)}")
    if mask_gradient and (mask is None or mask.dtype is torch.bool):
        wrong.append("no mask that has a gradient")
    others = [x for x, *_ in expected if x is not None] + ([] if mask is None else [mask])
    wrong += [f"a tensor on {x.device}" for x in others if x.device != q.device]
    if wrong or q.dtype not in DTYPES or heads % shared or not triton_attention.served(q.device, width, depth):
        raise BadArgument(
            f"expected tensors that go with queries {q.dtype} {list(q.shape)} on {q.device}, in heads of at most "
            f"{triton_attention.WIDEST} elements, and {shared} heads of keys; got {', '.join(wrong) or 'these'}: the "
            "operators mgd_kernels:: take what their functions in mgd_kernels.functional pass to them"
        )


def _attention(q, k, v, mask, scale, offset, seed, dropout):
    _check(q, k, v, mask, seed)
    return triton_attention.forward(q, k, v, mask, scale, offset, seed, dropout)


def _backward(g, q, k, v, mask, mask_gradient, o, statistics, scale, offset, seed, dropout):
    _check(q, k, v, mask, seed, like_o=(g, o), statistics=statistics, mask_gradient=mask_gradient)
    return triton_attention.backward(g, q, k, v, mask, mask_gradient, o, statistics, scale, offset, seed, dropout)


def _double_backward(cq, ck, cv, cm, g, q, k, v, mask, mask_gradient, o, statistics, scale, offset, seed, dropout):
    _check(q, k, v, mask, seed, (cq,), (ck,), (g, o), statistics, mask_gradient or cm is not None)
    _check(q, k, v if cv is None else cv, mask if cm is None else cm, seed)
    if cm is not None and cm.shape != mask.shape:
        raise BadArgument(f"expected a cotangent of the mask {list(mask.shape)}; got {list(cm.shape)}")
    return triton_attention.double_backward(
        cq, ck, cv, cm, g, q, k, v, mask, mask_gradient, o, statistics, scale, offset, seed, dropout
    )  # fmt: skip


def _differentiate(ctx, g, _):
    if g is None:
        return (None,) * 8
    q, k, v, mask, seed, o, statistics = ctx.saved_tensors
    wanted = mask is not None and ctx.needs_input_grad[4]  # the first is the dispatcher's
    scale, offset, _, dropout = ctx.arguments[4:]
    *found, dm = tiled_attention_backward(g, q, k, v, mask, wanted, o, statistics, scale, offset, seed, dropout)
    return *found, dm if wanted else None, *[None] * 4


def _differentiate_twice(ctx, cq, ck, cv, cm):
    cm = cm if ctx.arguments[5] else None
    if cq is None and ck is None and cv is None and cm is None:
        return (None,) * 12
    g, q, k, v, mask, o, statistics, seed = ctx.saved_tensors
    wanted = mask is not None and ctx.needs_input_grad[5]
    scale, offset, _, dropout = ctx.arguments[8:]
    given = cq, ck, cv, cm, g, q, k, v, mask, wanted, o, statistics
    *found, dm = tiled_attention_double_backward(*given, scale, offset, seed, dropout)
    return *found, dm if wanted else None, *[None] * 7  # o and statistics count as functions of q, k, v and mask


def plain_tiled_attention(q, k, v, mask, scale, offset, seed, dropout) -> Tensor:
    """The same in torch's operators, with the matrix in memory."""
    if seed is None:
        return plain_attention(q, k, v, mask, scale, offset, None, 0.0)
    z = triton_attention.factors(q.detach().new_empty(1).expand(*q.shape[:3], k.shape[2]), seed, dropout)
    return plain_attention(q, k, v, mask, scale, offset, None, 0.0, z.to(q.dtype))


def _plain_double_backward(*given):
    *tensors, _, _, scale, offset, seed, dropout = given  # without the output and the statistics
    return plain_double_backward(plain_tiled_attention, *tensors, scale, offset, seed, dropout)


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
    "tiled_attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, bool mask_gradient, Tensor o,"
    f" Tensor statistics, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda g, q, k, v, mask, mask_gradient, *_: empty_cotangents(q, k, v, mask, mask_gradient),
    lambda args, out: (*args[:5], *args[6:8], args[10]),
    _differentiate_twice,
    gpu=True,
)
tiled_attention_double_backward = operator(
    "tiled_attention_double_backward(Tensor? cq, Tensor? ck, Tensor? cv, Tensor? cm, Tensor g, Tensor q, Tensor k,"
    f" Tensor v, Tensor? mask, bool mask_gradient, Tensor o, Tensor statistics, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _double_backward,
    lambda cq, ck, cv, cm, g, *given: (like(g), *empty_cotangents(*given[:5])),
    plain=_plain_double_backward,
    gpu=True,
)
