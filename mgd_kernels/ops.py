"""The fused steps and their vector-Jacobian products as operators of torch: `torch.ops.mgd_kernels.*`.

They work under any autograd graph and under `torch.compile`, and run on whichever backend fits their tensors. The
functional steps are differentiable in params, slots, grad and the hyperparameter table; their backward pass is one
VJP kernel, whose own derivative is that of the torch reference, so higher derivatives work too. (`torch.func`
transforms do not reach through operators with an autograd formula; `torch.autograd` does.)

Everywhere: params, slots and their adjoints `[n]` in one dtype; grad `[n]` in that dtype or a 16-bit one; hyper
float64 `[G, H]` with the columns of the rule (`mgd_kernels.rules`); k the number of the step, 1, 2, ...; segments
int64 `[R, 3]` on the CPU, rows `(start, stop, group)` (`Segments.table`); elements outside every segment stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mgd_kernels import buffers, dispatch
from mgd_kernels.arena import Segments
from mgd_kernels.backends import reference
from mgd_kernels.errors import BadArgument
from mgd_kernels.rules import ADAM, SGD_MOMENTUM, SGD_NESTEROV, SGD_PLAIN, Rule

__all__ = [
    "adam_step",
    "adam_step_",
    "adam_step_vjp",
    "adam_step_vjp_",
    "sgd_step",
    "sgd_step_",
    "sgd_step_vjp",
    "sgd_step_vjp_",
]


# --- What both families share ------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _segments_of(content: bytes, groups: int) -> Segments:
    return Segments(torch.from_numpy(np.frombuffer(content, dtype=np.int64).reshape(-1, 3).copy()), groups)


def _segments(table: Tensor, groups: int) -> Segments:
    """The same object for the same table, so that what backends cache with it is found again."""
    shape = list(table.shape)
    if table.device.type != "cpu" or table.dtype != torch.int64 or shape[1:] != [3] or shape[0] == 0:
        raise BadArgument(
            f"expected segments int64 [R, 3], R > 0, on the CPU; got {table.dtype} {shape} on {table.device}"
        )
    return _segments_of(table.contiguous().numpy().tobytes(), groups)


def _check(rule: Rule, params: Tensor, others: Sequence[Tensor], grad: Tensor, hyper: Tensor, k: int) -> None:
    for tensor in (params, *others):
        if tensor.shape != grad.shape or tensor.ndim != 1 or tensor.dtype != params.dtype:
            raise BadArgument(
                f"expected params, slots and adjoints of one dtype and the gradient's flat shape "
                f"{list(grad.shape)}; got {tensor.dtype} {list(tensor.shape)}"
            )
    if hyper.dtype != torch.float64 or hyper.ndim != 2 or hyper.shape[1] != len(rule.hyper):
        raise BadArgument(
            f"expected hyper float64 [groups, {len(rule.hyper)}] with the columns {list(rule.hyper)}; "
            f"got {hyper.dtype} {list(hyper.shape)}"
        )
    if k < 1:
        raise BadArgument(f"expected the number of the step, 1, 2, ...; got k={k}")


def _step_(rule: Rule, params: Tensor, slots: Sequence[Tensor], grad, hyper, k: int, segments) -> None:
    _check(rule, params, slots, grad, hyper, k)
    backend = dispatch.choose(rule, params, grad)
    backend.step_(rule, params, slots, grad, hyper, k, _segments(segments, len(hyper)))


def _out_of_place(rule: Rule, params: Tensor, grad: Tensor) -> bool:
    return getattr(dispatch.choose(rule, params, grad), "OUT_OF_PLACE", False)


def _like(tensor: Tensor, segments: Tensor) -> Tensor:
    """A new tensor with the elements of `tensor` outside every segment; the others are the kernel's to write."""
    new = buffers.empty(tensor.numel(), tensor.dtype, tensor.device)
    ends = [0, *segments[:, 1].tolist()]
    for start, stop in zip(ends, [*segments[:, 0].tolist(), tensor.numel()], strict=True):
        if start < stop:
            new[start:stop] = tensor[start:stop]
    return new


def _step(rule: Rule, params: Tensor, slots: Sequence[Tensor], grad, hyper, k: int, segments) -> list[Tensor]:
    if not _out_of_place(rule, params, grad):
        new = [tensor.clone() for tensor in (params, *slots)]
        _step_(rule, new[0], new[1:], grad, hyper, k, segments)
        return new
    _check(rule, params, slots, grad, hyper, k)
    new = [_like(tensor, segments) for tensor in (params, *slots)]
    backend = dispatch.choose(rule, params, grad)
    backend.step_(rule, params, slots, grad, hyper, k, _segments(segments, len(hyper)), out=new)
    return new


def _vjp_(rule: Rule, params, slots, grad, hyper, k: int, segments, adjoints, u: Tensor, **options) -> Tensor:
    _check(rule, params, [*slots, *adjoints], grad, hyper, k)
    backend = dispatch.choose(rule, params, grad)
    out = backend.vjp_(
        rule, params, slots, grad, hyper, k, _segments(segments, len(hyper)), adjoints[0], adjoints[1:], u, **options
    )
    if out is None:
        return torch.zeros_like(hyper, memory_format=torch.contiguous_format)
    return out[:, :-1].to(hyper.device).contiguous()  # the last column belongs to a gradient scale


def _vjp(rule: Rule, params, slots, grad, hyper, k: int, segments, adjoints, hyper_wanted: bool) -> list[Tensor]:
    if not _out_of_place(rule, params, grad):
        new, u = [tensor.clone() for tensor in adjoints], torch.zeros_like(params)
        return [*new, u, _vjp_(rule, params, slots, grad, hyper, k, segments, new, u)]
    new, u = [_like(tensor, segments) for tensor in adjoints], _like(params.new_zeros(()).expand_as(params), segments)
    options = {"out": new, "hyper_wanted": hyper_wanted}
    return [*new, u, _vjp_(rule, params, slots, grad, hyper, k, segments, adjoints, u, **options)]


def _fake_vjp(params: Tensor, hyper: Tensor, adjoints: Sequence[Tensor]) -> list[Tensor]:
    return [
        *map(torch.empty_like, adjoints),
        torch.empty_like(params),
        torch.empty_like(hyper, memory_format=torch.contiguous_format),
    ]


def _differentiable_vjp(
    rule: Rule, k: int, segments: Tensor, state: Sequence[Tensor], grad: Tensor, hyper: Tensor, adjoints
) -> list[Tensor]:
    """What `_vjp` computes, by autograd through the reference step; every element looks up its own row of hyper."""
    wanted = [
        tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
        for tensor in (*state, grad, hyper)
    ]
    *old, g, table = wanted
    place = torch.arange(grad.shape[0])
    row = torch.searchsorted(segments[:, 1].contiguous(), place, right=True).clamp(max=segments.shape[0] - 1)
    inside = (place >= segments[row, 0]) & (place < segments[row, 1])
    h = table[segments[row, 2].to(hyper.device)].to(grad.device).unbind(1)
    stepped = reference.step(rule, old[0], old[1:], g.to(old[0].dtype), h, k)
    new = [
        torch.where(inside.to(grad.device), after.to(before.dtype), before)
        for before, after in zip(old, stepped, strict=True)
    ]
    found = torch.autograd.grad(new, wanted, list(adjoints), create_graph=True, materialize_grads=True)
    *dstate, u, dhyper = found
    return [*dstate, u.to(dstate[0].dtype), dhyper]


def _differentiate(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of `function(*inputs)`, differentiable in their turn where grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that one tensor that stands in two places gets two gradients.
        inputs = [tensor.view_as(tensor) for tensor in inputs]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        pairs = [
            (out, cotangent)
            for out, cotangent in zip(function(*inputs), cotangents, strict=True)
            if cotangent is not None and out.requires_grad
        ]
        if not wanted or not pairs:
            return [None] * len(inputs)
        outputs, seeds = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, seeds, create_graph=create_graph, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


def _zeros_for_none(cotangents: Sequence[Tensor | None], outputs_like: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(like) if cotangent is None else cotangent.contiguous()
        for cotangent, like in zip(cotangents, outputs_like, strict=True)
    ]


# --- Adam, AdamW -------------------------------------------------------------------------------------------------

_ADAM_INPUTS = "Tensor grad, Tensor hyper, SymInt k, Tensor segments"


@torch.library.custom_op(
    "mgd_kernels::adam_step",
    mutates_args=(),
    schema=f"(Tensor params, Tensor exp_avg, Tensor exp_avg_sq, {_ADAM_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def adam_step(params, exp_avg, exp_avg_sq, grad, hyper, k, segments):
    """One Adam step: the new `(params, exp_avg, exp_avg_sq)`."""
    return tuple(_step(ADAM, params, [exp_avg, exp_avg_sq], grad, hyper, k, segments))


@adam_step.register_fake
def _(params, exp_avg, exp_avg_sq, grad, hyper, k, segments):
    return torch.empty_like(params), torch.empty_like(exp_avg), torch.empty_like(exp_avg_sq)


@torch.library.custom_op(
    "mgd_kernels::adam_step_",
    mutates_args=("params", "exp_avg", "exp_avg_sq"),
    schema=f"(Tensor(a!) params, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, {_ADAM_INPUTS}) -> ()",
)
def adam_step_(params, exp_avg, exp_avg_sq, grad, hyper, k, segments):
    """One Adam step, in place."""
    _step_(ADAM, params, [exp_avg, exp_avg_sq], grad, hyper, k, segments)


@adam_step_.register_fake
def _(params, exp_avg, exp_avg_sq, grad, hyper, k, segments):
    return None


@torch.library.custom_op(
    "mgd_kernels::adam_step_vjp",
    mutates_args=(),
    schema=(
        f"(Tensor params, Tensor exp_avg, Tensor exp_avg_sq, {_ADAM_INPUTS}, Tensor adjoint_params, "
        "Tensor adjoint_exp_avg, Tensor adjoint_exp_avg_sq, *, bool hyper_wanted=True) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def adam_step_vjp(
    params,
    exp_avg,
    exp_avg_sq,
    grad,
    hyper,
    k,
    segments,
    adjoint_params,
    adjoint_exp_avg,
    adjoint_exp_avg_sq,
    *,
    hyper_wanted=True,
):
    """The VJP of `adam_step`: the adjoints of `(params, exp_avg, exp_avg_sq)` before the step from those after it,
    the cotangent of grad (in the parameters' dtype), and that of hyper `[G, H]`, which means nothing without
    `hyper_wanted`."""
    adjoints = [adjoint_params, adjoint_exp_avg, adjoint_exp_avg_sq]
    return tuple(_vjp(ADAM, params, [exp_avg, exp_avg_sq], grad, hyper, k, segments, adjoints, hyper_wanted))


@adam_step_vjp.register_fake
def _(params, exp_avg, exp_avg_sq, grad, hyper, k, segments, ap, am, av, *, hyper_wanted=True):
    return tuple(_fake_vjp(params, hyper, (ap, am, av)))


@torch.library.custom_op(
    "mgd_kernels::adam_step_vjp_",
    mutates_args=("adjoint_params", "adjoint_exp_avg", "adjoint_exp_avg_sq", "u"),
    schema=(
        f"(Tensor params, Tensor exp_avg, Tensor exp_avg_sq, {_ADAM_INPUTS}, Tensor(a!) adjoint_params, "
        "Tensor(b!) adjoint_exp_avg, Tensor(c!) adjoint_exp_avg_sq, Tensor(d!) u) -> Tensor"
    ),
)
def adam_step_vjp_(
    params,
    exp_avg,
    exp_avg_sq,
    grad,
    hyper,
    k,
    segments,
    adjoint_params,
    adjoint_exp_avg,
    adjoint_exp_avg_sq,
    u,
):
    """As `adam_step_vjp`, in place: the adjoints are overwritten, `u` receives the cotangent of grad; returns that
    of hyper `[G, H]`."""
    adjoints = [adjoint_params, adjoint_exp_avg, adjoint_exp_avg_sq]
    return _vjp_(ADAM, params, [exp_avg, exp_avg_sq], grad, hyper, k, segments, adjoints, u)


@adam_step_vjp_.register_fake
def _(params, exp_avg, exp_avg_sq, grad, hyper, k, segments, *adjoints_and_u):
    return torch.empty_like(hyper, memory_format=torch.contiguous_format)


def _adam_setup(ctx, inputs, output):
    *tensors, k, segments = inputs
    ctx.save_for_backward(*tensors, segments)
    ctx.k = k


def _adam_backward(ctx, *cotangents):
    params, exp_avg, exp_avg_sq, grad, hyper, segments = ctx.saved_tensors
    adjoints = _zeros_for_none(cotangents, (params, exp_avg, exp_avg_sq))
    dparams, dm, dv, u, dhyper = adam_step_vjp(
        params, exp_avg, exp_avg_sq, grad, hyper, ctx.k, segments, *adjoints, hyper_wanted=ctx.needs_input_grad[4]
    )
    return dparams, dm, dv, u.to(grad.dtype), dhyper, None, None


adam_step.register_autograd(_adam_backward, setup_context=_adam_setup)


def _adam_vjp_setup(ctx, inputs, keyword_only_inputs, output):
    *tensors, k, segments, ap, am, av = inputs
    ctx.save_for_backward(*tensors, ap, am, av, segments)
    ctx.k = k


def _adam_vjp_backward(ctx, *cotangents):
    *inputs, segments = ctx.saved_tensors

    def function(params, exp_avg, exp_avg_sq, grad, hyper, *adjoints):
        state = (params, exp_avg, exp_avg_sq)
        return _differentiable_vjp(ADAM, ctx.k, segments, state, grad, hyper, adjoints)

    found = _differentiate(function, inputs, cotangents)
    return *found[:5], None, None, *found[5:]


adam_step_vjp.register_autograd(_adam_vjp_backward, setup_context=_adam_vjp_setup)


# --- SGD: `slots` is `[momentum_buffer]`, or empty for plain SGD -------------------------------------------------

_SGD_INPUTS = "Tensor grad, Tensor hyper, SymInt k, Tensor segments, bool nesterov"


def _sgd(slots: Sequence[Tensor], nesterov: bool) -> Rule:
    if len(slots) > 1 or (nesterov and not slots):
        raise BadArgument(
            f"expected slots [momentum_buffer], or [] for SGD without momentum (and Nesterov); got {len(slots)} "
            f"slots with nesterov={nesterov}"
        )
    return (SGD_NESTEROV if nesterov else SGD_MOMENTUM) if slots else SGD_PLAIN


@torch.library.custom_op(
    "mgd_kernels::sgd_step",
    mutates_args=(),
    schema=f"(Tensor params, Tensor[] slots, {_SGD_INPUTS}) -> Tensor[]",
)
def sgd_step(params, slots, grad, hyper, k, segments, nesterov):
    """One SGD step: the new `[params, *slots]`."""
    return _step(_sgd(slots, nesterov), params, slots, grad, hyper, k, segments)


@sgd_step.register_fake
def _(params, slots, grad, hyper, k, segments, nesterov):
    return [torch.empty_like(tensor) for tensor in (params, *slots)]


@torch.library.custom_op(
    "mgd_kernels::sgd_step_",
    mutates_args=("params", "slots"),
    schema=f"(Tensor(a!) params, Tensor(b!)[] slots, {_SGD_INPUTS}) -> ()",
)
def sgd_step_(params, slots, grad, hyper, k, segments, nesterov):
    """One SGD step, in place."""
    _step_(_sgd(slots, nesterov), params, slots, grad, hyper, k, segments)


@sgd_step_.register_fake
def _(params, slots, grad, hyper, k, segments, nesterov):
    return None


@torch.library.custom_op(
    "mgd_kernels::sgd_step_vjp",
    mutates_args=(),
    schema=f"(Tensor params, Tensor[] slots, {_SGD_INPUTS}, Tensor[] adjoints, *, bool hyper_wanted=True) -> Tensor[]",
)
def sgd_step_vjp(params, slots, grad, hyper, k, segments, nesterov, adjoints, *, hyper_wanted=True):
    """The VJP of `sgd_step`: the adjoints of `[params, *slots]` before the step from those after it, then the
    cotangents of grad (in the parameters' dtype) and of hyper `[G, H]`, as in `adam_step_vjp`."""
    return _vjp(_sgd(slots, nesterov), params, slots, grad, hyper, k, segments, adjoints, hyper_wanted)


@sgd_step_vjp.register_fake
def _(params, slots, grad, hyper, k, segments, nesterov, adjoints, *, hyper_wanted=True):
    return _fake_vjp(params, hyper, adjoints)


@torch.library.custom_op(
    "mgd_kernels::sgd_step_vjp_",
    mutates_args=("adjoints", "u"),
    schema=(f"(Tensor params, Tensor[] slots, {_SGD_INPUTS}, Tensor(a!)[] adjoints, Tensor(b!) u) -> Tensor"),
)
def sgd_step_vjp_(params, slots, grad, hyper, k, segments, nesterov, adjoints, u):
    """As `sgd_step_vjp`, in place: the adjoints are overwritten, `u` receives the cotangent of grad; returns that of
    hyper `[G, H]`."""
    return _vjp_(_sgd(slots, nesterov), params, slots, grad, hyper, k, segments, adjoints, u)


@sgd_step_vjp_.register_fake
def _(params, slots, grad, hyper, k, segments, nesterov, adjoints, u):
    return torch.empty_like(hyper, memory_format=torch.contiguous_format)


def _sgd_setup(ctx, inputs, output):
    params, slots, grad, hyper, ctx.k, segments, ctx.nesterov = inputs
    ctx.save_for_backward(params, grad, hyper, segments, *slots)


def _sgd_backward(ctx, cotangents):
    params, grad, hyper, segments, *slots = ctx.saved_tensors
    cotangents = _zeros_for_none(cotangents, (params, *slots))
    dparams, *dslots, u, dhyper = sgd_step_vjp(
        params, slots, grad, hyper, ctx.k, segments, ctx.nesterov, cotangents, hyper_wanted=ctx.needs_input_grad[3]
    )
    return dparams, dslots, u.to(grad.dtype), dhyper, None, None, None


sgd_step.register_autograd(_sgd_backward, setup_context=_sgd_setup)


def _sgd_vjp_setup(ctx, inputs, keyword_only_inputs, output):
    params, slots, grad, hyper, ctx.k, segments, ctx.nesterov, adjoints = inputs
    ctx.save_for_backward(params, grad, hyper, segments, *slots, *adjoints)
    ctx.slots = len(slots)


def _sgd_vjp_backward(ctx, cotangents):
    params, grad, hyper, segments, *rest = ctx.saved_tensors

    def function(params, grad, hyper, *rest):
        slots, adjoints = rest[: ctx.slots], rest[ctx.slots :]
        rule = _sgd(slots, ctx.nesterov)
        return _differentiable_vjp(rule, ctx.k, segments, (params, *slots), grad, hyper, adjoints)

    dparams, dgrad, dhyper, *drest = _differentiate(function, [params, grad, hyper, *rest], cotangents)
    return dparams, drest[: ctx.slots], dgrad, dhyper, None, None, None, drest[ctx.slots :]


sgd_step_vjp.register_autograd(_sgd_vjp_backward, setup_context=_sgd_vjp_setup)
