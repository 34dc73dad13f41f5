"""The operators of Adam and AdamW."""

from __future__ import annotations

import torch

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
from mgd_kernels.rules import ADAM

_INPUTS = "Tensor grad, Tensor hyper, SymInt k, Tensor segments"


@torch.library.custom_op(
    "mgd_kernels::adam_step",
    mutates_args=(),
    schema=f"(Tensor params, Tensor exp_avg, Tensor exp_avg_sq, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def adam_step(params, exp_avg, exp_avg_sq, grad, hyper, k, segments):
    """One Adam step: the new `(params, exp_avg, exp_avg_sq)`."""
    return tuple(step(ADAM, params, [exp_avg, exp_avg_sq], grad, hyper, k, segments))


@adam_step.register_fake
def _(params, exp_avg, exp_avg_sq, grad, hyper, k, segments):
    return torch.empty_like(params), torch.empty_like(exp_avg), torch.empty_like(exp_avg_sq)


@torch.library.custom_op(
    "mgd_kernels::adam_step_",
    mutates_args=("params", "exp_avg", "exp_avg_sq"),
    schema=f"(Tensor(a!) params, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, {_INPUTS}) -> ()",
)
def adam_step_(params, exp_avg, exp_avg_sq, grad, hyper, k, segments):
    """One Adam step, in place."""
    step_(ADAM, params, [exp_avg, exp_avg_sq], grad, hyper, k, segments)


@adam_step_.register_fake
def _(params, exp_avg, exp_avg_sq, grad, hyper, k, segments):
    return None


@torch.library.custom_op(
    "mgd_kernels::adam_step_vjp",
    mutates_args=(),
    schema=(
        f"(Tensor params, Tensor exp_avg, Tensor exp_avg_sq, {_INPUTS}, Tensor adjoint_params, "
        "Tensor adjoint_exp_avg, Tensor adjoint_exp_avg_sq, *, bool hyper_wanted=True) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def adam_step_vjp(params, exp_avg, exp_avg_sq, grad, hyper, k, segments, *adjoints, hyper_wanted=True):
    """The VJP of `adam_step`: the adjoints of `(params, exp_avg, exp_avg_sq)` before the step from those after it,
    the cotangent of grad (in the parameters' dtype), and that of hyper `[G, H]`, which means nothing without
    `hyper_wanted`."""
    return tuple(vjp(ADAM, params, [exp_avg, exp_avg_sq], grad, hyper, k, segments, adjoints, hyper_wanted))


@adam_step_vjp.register_fake
def _(params, exp_avg, exp_avg_sq, grad, hyper, k, segments, *adjoints, hyper_wanted=True):
    return tuple(fake_vjp(params, hyper, adjoints))


@torch.library.custom_op(
    "mgd_kernels::adam_step_vjp_",
    mutates_args=("adjoint_params", "adjoint_exp_avg", "adjoint_exp_avg_sq", "u"),
    schema=(
        f"(Tensor params, Tensor exp_avg, Tensor exp_avg_sq, {_INPUTS}, Tensor(a!) adjoint_params, "
        "Tensor(b!) adjoint_exp_avg, Tensor(c!) adjoint_exp_avg_sq, Tensor(d!) u) -> Tensor"
    ),
)
def adam_step_vjp_(params, exp_avg, exp_avg_sq, grad, hyper, k, segments, *adjoints_and_u):
    """As `adam_step_vjp`, in place: the adjoints are overwritten, `u` receives the cotangent of grad; returns that
    of hyper `[G, H]`."""
    *adjoints, u = adjoints_and_u
    return vjp_(ADAM, params, [exp_avg, exp_avg_sq], grad, hyper, k, segments, adjoints, u)


@adam_step_vjp_.register_fake
def _(params, exp_avg, exp_avg_sq, grad, hyper, k, segments, *adjoints_and_u):
    return torch.empty_like(hyper, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    *tensors, k, segments = inputs
    ctx.save_for_backward(*tensors, segments)
    ctx.k = k


def _backward(ctx, *cotangents):
    params, exp_avg, exp_avg_sq, grad, hyper, segments = ctx.saved_tensors
    adjoints = zeros_for_none(cotangents, (params, exp_avg, exp_avg_sq))
    dparams, dm, dv, u, dhyper = adam_step_vjp(
        params, exp_avg, exp_avg_sq, grad, hyper, ctx.k, segments, *adjoints, hyper_wanted=ctx.needs_input_grad[4]
    )
    return dparams, dm, dv, u.to(grad.dtype), dhyper, None, None


adam_step.register_autograd(_backward, setup_context=_setup)


def _vjp_setup(ctx, inputs, keyword_only_inputs, output):
    *tensors, k, segments, ap, am, av = inputs
    ctx.save_for_backward(*tensors, ap, am, av, segments)
    ctx.k = k


def _vjp_backward(ctx, *cotangents):
    *inputs, segments = ctx.saved_tensors

    def function(params, exp_avg, exp_avg_sq, grad, hyper, *adjoints):
        state = (params, exp_avg, exp_avg_sq)
        return differentiable_vjp(ADAM, ctx.k, segments, state, grad, hyper, adjoints)

    gradients = differentiate(function, inputs, cotangents)
    return *gradients[:5], None, None, *gradients[5:]


adam_step_vjp.register_autograd(_vjp_backward, setup_context=_vjp_setup)
