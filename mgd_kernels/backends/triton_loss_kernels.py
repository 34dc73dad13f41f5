"""Triton kernels of what `linear_cross_entropy` computes from the logits of a strip of tokens, a row a program.

Names and formulas are those of `mgd_kernels.functional.linear_loss_rows`. A program goes over its row by blocks, once
for each sum that the elements need first. The sums are of a block's elements, each over all blocks, and then added up:
an order that follows from the width alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgd_kernels.backends.triton_nn_kernels import _exponential, _tanh

BLOCK = 1024  # with 2048, sm_80 spills with all options


@triton.jit
def _capped(z, cap, CAP: tl.constexpr):
    """z', and its slope."""
    slope = z * 0.0 + 1.0
    if CAP:
        share = _tanh(tl.div_rn(z, cap))
        z = cap * share
        slope = 1.0 - share * share
    return z, slope


@triton.jit
def _residual(capped, own, most, log_sum, weight, smoothing, count):
    """p, and weight p - t. own: whether an element is the target's."""
    p = _exponential((capped - most) - log_sum)
    return p, weight * p - tl.div_rn(smoothing, count) - tl.where(own, 1.0 - smoothing, 0.0)


@triton.jit(do_not_specialize=["ignored"])
def loss_kernel(
    z, target, gl, losses, statistics, width, count, ignored, smoothing, z_loss, cap, VALUE: tl.constexpr,
    GRADIENT: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """VALUE: fills in losses and statistics, which are read otherwise. GRADIENT: puts gz in the place of z. count: the
    width as a float."""
    row = tl.program_id(0).to(tl.int64)
    z += row * width
    label = tl.load(target + row)
    seen = label != ignored
    at = tl.arange(0, BLOCK)
    if VALUE:
        most = float("-inf")
        total = tl.zeros((BLOCK,), tl.float32)
        chosen = tl.zeros((BLOCK,), tl.float32)
        every = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            inside = start + at < width
            capped, _ = _capped(tl.load(z + start + at, inside, 0.0), cap, CAP)
            shown = tl.where(inside, capped, float("-inf"))
            higher = tl.maximum(most, tl.max(shown, axis=0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * _exponential(most - base) + _exponential(shown - base)
            chosen += tl.where(start + at == label, capped, 0.0)
            if SMOOTH:
                every += tl.where(inside, capped, 0.0)
            most = higher
        log_sum = tl.log(tl.sum(total, axis=0))
        own = tl.sum(chosen, axis=0)
        lse = most + log_sum
        loss = log_sum + (most - own) + z_loss * lse * lse
        if SMOOTH:
            loss += smoothing * (own - tl.div_rn(tl.sum(every, axis=0), count))
        tl.store(losses + row, tl.where(seen, loss, 0.0))
        tl.store(statistics + 2 * row, most)
        tl.store(statistics + 2 * row + 1, log_sum)
    else:
        most = tl.load(statistics + 2 * row)
        log_sum = tl.load(statistics + 2 * row + 1)
    if GRADIENT:
        factor = tl.load(gl + row)
        weight = 1.0 + 2.0 * z_loss * (most + log_sum)
        for start in range(0, width, BLOCK):
            inside = start + at < width
            capped, slope = _capped(tl.load(z + start + at, inside, 0.0), cap, CAP)
            _, r = _residual(capped, start + at == label, most, log_sum, weight, smoothing, count)
            tl.store(z + start + at, tl.where(seen, factor * (slope * r), 0.0), inside)


@triton.jit(do_not_specialize=["ignored"])
def twice_kernel(
    z, tangent, target, gl, statistics, ggl, width, count, ignored, smoothing, z_loss, cap, SMOOTH: tl.constexpr,
    CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fills in ggl; puts the cotangent of z in the place of z, and gz in that of its tangent."""
    row = tl.program_id(0).to(tl.int64)
    z += row * width
    tangent += row * width
    label = tl.load(target + row)
    seen = label != ignored
    most = tl.load(statistics + 2 * row)
    log_sum = tl.load(statistics + 2 * row + 1)
    factor = tl.load(gl + row)
    weight = 1.0 + 2.0 * z_loss * (most + log_sum)
    at = tl.arange(0, BLOCK)
    mean = tl.zeros((BLOCK,), tl.float32)
    chosen = tl.zeros((BLOCK,), tl.float32)
    every = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + at < width
        capped, slope = _capped(tl.load(z + start + at, inside, 0.0), cap, CAP)
        along = slope * tl.load(tangent + start + at, inside, 0.0)
        p = _exponential((capped - most) - log_sum)
        mean += tl.where(inside, p * along, 0.0)
        chosen += tl.where(start + at == label, along, 0.0)
        if SMOOTH:
            every += along
    alpha = tl.sum(mean, axis=0)
    own = tl.sum(chosen, axis=0)
    result = weight * alpha - own
    if SMOOTH:
        result += smoothing * (own - tl.div_rn(tl.sum(every, axis=0), count))
    tl.store(ggl + row, tl.where(seen, result, 0.0))
    shift = 2.0 * z_loss * alpha
    for start in range(0, width, BLOCK):
        inside = start + at < width
        capped, slope = _capped(tl.load(z + start + at, inside, 0.0), cap, CAP)
        raw = tl.load(tangent + start + at, inside, 0.0)
        p, r = _residual(capped, start + at == label, most, log_sum, weight, smoothing, count)
        again = p * (weight * (slope * raw - alpha) + shift)
        if CAP:
            again -= 2.0 * tl.div_rn(capped, cap * cap) * raw * r
        tl.store(z + start + at, tl.where(seen, factor * (slope * again), 0.0), inside)
        tl.store(tangent + start + at, tl.where(seen, factor * (slope * r), 0.0), inside)
