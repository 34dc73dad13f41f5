"""A training as a node of torch's autograd graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mgd.errors import NotDifferentiable
from mgd.step.reads import patiently


def first_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A node's `backward` whose result has no derivative, and which raises NotDifferentiable where one is asked for."""

    @functools.wraps(backward)
    def checked(ctx: Any, *cotangents: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotDifferentiable(
                "a training",
                "its gradient is not a function that autograd can differentiate again: leave out create_graph=True. "
                "For products with its second derivatives, take differences of metagradients.",
            )
        return torch.autograd.function.once_differentiable(backward)(ctx, *cotangents)

    return checked


class DifferentiableTraining(torch.autograd.Function):
    """Forward: the training, keeping log and snapshots. Backward: one reverse sweep with the cotangent of the value."""

    @staticmethod
    def forward(ctx, function: Any, spec, *leaves: Any) -> Tensor:
        ctx.function, ctx.spec = function, spec
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in leaves]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in leaves))
        with function._guarded() as tick:
            ctx.sweep = patiently(lambda: function._trained(tree_unflatten(leaves, spec), tick))
        return ctx.sweep.value

    @staticmethod
    @first_derivatives
    def backward(ctx, cotangent: Tensor):
        # Unpacking the saved tensors raises where z has changed since.
        leaves = [x if tensor is None else tensor for tensor, x in zip(ctx.saved_tensors, ctx.numbers, strict=True)]
        z = tree_unflatten(leaves, ctx.spec)
        with ctx.function._guarded() as tick:

            def run():
                # The log is consumed by a reverse sweep; a second backward trains again.
                sweep, ctx.sweep = ctx.sweep or ctx.function._trained(z, tick), None
                return ctx.function._reversed(sweep, z, cotangent.reshape(-1).tolist())

            grads = patiently(run)[1]
        gradients = tree_flatten({key: grads[key] for key in z})[0]
        return None, None, *(g[0] if isinstance(x, Tensor) else None for x, g in zip(leaves, gradients, strict=True))
