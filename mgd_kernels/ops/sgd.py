"""The operators of SGD; `slots` is `[momentum_buffer]`, or empty for plain SGD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgd_kernels.errors import BadArgument
from mgd_kernels.ops._steps import (
    differentiable_vjp,
    differentiate,
    fake_vjp,
    step,
    step_,
    vjp,
    vjp_,
    zeros_for_none,
)
from mgd_kernels.rules import SGD_MOMENTUM, SGD_NESTEROV, SGD_PLAIN, Rule

_INPUTS = "Tensor grad, Tensor hyper, SymInt k, Tensor segments, bool nesterov"


def _rule(slots: Sequence[Tensor], nesterov: bool) -> Rule:
    if len(slots) > 1 or (nesterov and not slots):
        raise BadArgument(
            f"expected slots [momentum_buffer], or [] for SGD without momentum (and Nesterov); got {len(slots)} "
            f"slots with nesterov={nesterov}"
        )
    return (SGD_NESTEROV if nesterov else SGD_MOMENTUM) if slots else SGD_PLAIN


@torch.library.custom_op(
    "mgd_kernels::sgd_step",
    mutates_args=(),
    schema=f"(Tensor params, Tensor[] slots, {_INPUTS}) -> Tensor[]",
)
def sgd_step(params, slots, grad, hyper, k, segments, nesterov):
    """One SGD step: the new `[params, *slots]`."""
    return step(_rule(slots, nesterov), params, slots, grad, hyper, k, segments)


@sgd_step.register_fake
def _(params, slots, grad, hyper, k, segments, nesterov):
    return [torch.empty_like(tensor) for tensor in (params, *slots)]


@torch.library.custom_op(
    "mgd_kernels::sgd_step_",
    mutates_args=("params", "slots"),
    schema=f"(Tensor(a!) params, Tensor(b!)[] slots, {_INPUTS}) -> ()",
)
def sgd_step_(params, slots, grad, hyper, k, segments, nesterov):
    """One SGD step, in place."""
    step_(_rule(slots, nesterov), params, slots, grad, hyper, k, segments)


@sgd_step_.register_fake
def _(params, slots, grad, hyper, k, segments, nesterov):
    return None


@torch.library.custom_op(
    "mgd_kernels::sgd_step_vjp",
    mutates_args=(),
    schema=f"(Tensor params, Tensor[] slots, {_INPUTS}, Tensor[] adjoints, *, bool hyper_wanted=True) -> Tensor[]",
)
def sgd_step_vjp(params, slots, grad, hyper, k, segments, nesterov, adjoints, *, hyper_wanted=True):
    """The VJP of `sgd_step`: the adjoints of `[params, *slots]` before the step from those after it, then the
    cotangents of grad (in the parameters' dtype) and of hyper `[G, H]`, as in `adam_step_vjp`."""
    return vjp(_rule(slots, nesterov), params, slots, grad, hyper, k, segments, adjoints, hyper_wanted)


@sgd_step_vjp.register_fake
def _(params, slots, grad, hyper, k, segments, nesterov, adjoints, *, hyper_wanted=True):
    return fake_vjp(params, hyper, adjoints)


@torch.library.custom_op(
    "mgd_kernels::sgd_step_vjp_",
    mutates_args=("adjoints", "u"),
    schema=(f"(Tensor params, Tensor[] slots, {_INPUTS}, Tensor(a!)[] adjoints, Tensor(b!) u) -> Tensor"),
)
def sgd_step_vjp_(params, slots, grad, hyper, k, segments, nesterov, adjoints, u):
    """As `sgd_step_vjp`, in place: the adjoints are overwritten, `u` receives the cotangent of grad; returns that of
    hyper `[G, H]`."""
    return vjp_(_rule(slots, nesterov), params, slots, grad, hyper, k, segments, adjoints, u)


@sgd_step_vjp_.register_fake
def _(params, slots, grad, hyper, k, segments, nesterov, adjoints, u):
    return torch.empty_like(hyper, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    params, slots, grad, hyper, ctx.k, segments, ctx.nesterov = inputs
    ctx.save_for_backward(params, grad, hyper, segments, *slots)


def _backward(ctx, cotangents):
    params, grad, hyper, segments, *slots = ctx.saved_tensors
    cotangents = zeros_for_none(cotangents, (params, *slots))
    dparams, *dslots, u, dhyper = sgd_step_vjp(
        params, slots, grad, hyper, ctx.k, segments, ctx.nesterov, cotangents, hyper_wanted=ctx.needs_input_grad[3]
    )
    return dparams, dslots, u.to(grad.dtype), dhyper, None, None, None


sgd_step.register_autograd(_backward, setup_context=_setup)


def _vjp_setup(ctx, inputs, keyword_only_inputs, output):
    params, slots, grad, hyper, ctx.k, segments, ctx.nesterov, adjoints = inputs
    ctx.save_for_backward(params, grad, hyper, segments, *slots, *adjoints)
    ctx.slots = len(slots)


def _vjp_backward(ctx, cotangents):
    params, grad, hyper, segments, *rest = ctx.saved_tensors

    def function(params, grad, hyper, *rest):
        slots, adjoints = rest[: ctx.slots], rest[ctx.slots :]
        rule = _rule(slots, ctx.nesterov)
        return differentiable_vjp(rule, ctx.k, segments, (params, *slots), grad, hyper, adjoints)

    dparams, dgrad, dhyper, *drest = differentiate(function, [params, grad, hyper, *rest], cotangents)
    return dparams, drest[: ctx.slots], dgrad, dhyper, None, None, None, drest[ctx.slots :]


sgd_step_vjp.register_autograd(_vjp_backward, setup_context=_vjp_setup)
