"""From the graph of a loss to the joint graph of its step, compared with what it was traced from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from mgd.autodiff.captured_step import NUMBER, CapturedStep
from mgd.autodiff.device_graphs import DeviceGraphs
from mgd.autodiff.execution import present, same_bits, same_loss
from mgd.autodiff.front import CapturedGraph, NotCaptured
from mgd.autodiff.graphs import changes_inputs, traced
from mgd.autodiff.joint import JointGraph
from mgd.autodiff.linear_losses import without_logits
from mgd.autodiff.second_order import Point, first_and_second
from mgd.autodiff.tangents import confirm, first_and_tangents
from mgd.step.agreement import agree
from mgd.step.evaluator import Direction
from mgd.step.overrides import FunctionOverrides
from mgd.util.system import return_freed_memory

Along = tuple[bool, ...]
ROUNDS = "it rounds differently in a graph, which trace=True allows"


class _LooksInside(Exception):
    """The loss asks for gradients inside of what was replaced."""


def derive(
    graph: CapturedGraph,
    places: tuple[Any, ...],
    step: CapturedStep,
    others: list[Tensor],
    along: Along | None,
    may_round: bool,
    compile: bool,
    on_device: DeviceGraphs,
) -> tuple[JointGraph, int]:
    """The joint graph at this step, and the number of outputs beside loss and buffers. Its parts are recorded
    `on_device`, if that is one that is served.

    along: of forward mode, whether each metaparameter moves. may_round: whether it may have other bits than the
    captured graph run by autograd, and be rewritten for that. Raises NotCaptured where it has, and where it has other
    derivatives.

    A graph of forward mode has, in place of the second derivatives, the derivatives of the gradient and of the buffers
    along its directions, and gradient and buffers in place of the derivatives with respect to metaparameters, since
    nothing is kept for later.
    """
    point = Point(step.parameters, step.floats, step.metaparameters, [*step.others, *others], [], [])
    moving = [x for x, moves in zip(step.metaparameters, along or (), strict=False) if moves]
    directions = [[p.clone() for p in step.parameters], *map(_ones, (step.floats, moving))]
    kinds = [*point.fixed(), *directions]
    bounds = list(pairwise(accumulate(map(len, kinds), initial=0)))
    inputs = [x for kind in kinds for x in kind]
    fixed = bounds[3][1]
    left, extras, share = 0, 0, step.microbatch.share
    rewritten = may_round and step.microbatch.loss.autocast is None
    captured = without_logits(graph.module) if rewritten else graph.module
    loss_of = step.microbatch.loss
    plain, overrides = loss_of.plain_at(step.microbatch.step), FunctionOverrides()

    def evaluate(p, b, z, constants):
        nonlocal overrides, extras
        owned = [x.clone() for x in constants[: len(step.others)]]
        known = [*p, *b, *owned, *z]
        rest = iter(constants[len(step.others) :])
        arguments = [
            known[place] if place >= 0 else next(rest).item() if place == NUMBER else next(rest) for place in places
        ]
        overrides = FunctionOverrides(plain)
        with loss_of.casting(), overrides:
            overrides.in_loss = True
            loss, *extra = captured(*arguments)
            overrides.in_loss = False
        if overrides.differentiates and not plain:
            raise _LooksInside
        extras = len(extra)
        return loss if share == 1.0 else loss * share, [*b, *owned, *extra]

    def function(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        nonlocal left
        p, b, z, constants, direction, cotangent, rest = (list(tensors[start:stop]) for start, stop in bounds)
        if along is not None:
            shift = iter(rest)
            moved = Direction(direction, cotangent, [next(shift) if moves else None for moves in along])
            found = first_and_tangents(evaluate, Point(p, b, z, constants, [], []), [moved], lambda *_: True)
            left = len(found.buffers)
            return found.loss, *found.gradient, *found.buffers, *found.gradients[0], *found.floats[0], found.losses[0]
        second = first_and_second(evaluate, Point(p, b, z, constants, [direction], [cotangent]))
        left = len(second.buffers)
        return (
            second.loss,
            *second.gradient,
            *second.influence,
            *second.buffers,
            *second.results[0],
            second.products[0],
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step.microbatch.reseed()
        try:
            expected = function(*inputs)
        except _LooksInside:
            plain = True
            step.microbatch.reseed()
            expected = function(*inputs)
        if along is not None:
            step.microbatch.reseed()
            confirm(evaluate, point)
        return_freed_memory()  # of the autograd graph of all second derivatives
        loss_of.refuse_writes(step.microbatch.step, overrides, step.parameters, step.metaparameters)
        step.microbatch.reseed()
        module = traced(function, inputs)
        if changes_inputs(module.graph):
            raise NotCaptured("the loss changes a tensor in place that is no buffer of the model")
        counts = len(point.parameters), len(point.metaparameters), left
        served = on_device.serve(step.parameters[0].device)
        parts = counts if along is None else (0, counts[0] + left, 0)
        joint = JointGraph(module, fixed, parts, compile, on_device if served else None)
        step.microbatch.reseed()
        parameters, given = inputs[: len(kinds[0])], inputs[len(kinds[0]) : fixed]
        if along is None:
            loss, grads, influence, after, residuals = joint.forward(parameters, given)
            assert residuals is not None
            (results,) = joint.hvp_from_residuals(parameters, given, residuals, [inputs[fixed:]])
            found = [*grads, *influence, *after, *results]
        else:
            loss, fixed_part, (results,) = joint.recompute_hvp(parameters, given, [inputs[fixed:]])
            found = [*fixed_part, *results]
    if not (agree(found, expected[1:]) and same_loss(loss, present(expected[0]), compile)):
        raise NotCaptured("its graph has other derivatives than the evaluation that it traced")
    if not may_round and not same_bits(found, expected[1:]):
        raise NotCaptured(ROUNDS)
    return joint, extras


def _ones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.ones_like(x) for x in tensors]
