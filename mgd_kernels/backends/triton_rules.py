"""The element-wise mathematics of each rule in Triton, and the coefficients that it reads.

Rules go by name: "adam", and "sgd", "momentum", "nesterov" for SGD without a buffer, with one, and with Nesterov's.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the coefficient tables, which `coefficients_kernel` fills: float32 for the element-wise mathematics,
# float64 for the reductions.
WIDTH = tl.constexpr(12)
WIDTH64 = tl.constexpr(4)
# And of the table of their derivatives in a direction, float32.
TANGENT_WIDTH = tl.constexpr(9)


# --- Coefficients ------------------------------------------------------------------------------------------------


@triton.jit
def _power(base, n):
    """base**n in float64 by squaring, n >= 0 (0**0 = 1)."""
    result = base * 0.0 + 1.0
    while n > 0:
        result = tl.where(n % 2 == 1, result * base, result)
        base = base * base
        n = n // 2
    return result


@triton.jit(do_not_specialize=["groups", "width", "k", "scale"])
def coefficients_kernel(
    hyper, k_ptr, k, scales, scale, out32, out64, groups, width, RULE: tl.constexpr
):  # fmt: skip
    """Program i turns row i of `hyper` `[steps * groups, width]` into row i of the coefficient tables.

    Step number and gradient scale come from memory where a pointer is given, else from the number beside it.
    """
    row = tl.program_id(0)
    step = row // groups
    if k_ptr is not None:
        k = tl.load(k_ptr)
    k = k.to(tl.int64) + step
    if scales is not None:
        scale = tl.load(scales + step)
    hyper += row.to(tl.int64) * width
    out32 += row.to(tl.int64) * WIDTH
    out64 += row.to(tl.int64) * WIDTH64
    lr = tl.load(hyper)
    weight_decay = tl.load(hyper + 1)
    tl.store(out32, 1.0 - lr * weight_decay)
    tl.store(out32 + 1, lr)
    tl.store(out32 + 2, tl.load(hyper + 2))
    tl.store(out32 + 3, scale)
    tl.store(out64, lr)
    tl.store(out64 + 1, weight_decay)
    if RULE == "adam":
        beta1 = tl.load(hyper + 3)
        beta2 = tl.load(hyper + 4)
        power1 = _power(beta1, k - 1)
        power2 = _power(beta2, k - 1)
        c1 = 1.0 - power1 * beta1
        c2 = 1.0 - power2 * beta2
        tl.store(out32 + 4, beta1)
        tl.store(out32 + 5, 1.0 - beta1)
        tl.store(out32 + 6, beta2)
        tl.store(out32 + 7, 1.0 - beta2)
        tl.store(out32 + 8, 1.0 / c1)
        tl.store(out32 + 9, 1.0 / c2)
        tl.store(out32 + 10, tl.load(hyper + 5))
        tl.store(out32 + 11, tl.load(hyper + 6))
        # Derivatives of the bias corrections: d(1/c)/dbeta = k beta^(k-1) / c^2.
        tl.store(out64 + 2, k.to(tl.float64) * power1 / c1)
        tl.store(out64 + 3, k.to(tl.float64) * power2 / c2)
    else:
        momentum = tl.load(hyper + 3)
        tl.store(out32 + 4, momentum)
        tl.store(out32 + 5, 1.0 - tl.load(hyper + 4))
        tl.store(out32 + 6, tl.where(k == 1, 1.0, 0.0))


@triton.jit
def read_coefficients(table, row):
    """One row of the float32 table, as the tuple that the element-wise functions take."""
    table += row * WIDTH
    return (
        tl.load(table),
        tl.load(table + 1),
        tl.load(table + 2),
        tl.load(table + 3),
        tl.load(table + 4),
        tl.load(table + 5),
        tl.load(table + 6),
        tl.load(table + 7),
        tl.load(table + 8),
        tl.load(table + 9),
        tl.load(table + 10),
        tl.load(table + 11),
    )


@triton.jit(do_not_specialize=["groups", "width", "k"])
def tangents_kernel(hyper, hyper_tangents, k_ptr, k, out, groups, width, RULE: tl.constexpr):  # fmt: skip
    """Program i turns row i of `hyper_tangents` `[directions * groups, width]`, tangents of the rows of `hyper`
    `[groups, width]` at step k, into row i of `out`, the derivatives of the coefficients."""
    row = tl.program_id(0)
    if k_ptr is not None:
        k = tl.load(k_ptr)
    k = k.to(tl.int64)
    hyper += (row % groups).to(tl.int64) * width
    hyper_tangents += row.to(tl.int64) * width
    out += row.to(tl.int64) * TANGENT_WIDTH
    dlr = tl.load(hyper_tangents)
    dweight_decay = tl.load(hyper_tangents + 1)
    tl.store(out, dlr)
    tl.store(out + 1, -(dlr * tl.load(hyper + 1) + tl.load(hyper) * dweight_decay))
    tl.store(out + 2, tl.load(hyper_tangents + 2))
    tl.store(out + 3, tl.load(hyper_tangents + 3))
    tl.store(out + 4, tl.load(hyper_tangents + 4))
    if RULE == "adam":
        beta1 = tl.load(hyper + 3)
        beta2 = tl.load(hyper + 4)
        power1 = _power(beta1, k - 1)
        power2 = _power(beta2, k - 1)
        c1 = 1.0 - power1 * beta1
        c2 = 1.0 - power2 * beta2
        tl.store(out + 5, k.to(tl.float64) * power1 * tl.load(hyper_tangents + 3) / (c1 * c1))
        tl.store(out + 6, k.to(tl.float64) * power2 * tl.load(hyper_tangents + 4) / (c2 * c2))
        tl.store(out + 7, tl.load(hyper_tangents + 5))
        tl.store(out + 8, tl.load(hyper_tangents + 6))


@triton.jit
def read_tangents(table, row):
    """One row of their derivatives, likewise."""
    table += row * TANGENT_WIDTH
    return (
        tl.load(table),
        tl.load(table + 1),
        tl.load(table + 2),
        tl.load(table + 3),
        tl.load(table + 4),
        tl.load(table + 5),
        tl.load(table + 6),
        tl.load(table + 7),
        tl.load(table + 8),
    )


# --- The rules, element by element (design: mgd_kernels/backends/reference.py) -----------------------------------


@triton.jit
def _adam_terms(m, v, g, c):
    _, _, _, _, beta1, rest1, beta2, rest2, inverse_c1, inverse_c2, eps, eps_root = c
    m1 = beta1 * m + rest1 * g
    v1 = beta2 * v + rest2 * g * g
    v1c = v1 * inverse_c2
    vhat = v1c + eps_root
    S = tl.where(vhat > 0, tl.sqrt_rn(tl.where(vhat > 0, vhat, 1.0)), 0.0)
    D = S + eps
    # 0/0 is 0: an element that never saw a gradient does not move, even with eps = eps_root = 0.
    safe_D = tl.where(D > 0, D, 1.0)
    n = tl.where(D > 0, tl.div_rn(m1 * inverse_c1, safe_D), 0.0)
    return m1, v1, v1c, S, D, safe_D, n


@triton.jit
def adam_vjp(p, m, v, g, ap, am, av, c, bias2):
    """u, the new adjoints, and the float64 terms whose sums are the hyperparameter cotangents (see vjp_kernel)."""
    decay, lr, l2, _, beta1, rest1, beta2, rest2, inverse_c1, inverse_c2, _, _ = c
    g = g + l2 * p
    _, _, v1c, S, D, safe_D, n = _adam_terms(m, v, g, c)
    dn = tl.where(D > 0, -lr * ap, 0.0)
    dD = tl.div_rn(-dn * n, safe_D)
    dvhat = tl.where(S > 0, tl.div_rn(dD, tl.where(S > 0, 2 * S, 1.0)), 0.0)
    dm1 = am + tl.div_rn(dn * inverse_c1, safe_D)
    dv1 = av + dvhat * inverse_c2
    u = rest1 * dm1 + 2 * rest2 * g * dv1
    dvhat64 = dvhat.to(tl.float64)
    ap64 = ap.to(tl.float64)
    p64 = p.to(tl.float64)
    return (
        u,
        decay * ap + l2 * u,
        beta1 * dm1,
        beta2 * dv1,
        ap64 * n.to(tl.float64),
        ap64 * p64,
        u.to(tl.float64) * p64,
        dm1.to(tl.float64) * (m - g).to(tl.float64),
        dv1.to(tl.float64) * (v - g * g).to(tl.float64) + bias2 * (dvhat64 * v1c.to(tl.float64)),
        dD.to(tl.float64),
        dvhat64,
    )


@triton.jit
def _sgd_terms(buf, g, c, RULE: tl.constexpr):
    """The direction of the step and the new buffer; g includes the L2 term."""
    momentum, rest, first = c[4], c[5], c[6]
    if RULE == "sgd":
        return g, g
    buf1 = tl.where(first > 0, g, momentum * buf + rest * g)
    if RULE == "nesterov":
        return g + momentum * buf1, buf1
    return buf1, buf1


@triton.jit
def sgd_vjp(p, buf, g, ap, ab, c, RULE: tl.constexpr):
    """u, the new adjoints, and the float64 terms whose sums are the hyperparameter cotangents (see vjp_kernel)."""
    decay, lr, l2, momentum, rest, first = c[0], c[1], c[2], c[4], c[5], c[6]
    g = g + l2 * p
    d, buf1 = _sgd_terms(buf, g, c, RULE)
    dd = -lr * ap
    ap64 = ap.to(tl.float64)
    p64 = p.to(tl.float64)
    dmomentum = ap64 * 0.0
    ddampening = dmomentum
    if RULE == "sgd":
        u = dd
    else:
        dbuf1 = ab + (momentum * dd if RULE == "nesterov" else dd)
        u = tl.where(first > 0, dbuf1, rest * dbuf1)
        ab = tl.where(first > 0, 0.0, momentum * dbuf1)
        # Where the buffer starts out as the gradient, neither its old value nor the dampening counts.
        dbuf64 = tl.where(first > 0, 0.0, dbuf1).to(tl.float64)
        dmomentum = dbuf64 * tl.where(first > 0, 0.0, buf).to(tl.float64)
        ddampening = -dbuf64 * g.to(tl.float64)
        if RULE == "nesterov":
            u = u + dd
            dmomentum += dd.to(tl.float64) * buf1.to(tl.float64)
    return (
        u,
        decay * ap + l2 * u,
        ab,
        ap64 * d.to(tl.float64),
        ap64 * p64,
        u.to(tl.float64) * p64,
        dmomentum,
        ddampening,
    )


@triton.jit
def jvp(p, s0, s1, g, dp, ds0, ds1, dg, c, d, RULE: tl.constexpr):
    """The tangents of the state after one step of any rule, from those before it, of g (without the L2 term) and of
    the coefficients; those of slots that the rule lacks pass through."""
    decay, lr, l2 = c[0], c[1], c[2]
    dlr, ddecay, dl2 = d[0], d[1], d[2]
    dg = dg + l2 * dp + dl2 * p
    g = g + l2 * p
    if RULE == "adam":
        _, _, _, _, beta1, rest1, beta2, rest2, inverse_c1, inverse_c2, _, _ = c
        _, _, _, dbeta1, dbeta2, dinverse_c1, dinverse_c2, deps, deps_root = d
        m1, v1, _, S, D, safe_D, n = _adam_terms(s0, s1, g, c)
        dm1 = beta1 * ds0 + rest1 * dg + dbeta1 * (s0 - g)
        dv1 = beta2 * ds1 + 2 * rest2 * g * dg + dbeta2 * (s1 - g * g)
        dvhat = dv1 * inverse_c2 + v1 * dinverse_c2 + deps_root
        dD = tl.where(S > 0, tl.div_rn(dvhat, tl.where(S > 0, 2 * S, 1.0)), 0.0) + deps
        dn = tl.where(D > 0, tl.div_rn(dm1 * inverse_c1 + m1 * dinverse_c1 - n * dD, safe_D), 0.0)
        ds0, ds1 = dm1, dv1
    else:
        momentum, rest, first = c[4], c[5], c[6]
        dmomentum, ddampening = d[3], d[4]
        n, buf1 = _sgd_terms(s0, g, c, RULE)
        dn = dg
        if RULE != "sgd":
            ds0 = tl.where(first > 0, dg, momentum * ds0 + rest * dg + (dmomentum * s0 - ddampening * g))
            dn = ds0
            if RULE == "nesterov":
                dn = dg + momentum * ds0 + dmomentum * buf1
    return decay * dp - lr * dn + (ddecay * p - dlr * n), ds0, ds1


@triton.jit
def step(p, s0, s1, g, c, RULE: tl.constexpr):
    """One step of any rule; slots the rule lacks pass through."""
    decay, lr, l2 = c[0], c[1], c[2]
    g = g + l2 * p
    if RULE == "adam":
        s0, s1, _, _, _, _, d = _adam_terms(s0, s1, g, c)
    elif RULE == "sgd":
        d, _ = _sgd_terms(s0, g, c, RULE)
    else:
        d, s0 = _sgd_terms(s0, g, c, RULE)
    return decay * p - lr * d, s0, s1
