"""The Triton kernels: the passes over memory around the element-wise mathematics of `triton_rules.py`.

Every kernel runs one program per *tile*: a stretch of one parameter group. Arithmetic is IEEE and is never contracted
(`enable_fp_fusion=False` at every launch, division and square root rounded correctly), so a replayed step equals a
single step bit by bit, and Triton's interpreter computes what the hardware does. Hyperparameters and step counts are
read from memory: no value ever causes a compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgd_kernels.backends.triton_rules import (
    WIDTH64,
    adam_vjp,
    jvp,
    read_coefficients,
    read_tangents,
    sgd_vjp,
    step,
)

# Elements a program handles at a time. No autotuning: these kernels work in place, and trial runs would advance the
# state. With 512 elements the VJP of Adam fits 128 registers on sm_80 to sm_100 without a spill; 1024 take 246.
BLOCK = 1024
VJP_BLOCK = 512
# Elements a program of a reducing kernel walks through: many in large buffers, so that few partial sums remain for
# the second stage, and few in small ones, so that every multiprocessor has work.
TILE, SMALL_TILE, SMALL = 4096, 512, 1 << 22
# Tiles whose boundaries are multiples of VECTOR elements have every access 128 bits wide. The ragged ends of segments,
# shorter than that, are tiles of their own for a small variant of each kernel.
VECTOR = tl.constexpr(16)


def options(block: int, rule: str | None = None, backend: str = "cuda") -> dict[str, object]:
    """Launch options for kernels of `block` elements; rule: of the VJP kernel; backend: "cuda" or "hip".

    Threads hold 4 or 8 elements each, at least one 128-bit access in float32.
    """
    wave = 64 if backend == "hip" else 32
    found: dict[str, object] = {"num_warps": max(1, min(4, block // (4 * wave))), "enable_fp_fusion": False}
    if rule not in (None, "adam") and backend == "cuda":
        found["maxnreg"] = 128  # left alone, ptxas squeezes some of these into 64 registers and spills one
    return found


# --- Tiles -------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(tiles, numel, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """(start, stop, group, place) of this program, from the tile table `[tiles, 4]` or by counting where there is none;
    `place` is where its sums go in the workspace."""
    i = tl.program_id(0).to(tl.int64)
    if tiles is None:
        start = i * TILE
        stop = tl.minimum(start + TILE, numel)
        group = i * 0
        place = i
    else:
        start = tl.load(tiles + 4 * i)
        stop = tl.load(tiles + 4 * i + 1)
        group = tl.load(tiles + 4 * i + 2)
        place = tl.load(tiles + 4 * i + 3)
    if ALIGNED:
        start = tl.multiple_of(start, VECTOR)
        stop = tl.multiple_of(stop, VECTOR)
    return start, stop, group, place


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, at, value, mask):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)


# --- Steps and replay --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["groups", "steps"])
def replay_kernel(
    param, slot0, slot1, grads, pitch, offsets, low, table, tiles, numel, groups, steps,
    RULE: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr, OFFSETS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`steps` steps in place, the states in registers from the first to the last; SINGLE: one step.

    Gradient i lies `offsets[i]` elements after `grads`, or `i * pitch` where there are no offsets. `low` receives
    the new parameters once more in its own (16-bit) dtype. `table`: float32 coefficients `[steps, groups, WIDTH]`.
    """
    start, stop, group, _ = _tile(tiles, numel, BLOCK, ALIGNED)
    at = start + tl.max_contiguous(tl.arange(0, BLOCK), 4)
    mask = at < stop
    p = _load(param, at, mask)
    s0 = p
    s1 = p
    if slot0 is not None:
        s0 = _load(slot0, at, mask)
    if slot1 is not None:
        s1 = _load(slot1, at, mask)
    g = _load(grads, at, mask)
    if SINGLE:
        c = read_coefficients(table, group)
        p, s0, s1 = step(p, s0, s1, g * c[3], c, RULE)
    else:
        for i in range(steps):
            # The next gradient is under way while this step is computed.
            following_i = group * 0 + tl.minimum(i + 1, steps - 1)
            offset = following_i * pitch
            if offsets is not None:
                offset = tl.load(offsets + following_i)
            if OFFSETS_ALIGNED:
                offset = tl.multiple_of(offset, VECTOR)
            following = _load(grads, offset + at, mask)
            c = read_coefficients(table, group + i * groups)
            p, s0, s1 = step(p, s0, s1, g * c[3], c, RULE)
            g = following
    _store(param, at, p, mask)
    if slot0 is not None:
        _store(slot0, at, s0, mask)
    if slot1 is not None:
        _store(slot1, at, s1, mask)
    if low is not None:
        _store(low, at, p, mask)


# --- Jacobian-vector products ------------------------------------------------------------------------------------


@triton.jit
def jvp_kernel(
    param, slot0, slot1, grad, tangent, tangent0, tangent1, grad_tangent, table, tangent_table, tiles, numel,
    RULE: tl.constexpr, ALIGNED: tl.constexpr, ADVANCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tangents of the state before a step become those of the state after it, in place; ADVANCE: the state makes
    the step."""
    start, stop, group, _ = _tile(tiles, numel, BLOCK, ALIGNED)
    at = start + tl.max_contiguous(tl.arange(0, BLOCK), 4)
    mask = at < stop
    c = read_coefficients(table, group)
    p = _load(param, at, mask)
    dp = _load(tangent, at, mask)
    s0, s1, ds0, ds1 = p, p, dp, dp
    if slot0 is not None:
        s0 = _load(slot0, at, mask)
        ds0 = _load(tangent0, at, mask)
    if slot1 is not None:
        s1 = _load(slot1, at, mask)
        ds1 = _load(tangent1, at, mask)
    g = _load(grad, at, mask) * c[3]
    dg = _load(grad_tangent, at, mask)
    dp, ds0, ds1 = jvp(p, s0, s1, g, dp, ds0, ds1, dg, c, read_tangents(tangent_table, group), RULE)
    _store(tangent, at, dp, mask)
    if slot0 is not None:
        _store(tangent0, at, ds0, mask)
    if slot1 is not None:
        _store(tangent1, at, ds1, mask)
    if ADVANCE:
        p, s0, s1 = step(p, s0, s1, g, c, RULE)
        _store(param, at, p, mask)
        if slot0 is not None:
            _store(slot0, at, s0, mask)
        if slot1 is not None:
            _store(slot1, at, s1, mask)


# --- Vector-Jacobian products ------------------------------------------------------------------------------------


@triton.jit
def _fold(x, BLOCK: tl.constexpr):
    """Sums over each thread's runs of four neighbours: the accumulators shrink, and nothing leaves the thread."""
    return tl.sum(tl.reshape(x, [BLOCK // 4, 4]), axis=1)


@triton.jit(do_not_specialize=["tiles_total"])
def vjp_kernel(
    param, slot0, slot1, grad, adjoint, adjoint0, adjoint1, u, table, table64, partials, tiles, numel, tiles_total,
    RULE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The adjoints of the state after a step become those of the state before it, in place; `u` that of `grad`.

    partials: float64 `[H + 1, tiles_total]`, each tile's share of the hyperparameter cotangents.
    """
    start, stop, group, place = _tile(tiles, numel, TILE, ALIGNED)
    c = read_coefficients(table, group)
    scale = c[3]
    lr = tl.load(table64 + group * WIDTH64)
    weight_decay = tl.load(table64 + group * WIDTH64 + 1)
    bias1 = tl.load(table64 + group * WIDTH64 + 2)
    bias2 = tl.load(table64 + group * WIDTH64 + 3)
    zero = tl.zeros([BLOCK // 4], tl.float64)
    sum_an, sum_ap, sum_up, sum_scale = zero, zero, zero, zero
    sum3, sum4, sum5, sum6 = zero, zero, zero, zero
    for begin in range(start, stop, BLOCK):
        if ALIGNED:
            begin = tl.multiple_of(begin, VECTOR)
        at = begin + tl.max_contiguous(tl.arange(0, BLOCK), 4)
        mask = at < stop
        p = _load(param, at, mask)
        raw = _load(grad, at, mask)
        ap = _load(adjoint, at, mask)
        g = raw * scale
        if RULE == "adam":
            m = _load(slot0, at, mask)
            v = _load(slot1, at, mask)
            am = _load(adjoint0, at, mask)
            av = _load(adjoint1, at, mask)
            du, ap, am, av, an, app, up, t3, t4, t5, t6 = adam_vjp(p, m, v, g, ap, am, av, c, bias2)
            _store(adjoint0, at, am, mask)
            _store(adjoint1, at, av, mask)
            sum5 += _fold(t5, BLOCK)
            sum6 += _fold(t6, BLOCK)
        else:
            buf = p
            ab = ap
            if slot0 is not None:
                buf = _load(slot0, at, mask)
                ab = _load(adjoint0, at, mask)
            du, ap, ab, an, app, up, t3, t4 = sgd_vjp(p, buf, g, ap, ab, c, RULE)
            if slot0 is not None:
                _store(adjoint0, at, ab, mask)
        _store(adjoint, at, ap, mask)
        _store(u, at, du * scale, mask)
        sum_an += _fold(an, BLOCK)
        sum_ap += _fold(app, BLOCK)
        sum_up += _fold(up, BLOCK)
        sum3 += _fold(t3, BLOCK)
        sum4 += _fold(t4, BLOCK)
        sum_scale += _fold(du.to(tl.float64) * raw.to(tl.float64), BLOCK)
    # Column j of the hyperparameter cotangents, this tile's share, goes to partials[j, place].
    out = partials + place
    total_an = tl.sum(sum_an, axis=0)
    total_ap = tl.sum(sum_ap, axis=0)
    tl.store(out, -(total_an + weight_decay * total_ap))
    tl.store(out + tiles_total, -lr * total_ap)
    tl.store(out + 2 * tiles_total, tl.sum(sum_up, axis=0))
    if RULE == "adam":
        tl.store(out + 3 * tiles_total, tl.sum(sum3, axis=0) - bias1 * lr * total_an)
        tl.store(out + 4 * tiles_total, tl.sum(sum4, axis=0))
        tl.store(out + 5 * tiles_total, tl.sum(sum5, axis=0))
        tl.store(out + 6 * tiles_total, tl.sum(sum6, axis=0))
        tl.store(out + 7 * tiles_total, tl.sum(sum_scale, axis=0))
    else:
        tl.store(out + 3 * tiles_total, tl.sum(sum3, axis=0))
        tl.store(out + 4 * tiles_total, tl.sum(sum4, axis=0))
        tl.store(out + 5 * tiles_total, tl.sum(sum_scale, axis=0))


# --- Reductions --------------------------------------------------------------------------------------------------


@triton.jit
def dot_kernel(x, y, partials, numel, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """partials[tile]: the inner product over one tile, in float64."""
    start = tl.program_id(0).to(tl.int64) * TILE
    stop = tl.minimum(start + TILE, numel)
    total = tl.zeros([BLOCK // 4], tl.float64)
    for begin in range(start, stop, BLOCK):
        at = tl.multiple_of(begin, VECTOR) + tl.max_contiguous(tl.arange(0, BLOCK), 4)
        mask = at < numel
        product = tl.load(x + at, mask=mask, other=0.0).to(tl.float64) * tl.load(y + at, mask=mask, other=0.0).to(
            tl.float64
        )
        total += _fold(product, BLOCK)
    tl.store(partials + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["tiles_total", "columns"])
def sum_kernel(partials, ranges, out, tiles_total, columns, BLOCK: tl.constexpr):
    """out[g, j]: the sum of partials[j] over the tiles of group g (`ranges[g]` to `ranges[g + 1]`), in fixed order."""
    group = tl.program_id(0)
    column = tl.program_id(1)
    start = tl.zeros([], tl.int64)
    stop = start + tiles_total
    if ranges is not None:
        start = tl.load(ranges + group)
        stop = tl.load(ranges + group + 1)
    row = partials + column.to(tl.int64) * tiles_total
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(start, stop, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(row + at, mask=at < stop, other=0.0)
    tl.store(out + group.to(tl.int64) * columns + column, tl.sum(total, axis=0))
