"""First and second derivatives of one evaluation of the loss.

The sweep needs, for a cotangent `u` of the gradient and a cotangent `a` of the buffers that the step leaves behind,
the gradient of `<dL/dθ, u> + <buffers', a>` with respect to parameters, buffers and metaparameters. Two roads:

forward: forward over reverse. `<dL/dθ, u>` is the derivative of L in direction u, so the tangents of one ordinary
    backward pass, with `u` as the tangent of θ, are what is wanted (Pearlmutter 1994). The buffers ride along: with
    ε a dual number of value 0 and tangent 1, the tangent of the gradient of `L + ε <buffers', a>` holds both terms.
reverse: reverse over reverse, through the graph of the gradient. Every operator that has a double backward works, and
    several cotangents share one graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from mgd.errors import NotDifferentiable

# evaluate(parameters, buffers, metaparameters) -> (loss, buffers that the step leaves behind)
Evaluate = Callable[[list[Tensor], list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]
Tensors = Sequence[Tensor]
Gradients = list[list[Tensor | None]]  # one list for each objective, over [*parameters, *buffers, *metaparameters]


def leaves(tensors: Tensors) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def forward_over_reverse(
    evaluate: Evaluate,
    parameters: Tensors,
    buffers: Tensors,
    metaparameters: Tensors,
    directions: Sequence[Tensors],
    buffer_cotangents: Sequence[Tensors],
) -> tuple[Tensor, Gradients]:
    """The loss, and for each direction the tangents of the gradient; one dual evaluation each."""
    results: Gradients = []
    for direction, cotangents in zip(directions, buffer_cotangents, strict=True):
        with fwAD.dual_level():
            duals = [fwAD.make_dual(p, t) for p, t in zip(leaves(parameters), direction, strict=True)]
            b, z = leaves(buffers), leaves(metaparameters)
            loss, left = evaluate(duals, [x.clone() for x in b], z)
            total = loss
            if left:
                one = loss.new_ones(())
                total = loss + fwAD.make_dual(torch.zeros_like(one), one) * _inner(left, cotangents)
            grads = torch.autograd.grad(total, [*duals, *b, *z], allow_unused=True)
            results.append([None if g is None else fwAD.unpack_dual(g).tangent for g in grads])
            loss = fwAD.unpack_dual(loss).primal.detach()
    return loss, results


def reverse_over_reverse(
    evaluate: Evaluate,
    parameters: Tensors,
    buffers: Tensors,
    metaparameters: Tensors,
    directions: Sequence[Tensors],
    buffer_cotangents: Sequence[Tensors],
) -> tuple[Tensor, Gradients]:
    """The loss, and for each direction the gradient through the gradient's graph, which is built once."""
    p, b, z = leaves(parameters), leaves(buffers), leaves(metaparameters)
    inputs = [*p, *b, *z]
    loss, left = evaluate(p, [x.clone() for x in b], z)
    grads = torch.autograd.grad(loss, p, create_graph=True, allow_unused=True)
    outputs = [*grads, *left]
    live = [i for i, output in enumerate(outputs) if output is not None and output.requires_grad]
    if not live:
        return loss.detach(), [[None] * len(inputs) for _ in directions]
    outputs = [outputs[i] for i in live]
    cotangents = [
        [[*direction, *cotangent][i] for i in live]
        for direction, cotangent in zip(directions, buffer_cotangents, strict=True)
    ]
    if len(cotangents) == 1:
        return loss.detach(), [list(torch.autograd.grad(outputs, inputs, cotangents[0], allow_unused=True))]
    stacked = [torch.stack(parts) for parts in zip(*cotangents, strict=True)]
    batched = torch.autograd.grad(outputs, inputs, stacked, allow_unused=True, is_grads_batched=True)
    return loss.detach(), [[None if g is None else g[i] for g in batched] for i in range(len(cotangents))]


def _inner(x: Tensors, y: Tensors) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(x, y, strict=True)]).sum()


class SecondDerivative:
    """Chooses the road: forward where every operator has a forward-mode formula, else reverse.

    mode: "forward", "reverse" or "auto" (forward for one direction, reverse for several, which share its graph).
    fallback: the operator that made "auto" turn to reverse, once it has. used: the road taken last.
    """

    def __init__(self, mode: str):
        self.mode = mode
        self.fallback: str | None = None
        self.used = ""

    def __call__(self, *args) -> tuple[Tensor, Gradients]:
        directions = args[4]
        if self.mode == "forward" or (self.mode == "auto" and not self.fallback and len(directions) == 1):
            try:
                self.used = "forward over reverse"
                return forward_over_reverse(*args)
            except NotImplementedError as error:
                op = _operator(error, r"forward AD with (\S+)")
                if self.mode == "forward":
                    raise NotDifferentiable(op, "it has no forward-mode formula; hvp='auto' allows reverse mode.")
                self.fallback = op
        try:
            self.used = "reverse over reverse"
            return reverse_over_reverse(*args)
        except (NotImplementedError, RuntimeError) as error:
            if "derivative" not in str(error):
                raise
            raise NotDifferentiable(_operator(error, r"derivative for '?(\S+?)'? is not"), str(error)) from error


def _operator(error: Exception, pattern: str) -> str:
    found = re.search(pattern, str(error))
    return found.group(1) if found else "an operator that torch does not name"
