"""Softmax over rows, with scale and mask, and attention made of it and batched matrix products."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from mgd_kernels.backends import triton_nn
from mgd_kernels.backends.cpu import _core
from mgd_kernels.functional import _library
from mgd_kernels.functional._library import (
    BACKWARD,
    DOUBLE_BACKWARD,
    FORWARD,
    address,
    addresses,
    contiguous,
    like,
    operator,
    served,
    served_by_products,
)
from mgd_kernels.functional.attention_strips import attention
from mgd_kernels.functional.attention_tiles import served_by_tiles, tiled_attention

# p = softmax(scale x + mask) over the last dimension; gp, gx cotangents of p and x; c that of gx; ggp that of gp.
# causal: row i of a matrix [..., rows, columns] sees the columns 0..i. mask: [B or 1, H or 1, L or 1, S] for x
# [B, H, L, S], whose cotangent is gx / scale; a row that it hides altogether has p = 0.


def _call(pass_, scale, causal, mask=None, x=None, gp=None, c=None, p=None, gx=None, ggp=None, gp_again=None) -> None:
    if _library.on_gpu(p):
        return triton_nn.softmax(pass_, scale, causal, mask, x, gp, c, p, gx, ggp, gp_again)
    steps = (1, 1, 0, 0, 0) if mask is None else (*p.shape[1:3], *mask.expand(p.shape).stride()[:3])
    tensors = (x, gp, c, p, gx, ggp, gp_again)
    width = p.shape[-1]
    _core().nn_softmax(
        pass_,
        p.numel() // width,
        width,
        p.shape[-2] if causal else 0,
        scale,
        address(mask),
        steps,
        *addresses(tensors),
        torch.get_num_threads(),
    )


def _softmax(x, mask, scale, causal):
    (x,) = contiguous(x.shape, x)
    if mask is not None:
        broadcast = [m if m == 1 else n for m, n in zip(mask.shape[:-1], x.shape, strict=False)]
        (mask,) = contiguous((*broadcast, x.shape[-1]), mask)
    p = like(x)
    _call(FORWARD, scale, causal, mask, x=x, p=p)
    return p


def _softmax_backward(gp, p, scale, causal):
    gp, p = contiguous(p.shape, gp, p)
    gx = like(p)
    _call(BACKWARD, scale, causal, gp=gp, p=p, gx=gx)
    return gx


def _softmax_double_backward(c, gp, p, scale, causal):
    c, gp, p = contiguous(p.shape, c, gp, p)
    ggp, again = like(p), like(p)
    _call(DOUBLE_BACKWARD, scale, causal, gp=gp, c=c, p=p, ggp=ggp, gp_again=again)
    return ggp, again


def _differentiate(ctx, gp):
    if gp is None:
        return None, None, None, None
    p, mask = ctx.saved_tensors
    scale, causal = ctx.arguments[2:]
    if mask is None or not mask.requires_grad:
        return softmax_backward(gp, p, scale, causal), None, None, None
    logits = softmax_backward(gp, p, 1.0, causal)
    return logits if scale == 1.0 else scale * logits, logits.sum_to_size(mask.shape), None, None


def _differentiate_twice(ctx, c):
    if c is None:
        return None, None, None, None
    gp, p = ctx.saved_tensors
    return *softmax_double_backward(c, gp, p, *ctx.arguments[2:]), None, None


def _plain_double_backward(c, gp, p, scale, causal):
    d, e = ((p * x).sum(-1, keepdim=True) for x in (gp, c))
    return scale * p * (c - e), scale * (c * (gp - d) - gp * e)


softmax_forward = operator(
    "softmax(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor",
    _softmax,
    lambda x, mask, scale, causal: like(x),
    lambda args, p: (p, args[1]),
    _differentiate,
    gpu=True,
)
softmax_backward = operator(
    "softmax_backward(Tensor gp, Tensor p, float scale, bool causal) -> Tensor",
    _softmax_backward,
    lambda gp, p, scale, causal: like(p),
    lambda args, gx: args[:2],
    _differentiate_twice,
    gpu=True,
)
softmax_double_backward = operator(
    "softmax_double_backward(Tensor c, Tensor gp, Tensor p, float scale, bool causal) -> (Tensor, Tensor)",
    _softmax_double_backward,
    lambda c, gp, p, scale, causal: (like(p), like(p)),
    plain=_plain_double_backward,
    gpu=True,
)


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:  # fmt: skip
    """As `torch.nn.functional.softmax`; the last dimension is the one that is fused."""
    if dim is not None and dtype in (None, torch.float32) and dim in (-1, input.ndim - 1) and _rows_served(input):
        return softmax_forward(input, None, 1.0, False)
    return F.softmax(input, dim, _stacklevel, dtype)


def _rows_served(x: Tensor) -> bool:
    return x.ndim > 0 and served(x, gpu=True, width=x.shape[-1])


LARGE = 1 << 20
"""Elements of a head's matrix from which strips serve. At 1024 x 1024 they take 0.4 to 1 of the time of whole matrices,
at 512 x 512 0.8 to 1.1."""


def _without_matrix(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa) -> Tensor | None:
    """By strips on a CPU, by tiles on a GPU; None where neither serves."""
    if not 3 <= query.ndim <= 4 or not query.ndim == key.ndim == value.ndim or not 0.0 <= dropout_p < 1.0:
        return None
    tiles = _library.on_gpu(query)
    if tiles:
        if not served_by_tiles(query, key, value):
            return None
    elif query.shape[-2] * key.shape[-2] < LARGE or not served_by_products(query, key, value):
        return None
    q, k, v = (x if x.ndim == 4 else x[None] for x in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    fits = (
        k.shape[:3] == v.shape[:3]
        and (q.shape[0], q.shape[1], q.shape[3]) == (k.shape[0], groups * k.shape[1], k.shape[3])
        and (groups == 1 or enable_gqa)
    )
    offset = 0 if is_causal else None
    if isinstance(mask, CausalBias) and offset is None:
        lower_right = mask.variant == CausalVariant.LOWER_RIGHT
        mask, offset = None, k.shape[2] - q.shape[2] if lower_right else 0
    if mask is not None and fits:
        mask = mask[(None,) * (4 - mask.ndim)]
        fits = (
            offset is None
            and mask.ndim == 4
            and mask.dtype in (torch.bool, q.dtype)
            and mask.device == q.device
            and all(m in (1, n) for m, n in zip(mask.shape, (*q.shape[:3], k.shape[2]), strict=True))
        )
    if not fits:
        return None
    seed = torch.randint(1 << 62, (), device=q.device) if dropout_p else None
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    arguments = q, k, v, mask, scale, offset, seed, float(dropout_p)
    return tiled_attention(*arguments)[0] if tiles else attention(*arguments)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `torch.nn.functional.scaled_dot_product_attention`: query `[..., L, E]`, key `[..., S, E]`, value
    `[..., S, D]`. On a CPU from L S = 2^20 on by strips of queries, on a GPU that has kernels by tiles, of float32,
    bfloat16 or float16 heads of at most 128 elements: neither ever holds `[L, S]`, unless a mask does, and dropout has
    other masks than torch's, from a seed that torch's generator draws. Else, queries, keys and values of the same
    leading dimensions, two where there is a mask or queries are grouped. A mask that hides what `is_causal` does gives
    the same bits, and grouped queries those of keys and values that are repeated."""
    o = _without_matrix(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if o is not None:
        return o.view(*query.shape[:-1], value.shape[-1])
    if enable_gqa and _grouped(query, key, value):
        key, value, enable_gqa = _repeated(key, query), _repeated(value, query), False
    leading = query.shape[:-2]
    fits = (
        served(query, key, value, gpu=True, width=key.shape[-2] if key.ndim > 1 else 0)
        and not enable_gqa
        and query.ndim >= 3
        and leading == key.shape[:-2] == value.shape[:-2]
        and key.shape[-2] == value.shape[-2]
        and query.shape[-1] == key.shape[-1]
        and (
            attn_mask is None
            or (not is_causal and _fits(attn_mask, query.device, (*leading, query.shape[-2], key.shape[-2])))
        )
    )
    if not fits:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
    logits = torch.bmm(q, k.transpose(1, 2)).view(*leading, query.shape[-2], key.shape[-2])
    p = softmax_forward(logits, None if attn_mask is None else _added(attn_mask), scale, is_causal)
    if dropout_p > 0.0:
        p = F.dropout(p, dropout_p)
    return torch.bmm(p.view(-1, *p.shape[-2:]), v).view(*query.shape[:-1], value.shape[-1])


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        query.ndim == key.ndim == value.ndim == 4
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1] == value.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0
    )


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """Heads of keys or values, one for each of the queries."""
    return x[:, :, None].expand(-1, -1, query.shape[1] // x.shape[1], -1, -1).flatten(1, 2)


def _fits(mask: Tensor, device: torch.device, shape: tuple[int, ...]) -> bool:
    """Whether the mask can be taken to logits of this shape."""
    return (
        (mask.dtype is torch.bool or served(mask, gpu=True))
        and mask.device == device
        and len(shape) == 4 >= mask.ndim > 0
        and mask.shape[-1] == shape[-1]
        and all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(shape), strict=False))
    )


def _added(mask: Tensor) -> Tensor:
    """What is added to logits, `[., ., ., S]`: of a boolean mask, minus infinity where it is false."""
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -math.inf)
    return mask.view(*[1] * (4 - mask.ndim), *mask.shape)
