"""Triton kernels of attention and its first two derivatives, by tiles: no `[L, S]` in memory, and no atomics.

Names and formulas are those of `mgd_kernels.functional.attention_strips`. One program has a tile of queries and goes
over the keys that they see (the row passes), or a tile of keys, over the query heads that share them in order and their
queries (the column passes). Each writes its tile alone, so that the order of every sum follows from shapes. float32
accumulation; 16-bit inputs become float32 as they are read. Keys and their cotangents come centred and in float32.

    largest, weight, [2, B, H, L]: largest = max s, and weight = 1 / sum e^(s - largest): P = e^(s - largest) weight
    delta = g o = <P M>    alpha = <P X>    epsilon = g (cotangent of g)    dS = P (M - delta)    R = P (X - alpha)
    U = P ((X - alpha) (M - delta) + Z g cvT - epsilon)

A row that sees nothing has largest = inf and weight = 0: its P is 0 everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgd_kernels.backends.triton_nn_kernels import _exponential

UNSPECIALIZED = ("heads", "group", "length", "keys", "step_b", "step_h", "step_i", "offset")  # values compile nothing


@triton.jit
def _across(x, y, at, to, rows, columns, width, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """x yT of the rows `at` of x and `to` of y, CHUNK elements of them at a time. In a loop that is not unrolled:
    Triton would keep what does not change between tiles in registers, and spill it."""
    total = tl.zeros((at.shape[0], to.shape[0]), tl.float32)
    for start in range(0, BLOCK, CHUNK):
        e = start + tl.arange(0, CHUNK)
        left = tl.load(x + at[:, None] * width + e[None, :], (at < rows)[:, None] & (e < width)[None, :], 0.0)
        right = tl.load(y + to[None, :] * width + e[:, None], (to < columns)[None, :] & (e < width)[:, None], 0.0)
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def _rows(x, at, rows, width, BLOCK: tl.constexpr):
    e = tl.arange(0, BLOCK)
    return tl.load(x + at[:, None] * width + e[None, :], (at < rows)[:, None] & (e < width)[None, :], 0.0).to(
        tl.float32
    )


@triton.jit
def _put(x, at, rows, width, value, BLOCK: tl.constexpr):
    e = tl.arange(0, BLOCK)
    tl.store(
        x + at[:, None] * width + e[None, :], value.to(x.dtype.element_ty), (at < rows)[:, None] & (e < width)[None, :]
    )


@triton.jit
def _masked(s, mask, i, j, length, keys, step_i, step_j, offset, CAUSAL: tl.constexpr):
    """s of a tile with the mask, minus infinity where it is hidden. i, j: rows and columns, in a column and a row of
    numbers, or the other way round."""
    inside = (i < length) & (j < keys)
    seen = inside
    if CAUSAL:
        seen = seen & (j <= i + offset)
    if mask is not None:
        at = mask + i * step_i + j * step_j
        if mask.dtype.element_ty == tl.uint8:
            seen = seen & (tl.load(at, inside, 0) != 0)
        else:
            s += tl.load(at, inside, 0.0).to(tl.float32)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _probabilities(s, most, share):
    return tl.where(s == float("-inf"), 0.0, _exponential(s - most) * share)


@triton.jit
def _kept(x, seed, matrix, i, j, dropout):
    """Z x. Z is a function of seed, matrix, row and column: the same in tiles of any shape."""
    if seed is not None:
        zero = (i * 0 + j * 0).to(tl.uint32)
        place = (zero + j.to(tl.uint32), zero + i.to(tl.uint32), (zero + matrix).to(tl.uint32), zero)
        word, _, _, _ = tl.philox(tl.load(seed), place[0], place[1], place[2], place[3])
        drawn = (word >> 8).to(tl.float32) * 5.9604644775390625e-08
        x = tl.where(drawn < dropout, 0.0, x * tl.div_rn(1.0, 1.0 - dropout))
    return x


@triton.jit
def _last(i, keys, offset, CAUSAL: tl.constexpr):
    """The number of keys that some row of the tile may see."""
    last = keys
    if CAUSAL:
        last = tl.maximum(0, tl.minimum(keys, tl.max(i, axis=0) + offset + 1))
    return last


@triton.jit
def _first(j, offset, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    """The first row of the tiles of which some row may see a key of the tile."""
    first = tl.min(j, axis=0) * 0
    if CAUSAL:
        first = tl.maximum(0, tl.min(j, axis=0) - offset) // ROWS * ROWS
    return first


@triton.jit
def _place(count, SIZE: tl.constexpr):
    """This program's matrix, counted over the batch, and its rows of `count`. One axis: the others end at 65,535."""
    tiles = tl.cdiv(count, SIZE)
    program = tl.program_id(0)
    return (program // tiles).to(tl.int64), (program % tiles).to(tl.int64) * SIZE + tl.arange(0, SIZE)


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


@triton.jit
def _tangents(
    x, y, cx, cy, at, to, rows, columns, width, scale, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """X of a tile, or its transpose: (cx yT + x cyT) scale. Cotangents that are absent are None, here as below."""
    total = tl.zeros((at.shape[0], to.shape[0]), tl.float32)
    if cx is not None:
        total += _across(cx, y, at, to, rows, columns, width, BLOCK, CHUNK, PRECISION)
    if cy is not None:
        total += _across(x, cy, at, to, rows, columns, width, BLOCK, CHUNK, PRECISION)
    return total * scale


@triton.jit(do_not_specialize=UNSPECIALIZED)
def twice_rows_kernel(
    cq, ck, cv, g, q, k, v, mask, seed, o, largest, weight, delta, gg, cotangent_q, alpha, epsilon, heads, group,
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
        x = _tangents(q, k, cq, ck, i, j, length, keys, width, scale, BLOCK, CHUNK, PRECISION) - a[:, None]
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
    cq, ck, cv, g, q, k, v, mask, seed, largest, weight, delta, alpha, epsilon, cotangent_k, cotangent_v, heads, group,
    length, keys, width, depth, step_b, step_h, step_i, step_j, scale, offset, dropout, CAUSAL: tl.constexpr,
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
            x -= a
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


@triton.jit(do_not_specialize=("length", "keys"))
def factors_kernel(seed, z, length, keys, dropout, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Z itself, [B, H, L, S]: for derivatives of an order that has no kernel."""
    matrix = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    kept = _kept(tl.full((ROWS, KEYS), 1.0, tl.float32), seed, matrix, i[:, None], j[None, :], dropout)
    at = (matrix * length + i[:, None]) * keys + j[None, :]
    tl.store(z + at, kept, (i < length)[:, None] & (j < keys)[None, :])
