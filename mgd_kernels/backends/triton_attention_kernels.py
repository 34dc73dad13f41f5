"""Triton kernels of attention and its first two derivatives, by tiles: no `[L, S]` in memory, and no atomics.

Names and formulas are those of `mgd_kernels.functional.attention_strips`. One program has a tile of queries and goes
over the keys that they see (the row passes), or a tile of keys, over the query heads that share them in order and their
queries (the column passes), or a tile of the mask, over all that it was broadcast to in order. Each writes its tile
alone, so that the order of every sum follows from shapes. float32 accumulation; 16-bit inputs become float32 as they
are read. Keys and their cotangents come centred and in float32.

    largest, weight, [2, B, H, L]: largest = max s, and weight = 1 / sum e^(s - largest): P = e^(s - largest) weight
    delta = g o = <P M>    alpha = <P X>    epsilon = g (cotangent of g)    dS = P (M - delta)    R = P (X - alpha)
    U = P ((X - alpha) (M - delta) + Z g cvT - epsilon)

A row that sees nothing has largest = inf and weight = 0: its P is 0 everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgd_kernels.backends.triton_attention_parts import (
    _across,
    _first,
    _kept,
    _last,
    _masked,
    _place,
    _plus,
    _probabilities,
    _put,
    _rows,
    _tangents,
)
from mgd_kernels.backends.triton_nn_kernels import _exponential

UNSPECIALIZED = ("heads", "group", "length", "keys", "step_b", "step_h", "step_i", "offset")  # values compile nothing
MASKS = ("batch", "mask_b", "mask_h", "mask_i", "mask_j")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q, k, v, mask, seed, o, largest, weight, heads, group, length, keys, width, depth, step_b, step_h, step_i, step_j,
    scale, offset, dropout, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    matrix, i = _place(length, ROWS)
    shared = matrix // heads * (heads // group) + matrix % heads // group
    q += matrix * length * width
    k += shared * keys * width
    v += shared * keys * depth
    if mask is not None:
        mask += matrix // heads * step_b + matrix % heads * step_h
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, _last(i, keys, offset, CAUSAL), KEYS):
        j = start + tl.arange(0, KEYS).to(tl.int64)
        s = _across(q, k, i, j, length, keys, width, BLOCK, CHUNK, PRECISION) * scale
        s = _masked(s, mask, i[:, None], j[None, :], length, keys, step_i, step_j, offset, CAUSAL)
        now = tl.maximum(most, tl.max(s, axis=1))
        base = tl.where(now == float("-inf"), 0.0, now)
        before = tl.where(most == float("-inf"), 0.0, _exponential(most - base))
        p = tl.where(s == float("-inf"), 0.0, _exponential(s - base[:, None]))
        total = total * before + tl.sum(p, axis=1)
        p = _kept(p, seed, matrix, i[:, None], j[None, :], dropout)
        out = tl.dot(p, _rows(v, j, keys, depth, BLOCK), out * before[:, None], input_precision=PRECISION)
        most = now
    share = tl.where(total == 0.0, 0.0, tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total)))
    _put(o + matrix * length * depth, i, length, depth, out * share[:, None], BLOCK)
    at = matrix * length + i
    tl.store(largest + at, tl.where(most == float("-inf"), float("inf"), most), i < length)
    tl.store(weight + at, share, i < length)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_rows_kernel(
    g, q, k, v, mask, seed, o, largest, weight, dq, delta, heads, group, length, keys, width, depth, step_b, step_h,
    step_i, step_j, scale, offset, dropout, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta [B, H, L] for the passes to come."""
    matrix, i = _place(length, ROWS)
    shared = matrix // heads * (heads // group) + matrix % heads // group
    q += matrix * length * width
    g += matrix * length * depth
    k += shared * keys * width
    v += shared * keys * depth
    if mask is not None:
        mask += matrix // heads * step_b + matrix % heads * step_h
    most = tl.load(largest + matrix * length + i, i < length, float("inf"))[:, None]
    share = tl.load(weight + matrix * length + i, i < length, 0.0)[:, None]
    d = tl.sum(_rows(g, i, length, depth, BLOCK) * _rows(o + matrix * length * depth, i, length, depth, BLOCK), axis=1)
    tl.store(delta + matrix * length + i, d, i < length)
    out = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, _last(i, keys, offset, CAUSAL), KEYS):
        j = start + tl.arange(0, KEYS).to(tl.int64)
        s = _across(q, k, i, j, length, keys, width, BLOCK, CHUNK, PRECISION) * scale
        s = _masked(s, mask, i[:, None], j[None, :], length, keys, step_i, step_j, offset, CAUSAL)
        p = _probabilities(s, most, share)
        m = _kept(
            _across(g, v, i, j, length, keys, depth, BLOCK, CHUNK, PRECISION),
            seed,
            matrix,
            i[:, None],
            j[None, :],
            dropout,
        )
        ds = tl.where(s == float("-inf"), 0.0, p * (m - d[:, None]))
        out = tl.dot(ds, _rows(k, j, keys, width, BLOCK), out, input_precision=PRECISION)
    _put(dq + matrix * length * width, i, length, width, out * scale, BLOCK)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_columns_kernel(
    g, q, k, v, mask, seed, largest, weight, delta, dk, dv, heads, group, length, keys, width, depth, step_b, step_h,
    step_i, step_j, scale, offset, dropout, CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    shared, j = _place(keys, KEYS)
    k += shared * keys * width
    v += shared * keys * depth
    out_k = tl.zeros((KEYS, BLOCK), tl.float32)
    out_v = tl.zeros((KEYS, BLOCK), tl.float32)
    for matrix in range(shared * group, shared * group + group):
        queries = q + matrix * length * width
        cotangent = g + matrix * length * depth
        seen_by = mask
        if mask is not None:
            seen_by = mask + matrix // heads * step_b + matrix % heads * step_h
        for start in range(_first(j, offset, ROWS, CAUSAL), length, ROWS):
            i = start + tl.arange(0, ROWS).to(tl.int64)
            at = matrix * length + i
            most = tl.load(largest + at, i < length, float("inf"))[None, :]
            share = tl.load(weight + at, i < length, 0.0)[None, :]
            d = tl.load(delta + at, i < length, 0.0)[None, :]
            s = _across(k, queries, j, i, keys, length, width, BLOCK, CHUNK, PRECISION) * scale
            s = _masked(s, seen_by, i[None, :], j[:, None], length, keys, step_i, step_j, offset, CAUSAL)
            p = _probabilities(s, most, share)
            m = _across(v, cotangent, j, i, keys, length, depth, BLOCK, CHUNK, PRECISION)
            m = _kept(m, seed, matrix, i[None, :], j[:, None], dropout)
            ds = tl.where(s == float("-inf"), 0.0, p * (m - d))
            out_k = tl.dot(ds, _rows(queries, i, length, width, BLOCK), out_k, input_precision=PRECISION)
            p = _kept(p, seed, matrix, i[None, :], j[:, None], dropout)
            out_v = tl.dot(p, _rows(cotangent, i, length, depth, BLOCK), out_v, input_precision=PRECISION)
    _put(dk + shared * keys * width, j, keys, width, out_k * scale, BLOCK)
    _put(dv + shared * keys * depth, j, keys, depth, out_v, BLOCK)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def twice_rows_kernel(
    cq, ck, cv, cm, g, q, k, v, mask, seed, o, largest, weight, delta, gg, cotangent_q, alpha, epsilon, heads, group,
    length, keys, width, depth, step_b, step_h, step_i, step_j, scale, offset, dropout, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The cotangents of g and of q, in two sweeps over the keys, and delta, alpha and epsilon for the column pass."""
    matrix, i = _place(length, ROWS)
    shared = matrix // heads * (heads // group) + matrix % heads // group
    q += matrix * length * width
    g += matrix * length * depth
    k += shared * keys * width
    v += shared * keys * depth
    if cq is not None:
        cq += matrix * length * width
    if ck is not None:
        ck += shared * keys * width
    if cv is not None:
        cv += shared * keys * depth
    if mask is not None:
        mask += matrix // heads * step_b + matrix % heads * step_h
    if cm is not None:
        cm += matrix // heads * step_b + matrix % heads * step_h
    most = tl.load(largest + matrix * length + i, i < length, float("inf"))[:, None]
    share = tl.load(weight + matrix * length + i, i < length, 0.0)[:, None]
    last = _last(i, keys, offset, CAUSAL)
    a = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, last, KEYS):
        j = start + tl.arange(0, KEYS).to(tl.int64)
        s = _across(q, k, i, j, length, keys, width, BLOCK, CHUNK, PRECISION) * scale
        s = _masked(s, mask, i[:, None], j[None, :], length, keys, step_i, step_j, offset, CAUSAL)
        p = _probabilities(s, most, share)
        x = _tangents(q, k, cq, ck, i, j, length, keys, width, scale, BLOCK, CHUNK, PRECISION)
        x = _plus(x, cm, i[:, None], j[None, :], length, keys, step_i, step_j)
        x = tl.where(s == float("-inf"), 0.0, p * x)
        a += tl.sum(x, axis=1)
        x = _kept(x, seed, matrix, i[:, None], j[None, :], dropout)
        out = tl.dot(x, _rows(v, j, keys, depth, BLOCK), out, input_precision=PRECISION)
        if cv is not None:
            p = _kept(p, seed, matrix, i[:, None], j[None, :], dropout)
            out = tl.dot(p, _rows(cv, j, keys, depth, BLOCK), out, input_precision=PRECISION)
    result = _rows(o + matrix * length * depth, i, length, depth, BLOCK)
    out -= a[:, None] * result
    _put(gg + matrix * length * depth, i, length, depth, out, BLOCK)
    cotangent = _rows(g, i, length, depth, BLOCK)
    e = tl.sum(cotangent * out, axis=1)
    d = tl.sum(cotangent * result, axis=1)
    tl.store(alpha + matrix * length + i, a, i < length)
    tl.store(epsilon + matrix * length + i, e, i < length)
    tl.store(delta + matrix * length + i, d, i < length)
    out = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, last, KEYS):
        j = start + tl.arange(0, KEYS).to(tl.int64)
        s = _across(q, k, i, j, length, keys, width, BLOCK, CHUNK, PRECISION) * scale
        s = _masked(s, mask, i[:, None], j[None, :], length, keys, step_i, step_j, offset, CAUSAL)
        p = _probabilities(s, most, share)
        m = _kept(
            _across(g, v, i, j, length, keys, depth, BLOCK, CHUNK, PRECISION),
            seed,
            matrix,
            i[:, None],
            j[None, :],
            dropout,
        )
        m -= d[:, None]
        x = _tangents(q, k, cq, ck, i, j, length, keys, width, scale, BLOCK, CHUNK, PRECISION)
        x = _plus(x, cm, i[:, None], j[None, :], length, keys, step_i, step_j) - a[:, None]
        u = x * m - e[:, None]
        if cv is not None:
            n = _across(g, cv, i, j, length, keys, depth, BLOCK, CHUNK, PRECISION)
            u += _kept(n, seed, matrix, i[:, None], j[None, :], dropout)
        u = tl.where(s == float("-inf"), 0.0, p * u)
        out = tl.dot(u, _rows(k, j, keys, width, BLOCK), out, input_precision=PRECISION)
        if ck is not None:
            ds = tl.where(s == float("-inf"), 0.0, p * m)
            out = tl.dot(ds, _rows(ck, j, keys, width, BLOCK), out, input_precision=PRECISION)
    _put(cotangent_q + matrix * length * width, i, length, width, out * scale, BLOCK)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def twice_columns_kernel(
    cq, ck, cv, cm, g, q, k, v, mask, seed, largest, weight, delta, alpha, epsilon, cotangent_k, cotangent_v, heads,
    group, length, keys, width, depth, step_b, step_h, step_i, step_j, scale, offset, dropout, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The cotangents of k and v."""
    shared, j = _place(keys, KEYS)
    k += shared * keys * width
    v += shared * keys * depth
    if ck is not None:
        ck += shared * keys * width
    if cv is not None:
        cv += shared * keys * depth
    out_k = tl.zeros((KEYS, BLOCK), tl.float32)
    out_v = tl.zeros((KEYS, BLOCK), tl.float32)
    for matrix in range(shared * group, shared * group + group):
        queries = q + matrix * length * width
        cotangent = g + matrix * length * depth
        tangent = cq
        if cq is not None:
            tangent = cq + matrix * length * width
        seen_by = mask
        if mask is not None:
            seen_by = mask + matrix // heads * step_b + matrix % heads * step_h
        added = cm
        if cm is not None:
            added = cm + matrix // heads * step_b + matrix % heads * step_h
        for start in range(_first(j, offset, ROWS, CAUSAL), length, ROWS):
            i = start + tl.arange(0, ROWS).to(tl.int64)
            at = matrix * length + i
            most = tl.load(largest + at, i < length, float("inf"))[None, :]
            share = tl.load(weight + at, i < length, 0.0)[None, :]
            d = tl.load(delta + at, i < length, 0.0)[None, :]
            a = tl.load(alpha + at, i < length, 0.0)[None, :]
            e = tl.load(epsilon + at, i < length, 0.0)[None, :]
            s = _across(k, queries, j, i, keys, length, width, BLOCK, CHUNK, PRECISION) * scale
            s = _masked(s, seen_by, i[None, :], j[:, None], length, keys, step_i, step_j, offset, CAUSAL)
            p = _probabilities(s, most, share)
            x = _tangents(k, queries, ck, tangent, j, i, keys, length, width, scale, BLOCK, CHUNK, PRECISION)
            x = _plus(x, added, i[None, :], j[:, None], length, keys, step_i, step_j) - a
            r = _kept(tl.where(s == float("-inf"), 0.0, p * x), seed, matrix, i[None, :], j[:, None], dropout)
            right = _rows(cotangent, i, length, depth, BLOCK)
            out_v = tl.dot(r, right, out_v, input_precision=PRECISION)
            m = _across(v, cotangent, j, i, keys, length, depth, BLOCK, CHUNK, PRECISION)
            m = _kept(m, seed, matrix, i[None, :], j[:, None], dropout) - d
            u = x * m - e
            if cv is not None:
                n = _across(cv, cotangent, j, i, keys, length, depth, BLOCK, CHUNK, PRECISION)
                u += _kept(n, seed, matrix, i[None, :], j[:, None], dropout)
            u = tl.where(s == float("-inf"), 0.0, p * u)
            out_k = tl.dot(u, _rows(queries, i, length, width, BLOCK), out_k, input_precision=PRECISION)
            if cq is not None:
                ds = tl.where(s == float("-inf"), 0.0, p * m)
                out_k = tl.dot(ds, _rows(tangent, i, length, width, BLOCK), out_k, input_precision=PRECISION)
    _put(cotangent_k + shared * keys * width, j, keys, width, out_k * scale, BLOCK)
    _put(cotangent_v + shared * keys * depth, j, keys, depth, out_v, BLOCK)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, *MASKS))
def mask_gradient_kernel(
    cq, ck, cv, cm, g, q, k, v, mask, seed, largest, weight, delta, alpha, epsilon, dm, batch, mask_b, mask_h, mask_i,
    mask_j, heads, group, length, keys, width, depth, step_b, step_h, step_i, step_j, scale, offset, dropout,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The cotangent of a mask [mask_b, mask_h, mask_i, mask_j], each 1 or the whole: dS, or U where there is alpha."""
    tiles_i, tiles_j = tl.cdiv(mask_i, ROWS), tl.cdiv(mask_j, KEYS)
    program = tl.program_id(0).to(tl.int64)
    of_b = program // tiles_j // tiles_i // mask_h
    of_h = program // tiles_j // tiles_i % mask_h
    of_i = program // tiles_j % tiles_i * ROWS + tl.arange(0, ROWS)
    of_j = program % tiles_j * KEYS + tl.arange(0, KEYS)
    total = tl.zeros((ROWS, KEYS), tl.float32)
    # Each loop has one turn where the mask has a tile, a head or an example of its own.
    for b in range(of_b, batch, mask_b):
        for h in range(of_h, heads, mask_h):
            matrix, shared = b * heads + h, b * (heads // group) + h // group
            queries = q + matrix * length * width
            cotangent = g + matrix * length * depth
            key = k + shared * keys * width
            value = v + shared * keys * depth
            added_to = mask + b * step_b + h * step_h
            tangent, key_tangent, value_tangent, added = cq, ck, cv, cm
            if cq is not None:
                tangent = cq + matrix * length * width
            if ck is not None:
                key_tangent = ck + shared * keys * width
            if cv is not None:
                value_tangent = cv + shared * keys * depth
            if cm is not None:
                added = cm + b * step_b + h * step_h
            for start_i in range(0, length, tiles_i * ROWS):
                i = start_i + of_i
                at = matrix * length + i
                most = tl.load(largest + at, i < length, float("inf"))[:, None]
                share = tl.load(weight + at, i < length, 0.0)[:, None]
                d = tl.load(delta + at, i < length, 0.0)[:, None]
                for start_j in range(0, keys, tiles_j * KEYS):
                    j = start_j + of_j
                    s = _across(queries, key, i, j, length, keys, width, BLOCK, CHUNK, PRECISION) * scale
                    s = _masked(s, added_to, i[:, None], j[None, :], length, keys, step_i, step_j, offset, CAUSAL)
                    m = _across(cotangent, value, i, j, length, keys, depth, BLOCK, CHUNK, PRECISION)
                    m = _kept(m, seed, matrix, i[:, None], j[None, :], dropout) - d
                    if alpha is not None:
                        x = _tangents(
                            queries, key, tangent, key_tangent, i, j, length, keys, width, scale, BLOCK, CHUNK,
                            PRECISION,
                        )  # fmt: skip
                        x = _plus(x, added, i[:, None], j[None, :], length, keys, step_i, step_j)
                        x -= tl.load(alpha + at, i < length, 0.0)[:, None]
                        m = x * m - tl.load(epsilon + at, i < length, 0.0)[:, None]
                        if cv is not None:
                            n = _across(
                                cotangent, value_tangent, i, j, length, keys, depth, BLOCK, CHUNK, PRECISION
                            )  # fmt: skip
                            m += _kept(n, seed, matrix, i[:, None], j[None, :], dropout)
                    total += tl.where(s == float("-inf"), 0.0, _probabilities(s, most, share) * m)
    if mask_i == 1:
        total = tl.broadcast_to(tl.sum(total, axis=0, keep_dims=True), (ROWS, KEYS))
    if mask_j == 1:
        total = tl.broadcast_to(tl.sum(total, axis=1, keep_dims=True), (ROWS, KEYS))
    dm += of_b * step_b + of_h * step_h
    inside = (of_i < mask_i)[:, None] & (of_j < mask_j)[None, :]
    tl.store(dm + of_i[:, None] * step_i + of_j[None, :] * step_j, total.to(dm.dtype.element_ty), inside)


@triton.jit(do_not_specialize=("length", "keys"))
def factors_kernel(seed, z, length, keys, dropout, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Z itself, [B, H, L, S]: for derivatives of an order that has no kernel."""
    matrix = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    kept = _kept(tl.full((ROWS, KEYS), 1.0, tl.float32), seed, matrix, i[:, None], j[None, :], dropout)
    at = (matrix * length + i[:, None]) * keys + j[None, :]
    tl.store(z + at, kept, (i < length)[:, None] & (j < keys)[None, :])
