"""Triton kernels of the operators of `mgd_kernels.functional`: pointwise functions, norms over rows, and softmax.

The formulas are those of csrc/nn, where their derivation stands. float32 throughout. One program has a stretch of
elements, or a few whole rows, each of which lies in registers. Sums have a fixed order. Nothing is autotuned: the bits
of a result follow from shapes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024  # elements of a program of a pointwise kernel
WIDEST = 4096  # elements of a row: at 4 a thread it fills the threads that a program can have
ROWS = tl.constexpr(16)  # rows whose sums for weight and bias one program adds up


def options(block: int, backend: str = "cuda") -> dict[str, object]:
    """Launch options for programs of `block` elements: 4 a thread. backend: "cuda" or "hip"."""
    wave = 64 if backend == "hip" else 32
    return {"num_warps": max(1, min(1024 // wave, block // (4 * wave))), "enable_fp_fusion": False}


# --- Pointwise functions -----------------------------------------------------------------------------------------


@triton.jit
def _exponential(x):
    """e^x for x <= 0, to a few units in the last place: the hardware's own loses one for every binary digit of x."""
    x = tl.where(x < -104.0, -104.0, x)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    return tl.exp2(n) * tl.exp((x - n * 0.693145751953125) - n * 1.42860677e-6)


@triton.jit
def _clamp(x, bound):
    """x within -bound and bound; NaN stays."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def _logistic(x):
    """1 / (1 + e^-x), its complement, and its derivative."""
    e = _exponential(-tl.abs(x))
    larger = tl.div_rn(1.0, 1.0 + e)
    smaller = e * larger
    up = x >= 0
    return tl.where(up, larger, smaller), tl.where(up, smaller, larger), smaller * larger


@triton.jit
def _tanh(x):
    e = _exponential(-2.0 * tl.abs(x))
    far = tl.div_rn(1.0 - e, 1.0 + e)
    near = tl.where(tl.abs(x) < 0.3, x, 0.0)
    z = near * near
    series = -0.0088632355 * z + 0.021869489
    series = series * z - 0.053968254
    series = series * z + 0.13333334
    series = series * z - 0.33333334
    return tl.where(tl.abs(x) < 0.3, near + near * (series * z), tl.where(x < 0, -far, far))


@triton.jit
def _gate(x):
    """The argument 2 sqrt(2 / pi) (x + 0.044715 x³) of gelu's logistic function, and two derivatives of it."""
    z = x * x
    return x * (1.5957691216 + 0.0713548162726 * z), 1.5957691216 + 0.2140644488 * z, 0.4281288976 * x


@triton.jit
def _density(x):
    return 0.3989422804014327 * _exponential(-0.5 * x * x)


@triton.jit
def _first(x, FUNCTION: tl.constexpr):
    """The function and its derivative."""
    if FUNCTION == "gelu":
        cumulative = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        z = _clamp(x, 20.0)
        value = tl.where(x < -20.0, 0.0 * z, x * cumulative)
        slope = cumulative + z * _density(z)
    elif FUNCTION == "gelu_tanh":
        z = _clamp(x, 15.0)
        u, du, _ = _gate(z)
        s, _, ds = _logistic(u)
        value = x * s
        slope = s + z * ds * du
    elif FUNCTION == "silu":
        s, _, ds = _logistic(x)
        value = x * s
        slope = s + _clamp(x, 120.0) * ds
    elif FUNCTION == "tanh":
        value = _tanh(x)
        _, _, ds = _logistic(2.0 * x)
        slope = 4.0 * ds
    else:
        value, _, slope = _logistic(x)
    return value, slope


@triton.jit
def _second(x, FUNCTION: tl.constexpr):
    """The second derivative of the function."""
    if FUNCTION == "gelu":
        z = _clamp(x, 20.0)
        result = _density(z) * (2.0 - z * z)
    elif FUNCTION == "gelu_tanh":
        z = _clamp(x, 15.0)
        u, du, ddu = _gate(z)
        s, rest, ds = _logistic(u)
        result = ds * (2.0 * du + z * (ddu + du * du * (rest - s)))
    elif FUNCTION == "silu":
        s, rest, ds = _logistic(x)
        result = ds * (2.0 + _clamp(x, 120.0) * (rest - s))
    elif FUNCTION == "tanh":
        _, _, ds = _logistic(2.0 * x)
        result = -8.0 * _tanh(x) * ds
    else:
        s, rest, ds = _logistic(x)
        result = ds * (rest - s)
    return result


@triton.jit
def activation_kernel(x, y, slope, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    """y = f(x), and slope = f'(x) where it is wanted."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    value, derivative = _first(tl.load(x + at, mask=mask, other=0.0), FUNCTION)
    tl.store(y + at, value, mask=mask)
    if slope is not None:
        tl.store(slope + at, derivative, mask=mask)


@triton.jit
def activation_twice_kernel(x, gy, c, slope, gx, ggy, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    """gx = c gy f''(x) and ggy = c f'(x)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    cotangent = tl.load(c + at, mask=mask, other=0.0)
    second = _second(tl.load(x + at, mask=mask, other=0.0), FUNCTION)
    tl.store(gx + at, cotangent * tl.load(gy + at, mask=mask, other=0.0) * second, mask=mask)
    tl.store(ggy + at, cotangent * tl.load(slope + at, mask=mask, other=0.0), mask=mask)


# --- Norms over rows ---------------------------------------------------------------------------------------------


@triton.jit
def _mean(x, count):
    return tl.div_rn(tl.sum(x, axis=0), count)


@triton.jit
def _or_else(pointer, at, mask, value):
    result = tl.where(mask, value, 0.0)
    if pointer is not None:
        result = tl.load(pointer + at, mask=mask, other=0.0)
    return result


@triton.jit
def norm_kernel(x, weight, bias, mean, rstd, y, width, count, eps, CENTRED: tl.constexpr, BLOCK: tl.constexpr):
    """One row. count: the width as a float, as in all of these."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    value = tl.load(x + row * width + at, mask=mask, other=0.0)
    center = 0.0
    if CENTRED:
        center = _mean(value, count)
    centred = tl.where(mask, value - center, 0.0)
    r = tl.div_rn(1.0, tl.sqrt_rn(_mean(centred * centred, count) + eps))
    result = centred * r * _or_else(weight, at, mask, 1.0) + _or_else(bias, at, mask, 0.0)
    tl.store(y + row * width + at, result, mask=mask)
    tl.store(mean + row, center)
    tl.store(rstd + row, r)


@triton.jit
def norm_backward_kernel(
    x, weight, gy, mean, rstd, gx, gw, gb, rows, width, count, CENTRED: tl.constexpr, BLOCK: tl.constexpr
):
    """ROWS rows; gw, gb: `[programs, width]`, the sums over these."""
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    w = _or_else(weight, at, mask, 1.0)
    sum_w = tl.zeros((BLOCK,), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    for row in range(program * ROWS, tl.minimum(program * ROWS + ROWS, rows)):
        cotangent = tl.load(gy + row * width + at, mask=mask, other=0.0)
        r = tl.load(rstd + row)
        normal = tl.where(mask, (tl.load(x + row * width + at, mask=mask, other=0.0) - tl.load(mean + row)) * r, 0.0)
        g = cotangent * w
        rest = g - normal * _mean(g * normal, count)
        if CENTRED:
            rest -= _mean(g, count)
        tl.store(gx + row * width + at, r * rest, mask=mask)
        sum_w += cotangent * normal
        sum_b += cotangent
    tl.store(gw + program * width + at, sum_w, mask=mask)
    tl.store(gb + program * width + at, sum_b, mask=mask)


@triton.jit
def norm_twice_kernel(
    x, weight, gy, c, cw, cb, mean, rstd, gx, ggy, gw, rows, width, count, CENTRED: tl.constexpr, BLOCK: tl.constexpr
):
    """As `norm_backward_kernel`, of the gradient of the gradient."""
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    sum_w = tl.zeros((BLOCK,), tl.float32)
    for row in range(program * ROWS, tl.minimum(program * ROWS + ROWS, rows)):
        w = _or_else(weight, at, mask, 1.0)
        along = _or_else(cw, at, mask, 0.0)
        cotangent = tl.load(gy + row * width + at, mask=mask, other=0.0)
        u = tl.load(c + row * width + at, mask=mask, other=0.0)
        r = tl.load(rstd + row)
        normal = tl.where(mask, (tl.load(x + row * width + at, mask=mask, other=0.0) - tl.load(mean + row)) * r, 0.0)
        g = cotangent * w
        c1 = _mean(u * normal, count)
        g1 = _mean(g * normal, count)
        share = _mean(u * g, count) - c1 * g1
        h = u - normal * c1
        q = cotangent * along - r * (u * g1 + g * c1)
        if CENTRED:
            c0 = _mean(u, count)
            share -= c0 * _mean(g, count)
            h -= c0
        h *= r
        rest = q - normal * (_mean(q * normal, count) + r * share)
        if CENTRED:
            rest -= _mean(q, count)
        tl.store(ggy + row * width + at, h * w + along * normal + _or_else(cb, at, mask, 0.0), mask=mask)
        tl.store(gx + row * width + at, r * rest, mask=mask)
        sum_w += h * cotangent
    tl.store(gw + program * width + at, tl.where(mask, sum_w, 0.0), mask=mask)


# --- Softmax -----------------------------------------------------------------------------------------------------


@triton.jit
def softmax_kernel(
    x, bias, p, width, period, heads, length, step_batch, step_head, step_row, scale, BLOCK: tl.constexpr
):
    """p = softmax(scale x + bias) of one row. period: 0, or row i of so many sees the columns 0..i. bias: of row l of
    head h of batch b, that many elements from its beginning."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    seen = mask
    if period > 0:
        seen = mask & (at <= row % period)
    z = tl.load(x + row * width + at, mask=mask, other=0.0) * scale
    if bias is not None:
        start = row // length // heads * step_batch + row // length % heads * step_head + row % length * step_row
        z += tl.load(bias + start + at, mask=mask, other=0.0)
    z = tl.where(seen, z, float("-inf"))
    most = tl.max(z, axis=0)
    if bias is not None:
        most = tl.where(most == float("-inf"), 0.0, most)
    e = tl.where(seen, _exponential(z - most), 0.0)
    total = tl.sum(e, axis=0)
    if bias is not None:
        total = tl.where(total == 0.0, 1.0, total)  # of a row that sees nothing
    tl.store(p + row * width + at, e * tl.div_rn(1.0, total), mask=mask)


@triton.jit
def softmax_backward_kernel(p, gp, gx, width, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    value = tl.load(p + row * width + at, mask=mask, other=0.0)
    cotangent = tl.load(gp + row * width + at, mask=mask, other=0.0)
    tl.store(gx + row * width + at, scale * value * (cotangent - tl.sum(value * cotangent, axis=0)), mask=mask)


@triton.jit
def softmax_twice_kernel(p, gp, c, ggp, again, width, period, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    value = tl.load(p + row * width + at, mask=mask, other=0.0)
    g = tl.load(gp + row * width + at, mask=mask, other=0.0)
    u = tl.load(c + row * width + at, mask=mask, other=0.0)
    d = tl.sum(value * g, axis=0)
    e = tl.sum(value * u, axis=0)
    tl.store(ggp + row * width + at, scale * value * (u - e), mask=mask)
    seen = mask
    if period > 0:
        seen = mask & (at <= row % period)
    tl.store(again + row * width + at, tl.where(seen, scale * (u * (g - d) - g * e), 0.0), mask=mask)
