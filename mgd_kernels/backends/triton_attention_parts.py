"""What the Triton kernels of attention share: products, masks and dropout of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from mgd_kernels.backends.triton_nn_kernels import _exponential


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
def _plus(x, added, i, j, length, keys, step_i, step_j):
    """x of a tile, and what is added to it, if anything is. i, j: as in `_masked`."""
    if added is not None:
        x += tl.load(added + i * step_i + j * step_j, (i < length) & (j < keys), 0.0).to(tl.float32)
    return x


@triton.jit
def _masked(s, mask, i, j, length, keys, step_i, step_j, offset, CAUSAL: tl.constexpr):
    """s of a tile with the mask, minus infinity where it is hidden. i, j: rows and columns, in a column and a row of
    numbers, or the other way round."""
    inside = (i < length) & (j < keys)
    seen = inside
    if CAUSAL:
        seen = seen & (j <= i + offset)
    if mask is not None:
        if mask.dtype.element_ty == tl.uint8:
            seen = seen & (tl.load(mask + i * step_i + j * step_j, inside, 0) != 0)
        else:
            s = _plus(s, mask, i, j, length, keys, step_i, step_j)
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
