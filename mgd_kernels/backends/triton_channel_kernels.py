"""Triton kernels of group norm and batch norm: those of csrc/nn/channel_norm.h, in its names, a set a program.

A set is what is normalised together. It has pieces of `inner` elements: a channel of a group of an example each, or an
example of a channel. A program goes over its set by tiles of PIECES pieces and INNER elements of each, once for every
sum that the elements need first. A sum is that of a tile's elements, each over the tiles of its pieces, then along the
pieces, then over all pieces: an order that follows from shapes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgd_kernels.backends.triton_nn_kernels import _or_else

BLOCK = 1024  # elements of a tile: with 2048, a program has so many threads that sm_90 spills
UNSPECIALIZED = ("pieces", "channels")  # values compile nothing


@triton.jit
def _pieces(first, pieces, channels, GROUPED: tl.constexpr, PIECES: tl.constexpr):
    """Places among the pieces of all sets, channels, and which of them the set has."""
    number = tl.program_id(0).to(tl.int64)
    own = first + tl.arange(0, PIECES)
    if GROUPED:
        piece = number * pieces + own
        channel = piece % channels
    else:
        piece = own * channels + number
        channel = own * 0 + number
    return piece, channel, own < pieces


@triton.jit
def _tile(piece, inside, start, inner, INNER: tl.constexpr):
    """Places of the elements of a tile, and which of them are there."""
    at = start + tl.arange(0, INNER)
    return piece[:, None] * inner + at[None, :], inside[:, None] & (at < inner)[None, :]


@triton.jit
def _mean(tile, count):
    return tl.div_rn(tl.sum(tl.sum(tile, axis=1), axis=0), count)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def channel_norm_kernel(
    x, weight, bias, mean, var, rstd, y, pieces, channels, inner, count, eps, GROUPED: tl.constexpr,
    PIECES: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """count: the elements of a set as a float, as in all of these."""
    total = tl.zeros((PIECES, INNER), tl.float32)
    for first in range(0, pieces, PIECES):
        piece, _, there = _pieces(first, pieces, channels, GROUPED, PIECES)
        for start in range(0, inner, INNER):
            at, inside = _tile(piece, there, start, inner, INNER)
            total += tl.load(x + at, inside, 0.0)
    center = _mean(total, count)
    total = tl.zeros((PIECES, INNER), tl.float32)
    for first in range(0, pieces, PIECES):
        piece, _, there = _pieces(first, pieces, channels, GROUPED, PIECES)
        for start in range(0, inner, INNER):
            at, inside = _tile(piece, there, start, inner, INNER)
            centred = tl.where(inside, tl.load(x + at, inside, 0.0) - center, 0.0)
            total += centred * centred
    variance = _mean(total, count)
    r = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    for first in range(0, pieces, PIECES):
        piece, channel, there = _pieces(first, pieces, channels, GROUPED, PIECES)
        scale = r * _or_else(weight, channel, there, 1.0)[:, None]
        shift = _or_else(bias, channel, there, 0.0)[:, None]
        for start in range(0, inner, INNER):
            at, inside = _tile(piece, there, start, inner, INNER)
            tl.store(y + at, (tl.load(x + at, inside, 0.0) - center) * scale + shift, inside)
    number = tl.program_id(0)
    tl.store(mean + number, center)
    tl.store(rstd + number, r)
    if var is not None:
        tl.store(var + number, variance)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def channel_norm_backward_kernel(
    x, weight, gy, gmean, gvar, mean, rstd, gx, gw, gb, pieces, channels, inner, count, GROUPED: tl.constexpr,
    PIECES: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """gw, gb: a sum for each piece."""
    number = tl.program_id(0)
    center, r = tl.load(mean + number), tl.load(rstd + number)
    g0 = 0.0
    g1 = 0.0
    for first in range(0, pieces, PIECES):
        piece, channel, there = _pieces(first, pieces, channels, GROUPED, PIECES)
        sums_w = tl.zeros((PIECES, INNER), tl.float32)
        sums_b = tl.zeros((PIECES, INNER), tl.float32)
        for start in range(0, inner, INNER):
            at, inside = _tile(piece, there, start, inner, INNER)
            cotangent = tl.load(gy + at, inside, 0.0)
            sums_w += cotangent * tl.where(inside, (tl.load(x + at, inside, 0.0) - center) * r, 0.0)
            sums_b += cotangent
        of_w = tl.sum(sums_w, axis=1)
        of_b = tl.sum(sums_b, axis=1)
        tl.store(gw + piece, of_w, there)
        tl.store(gb + piece, of_b, there)
        w = _or_else(weight, channel, there, 1.0)
        g0 += tl.sum(w * of_b, axis=0)
        g1 += tl.sum(w * of_w, axis=0)
    g0 = tl.div_rn(g0, count)
    g1 = tl.div_rn(g1, count)
    of_mean = 0.0
    of_var = 0.0
    if gmean is not None:
        of_mean = tl.div_rn(tl.load(gmean + number), count)
    if gvar is not None:
        of_var = tl.div_rn(2.0 * tl.load(gvar + number), count)
    for first in range(0, pieces, PIECES):
        piece, channel, there = _pieces(first, pieces, channels, GROUPED, PIECES)
        w = _or_else(weight, channel, there, 1.0)[:, None]
        for start in range(0, inner, INNER):
            at, inside = _tile(piece, there, start, inner, INNER)
            centred = tl.load(x + at, inside, 0.0) - center
            rest = tl.load(gy + at, inside, 0.0) * w - g0 - centred * r * g1
            tl.store(gx + at, r * rest + of_mean + centred * of_var, inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def channel_norm_twice_kernel(
    x, weight, gy, gvar, c, cw, cb, mean, rstd, gx, ggy, ggmean, ggvar, gw, pieces, channels, inner, count,
    GROUPED: tl.constexpr, PIECES: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """As `channel_norm_backward_kernel`, of the gradient of the gradient."""
    number = tl.program_id(0)
    center, r = tl.load(mean + number), tl.load(rstd + number)
    c0 = 0.0
    c1 = 0.0
    g0 = 0.0
    g1 = 0.0
    cg = 0.0
    w0 = 0.0
    w1 = 0.0
    for first in range(0, pieces, PIECES):
        piece, channel, there = _pieces(first, pieces, channels, GROUPED, PIECES)
        sum_c = tl.zeros((PIECES, INNER), tl.float32)
        sum_cn = tl.zeros((PIECES, INNER), tl.float32)
        sum_g = tl.zeros((PIECES, INNER), tl.float32)
        sum_gn = tl.zeros((PIECES, INNER), tl.float32)
        sum_cg = tl.zeros((PIECES, INNER), tl.float32)
        for start in range(0, inner, INNER):
            at, inside = _tile(piece, there, start, inner, INNER)
            normal = tl.where(inside, (tl.load(x + at, inside, 0.0) - center) * r, 0.0)
            u = tl.load(c + at, inside, 0.0)
            cotangent = tl.load(gy + at, inside, 0.0)
            sum_c += u
            sum_cn += u * normal
            sum_g += cotangent
            sum_gn += cotangent * normal
            sum_cg += u * cotangent
        w = _or_else(weight, channel, there, 1.0)
        along = _or_else(cw, channel, there, 0.0)
        of_g = tl.sum(sum_g, axis=1)
        of_gn = tl.sum(sum_gn, axis=1)
        c0 += tl.sum(tl.sum(sum_c, axis=1), axis=0)
        c1 += tl.sum(tl.sum(sum_cn, axis=1), axis=0)
        g0 += tl.sum(w * of_g, axis=0)
        g1 += tl.sum(w * of_gn, axis=0)
        cg += tl.sum(w * tl.sum(sum_cg, axis=1), axis=0)
        w0 += tl.sum(along * of_g, axis=0)
        w1 += tl.sum(along * of_gn, axis=0)
    c0 = tl.div_rn(c0, count)
    c1 = tl.div_rn(c1, count)
    g0 = tl.div_rn(g0, count)
    g1 = tl.div_rn(g1, count)
    share = tl.div_rn(cg, count) - c0 * g0 - c1 * g1
    q0 = tl.div_rn(w0, count) - r * (c0 * g1 + g0 * c1)
    q1 = tl.div_rn(w1, count) - 2.0 * r * c1 * g1 + r * share
    of_var = 0.0
    if gvar is not None:
        of_var = tl.div_rn(2.0 * tl.load(gvar + number), count)
    for first in range(0, pieces, PIECES):
        piece, channel, there = _pieces(first, pieces, channels, GROUPED, PIECES)
        w = _or_else(weight, channel, there, 1.0)[:, None]
        along = _or_else(cw, channel, there, 0.0)[:, None]
        shift = _or_else(cb, channel, there, 0.0)[:, None]
        sums_w = tl.zeros((PIECES, INNER), tl.float32)
        for start in range(0, inner, INNER):
            at, inside = _tile(piece, there, start, inner, INNER)
            normal = (tl.load(x + at, inside, 0.0) - center) * r
            u = tl.load(c + at, inside, 0.0)
            cotangent = tl.load(gy + at, inside, 0.0)
            h = (u - c0 - normal * c1) * r
            q = cotangent * along - r * (u * g1 + cotangent * w * c1)
            tl.store(gx + at, r * (q - q0 - normal * q1) + of_var * (u - c0), inside)
            tl.store(ggy + at, h * w + along * normal + shift, inside)
            sums_w += tl.where(inside, h * cotangent, 0.0)
        tl.store(gw + piece, tl.sum(sums_w, axis=1), there)
    if ggmean is not None:
        tl.store(ggmean + number, c0)
        tl.store(ggvar + number, tl.div_rn(2.0 * c1, r))
