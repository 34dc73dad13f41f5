"""The reference backend: plain torch, any dtype and device. In float64 it is the specification.

Adam: Kingma & Ba 2015 (arXiv 1412.6980), decoupled weight decay after Loshchilov & Hutter 2019 (arXiv 1711.05101),
`eps_root` inside the square root as in optax. SGD: as `torch.optim.SGD`. The VJPs are derived by hand; the tests
compare them with autograd through the steps below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgd_kernels.arena import Segments
from mgd_kernels.memory import check_extents_apart
from mgd_kernels.rules import Rule

Hyper = Sequence[Any]  # floats, or 0-d tensors where autograd is to reach the hyperparameters


def unavailable() -> str | None:
    return None


def unsupported(rule: Rule, params: Tensor, grad: Tensor) -> str | None:
    return None


# --- Adam, AdamW ------------------------------------------------------------------------------------------------


def _adam_terms(m, v, g, h: Hyper, k: int):
    _, _, _, beta1, beta2, eps, eps_root = h
    m1 = beta1 * m + (1 - beta1) * g
    v1 = beta2 * v + (1 - beta2) * g * g
    vhat = v1 / (1 - beta2**k) + eps_root
    positive = vhat > 0
    S = torch.where(positive, torch.where(positive, vhat, 1.0).sqrt(), 0.0)
    D = S + eps
    # 0/0 is 0: an element that never saw a gradient does not move, even with eps = eps_root = 0.
    safe_D = torch.where(D > 0, D, 1.0)
    n = torch.where(D > 0, (m1 / (1 - beta1**k)) / safe_D, 0.0)
    return m1, v1, S, D, safe_D, n


def adam_step(p: Tensor, m: Tensor, v: Tensor, g: Tensor, h: Hyper, k: int) -> tuple[Tensor, Tensor, Tensor]:
    lr, weight_decay, l2, *_ = h
    m1, v1, _, _, _, n = _adam_terms(m, v, g + l2 * p, h, k)
    return (1 - lr * weight_decay) * p - lr * n, m1, v1


def adam_vjp(p, m, v, g, h: Hyper, k: int, ap, am, av):
    """Cotangents `(u, ap, am, av, [one per hyperparameter])`, u being that of `g`, from those of the outputs."""
    lr, weight_decay, l2, beta1, beta2, _, _ = h
    c1, c2 = 1 - beta1**k, 1 - beta2**k
    g = g + l2 * p
    _, v1, S, D, safe_D, n = _adam_terms(m, v, g, h, k)
    dn = torch.where(D > 0, -lr * ap, 0.0)
    dD = -dn * n / safe_D
    dvhat = torch.where(S > 0, dD / (2 * torch.where(S > 0, S, 1.0)), 0.0)
    dm1 = am + dn / (c1 * safe_D)
    dv1 = av + dvhat / c2
    u = (1 - beta1) * dm1 + 2 * (1 - beta2) * g * dv1
    dh = [
        -_sum(ap, n + weight_decay * p),
        -lr * _sum(ap, p),
        _sum(u, p),
        _sum(dm1, m - g) + k * beta1 ** (k - 1) / c1 * _sum(dn, n),
        _sum(dv1, v - g * g) + k * beta2 ** (k - 1) / c2 * _sum(dvhat, v1 / c2),
        _sum(dD),
        _sum(dvhat),
    ]
    return u, (1 - lr * weight_decay) * ap + l2 * u, beta1 * dm1, beta2 * dv1, dh


def adam_jvp(p, m, v, g, h: Hyper, k: int, dp, dm, dv, dg, dh: Hyper):
    """The tangents of `(p, m, v)` after the step, from those before it, of `g` and of the hyperparameters."""
    lr, weight_decay, l2, beta1, beta2, _, _ = h
    dlr, dweight_decay, dl2, dbeta1, dbeta2, deps, deps_root = dh
    c1, c2 = 1 - beta1**k, 1 - beta2**k
    dc1, dc2 = -k * beta1 ** (k - 1) * dbeta1, -k * beta2 ** (k - 1) * dbeta2
    dg = dg + dl2 * p + l2 * dp
    g = g + l2 * p
    m1, v1, S, D, safe_D, n = _adam_terms(m, v, g, h, k)
    dm1 = dbeta1 * (m - g) + beta1 * dm + (1 - beta1) * dg
    dv1 = dbeta2 * (v - g * g) + beta2 * dv + 2 * (1 - beta2) * g * dg
    dvhat = dv1 / c2 - v1 * (dc2 / c2**2) + deps_root
    dD = torch.where(S > 0, dvhat / (2 * torch.where(S > 0, S, 1.0)), 0.0) + deps
    dn = torch.where(D > 0, (dm1 / c1 - m1 * (dc1 / c1**2) - n * dD) / safe_D, 0.0)
    ddecay = -(dlr * weight_decay + lr * dweight_decay)
    return ddecay * p + (1 - lr * weight_decay) * dp - dlr * n - lr * dn, dm1, dv1


# --- SGD --------------------------------------------------------------------------------------------------------


def sgd_step(p: Tensor, buf: Tensor | None, g: Tensor, h: Hyper, k: int, nesterov: bool):
    lr, weight_decay, l2, momentum, dampening = h
    g = g + l2 * p
    if buf is None:
        return (1 - lr * weight_decay) * p - lr * g, None
    buf1 = g.clone() if k == 1 else momentum * buf + (1 - dampening) * g
    d = g + momentum * buf1 if nesterov else buf1
    return (1 - lr * weight_decay) * p - lr * d, buf1


def sgd_vjp(p, buf, g, h: Hyper, k: int, nesterov: bool, ap, ab):
    """Cotangents `(u, ap, ab, [one per hyperparameter])`, u being that of `g`, from those of the outputs."""
    lr, weight_decay, l2, momentum, dampening = h
    g = g + l2 * p
    dd = -lr * ap
    zero = torch.zeros((), dtype=torch.float64, device=p.device)
    dmomentum = ddampening = zero
    if buf is None:
        d, u, ab = g, dd, None
    else:
        first = k == 1
        buf1 = g if first else momentum * buf + (1 - dampening) * g
        d = g + momentum * buf1 if nesterov else buf1
        dbuf1 = ab + (momentum * dd if nesterov else dd)
        u = dbuf1 if first else (1 - dampening) * dbuf1
        if nesterov:
            u = u + dd
            dmomentum = _sum(dd, buf1)
        if not first:
            dmomentum = dmomentum + _sum(dbuf1, buf)
            ddampening = -_sum(dbuf1, g)
        ab = torch.zeros_like(ab) if first else momentum * dbuf1
    dh = [-_sum(ap, d + weight_decay * p), -lr * _sum(ap, p), _sum(u, p), dmomentum, ddampening]
    return u, (1 - lr * weight_decay) * ap + l2 * u, ab, dh


def sgd_jvp(p, buf, g, h: Hyper, k: int, nesterov: bool, dp, dbuf, dg, dh: Hyper):
    """The tangents of `(p, buf)` after the step, from those before it, of `g` and of the hyperparameters."""
    lr, weight_decay, l2, momentum, dampening = h
    dlr, dweight_decay, dl2, dmomentum, ddampening = dh
    dg = dg + dl2 * p + l2 * dp
    g = g + l2 * p
    d, dd, dbuf1 = g, dg, None
    if buf is not None:
        buf1, dbuf1 = g, dg
        if k > 1:
            buf1 = momentum * buf + (1 - dampening) * g
            dbuf1 = dmomentum * buf + momentum * dbuf - ddampening * g + (1 - dampening) * dg
        d, dd = buf1, dbuf1
        if nesterov:
            d, dd = g + momentum * buf1, dg + dmomentum * buf1 + momentum * dbuf1
    ddecay = -(dlr * weight_decay + lr * dweight_decay)
    return ddecay * p + (1 - lr * weight_decay) * dp - dlr * d - lr * dd, dbuf1


def _sum(x: Tensor, y: Tensor | None = None) -> Tensor:
    return (x.double() if y is None else x.double() * y.double()).sum()


# --- The functions of every backend: see `interface.Backend` -----------------------------------------------------


def step(rule: Rule, p: Tensor, slots: Sequence[Tensor], g: Tensor, h: Hyper, k: int) -> tuple[Tensor, ...]:
    """One step as a differentiable function: the new `(params, *slots)`."""
    if rule.name == "adam":
        exp_avg, exp_avg_sq = slots
        return adam_step(p, exp_avg, exp_avg_sq, g, h, k)
    new, buf = sgd_step(p, slots[0] if slots else None, g, h, k, rule.nesterov)
    return (new, buf) if slots else (new,)


def vjp(rule: Rule, p, slots, g, h: Hyper, k: int, adjoints: Sequence[Tensor]):
    """`(u, [adjoint of params, *slots], [cotangent of each hyperparameter])`."""
    if rule.name == "adam":
        exp_avg, exp_avg_sq = slots
        u, *rest, dh = adam_vjp(p, exp_avg, exp_avg_sq, g, h, k, *adjoints)
        return u, rest, dh
    u, ap, ab, dh = sgd_vjp(
        p, slots[0] if slots else None, g, h, k, rule.nesterov, adjoints[0], adjoints[1] if slots else None
    )
    return u, [ap, ab][: len(adjoints)], dh


def jvp(rule: Rule, p, slots, g, h: Hyper, k: int, tangents: Sequence[Tensor], dg, dh: Hyper):
    """The tangents of `(params, *slots)` after the step."""
    if rule.name == "adam":
        (m, v), (dp, dm, dv) = slots, tangents
        return adam_jvp(p, m, v, g, h, k, dp, dm, dv, dg, dh)
    buf, dbuf = (slots[0], tangents[1]) if slots else (None, None)
    return sgd_jvp(p, buf, g, h, k, rule.nesterov, tangents[0], dbuf, dg, dh)[: len(tangents)]


def _row(table: Tensor) -> Hyper:
    """The entries of a row of hyperparameters: numbers, or where they would have to be waited for, tensors."""
    return table.tolist() if table.device.type == "cpu" else table.unbind()


def step_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grad: Tensor,
    hyper: Tensor,
    k: int,
    segments: Segments,
    grad_scale: float | Tensor = 1.0,
) -> None:
    check_extents_apart([params, *slots], [grad, hyper])
    for start, stop, group in segments.rows():
        state = [tensor[start:stop] for tensor in (params, *slots)]
        g = grad[start:stop].to(params.dtype) * grad_scale
        for old, new in zip(state, step(rule, state[0], state[1:], g, _row(hyper[group]), k), strict=True):
            old.copy_(new)


def vjp_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grad: Tensor,
    hyper: Tensor,
    k: int,
    segments: Segments,
    adjoint_params: Tensor,
    adjoint_slots: Sequence[Tensor],
    u: Tensor,
    grad_scale: float | Tensor = 1.0,
) -> Tensor:
    check_extents_apart([adjoint_params, *adjoint_slots, u], [params, *slots, grad, hyper])
    out = torch.zeros(segments.groups, len(rule.hyper) + 1, dtype=torch.float64, device=params.device)
    for start, stop, group in segments.rows():
        state = [tensor[start:stop] for tensor in (params, *slots)]
        adjoints = [tensor[start:stop] for tensor in (adjoint_params, *adjoint_slots)]
        raw = grad[start:stop].to(params.dtype)
        du, new, dh = vjp(rule, state[0], state[1:], raw * grad_scale, _row(hyper[group]), k, adjoints)
        for old, value in zip(adjoints, new, strict=True):
            old.copy_(value)
        u[start:stop] = du * grad_scale
        out[group] += torch.stack([*dh, _sum(du, raw)])
    return out


STRIP = 1 << 16  # elements: what is computed for as many stays in the processor's cache


def jvp_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grad: Tensor,
    hyper: Tensor,
    k: int,
    segments: Segments,
    tangents: Sequence[Sequence[Tensor]],
    grad_tangents: Sequence[Tensor],
    hyper_tangents: Tensor,
    grad_scale: float | Tensor = 1.0,
    advance: bool = False,
) -> None:
    state, moved = (params, *slots), [x for tangent in tangents for x in tangent]
    written = [*moved, *(state if advance else ())]
    check_extents_apart(written, [*(() if advance else state), grad, *grad_tangents, hyper, hyper_tangents])
    for row, end, group in segments.rows():
        h, dhs = _row(hyper[group]), [_row(tangent) for tangent in hyper_tangents[:, group]]
        for start in range(row, end, STRIP):
            part = slice(start, min(start + STRIP, end))
            x, g = [tensor[part] for tensor in state], grad[part].to(params.dtype) * grad_scale
            for tangent, grad_tangent, dh in zip(tangents, grad_tangents, dhs, strict=True):
                dx, dg = [tensor[part] for tensor in tangent], grad_tangent[part].to(params.dtype)
                for old, new in zip(dx, jvp(rule, x[0], x[1:], g, h, k, dx, dg, dh), strict=True):
                    old.copy_(new)
    if advance:
        step_(rule, params, slots, grad, hyper, k, segments, grad_scale)


def replay_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grads: Sequence[Tensor],
    hypers: Tensor,
    k: int,
    segments: Segments,
    grad_scales: Sequence[float | Tensor],
) -> None:
    for i, (grad, scale) in enumerate(zip(grads, grad_scales, strict=True)):
        step_(rule, params, slots, grad, hypers[i], k + i, segments, scale)


def dot(x: Tensor, y: Tensor) -> Tensor:
    return _sum(x, y)
