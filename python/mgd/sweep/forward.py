"""A training that carries tangents of its state along: one sweep forward, without a log or a way back.

Along a direction of z, the state moves by the optimizer's JVP, given how the gradient moves: by the Hessian times the
tangent of the parameters, and the mixed derivatives times those of buffers and metaparameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mgd.errors import BadMetaparameter, NonFiniteState
from mgd.step.model import differentiable
from mgd.step.step import StateDirection
from mgd.sweep.adjoint import Adjoint, TrainedObjective
from mgd.sweep.sweep import Sweep
from mgd.util.finite import all_finite


class ForwardSweep(Sweep):
    """A training with tangents along directions of z. tangents: of its state and floating-point buffers."""

    def __init__(self, *arguments: Any, directions: Sequence[Mapping[str, Any]], **options: Any):
        super().__init__(*arguments, **options)
        if not directions:
            raise BadMetaparameter("expected at least one direction; got none")
        self._directions = [self.meta.tangent(direction) for direction in directions]
        self.tangents = [Adjoint.zeros(self.state, self.buffers) for _ in directions]
        for tangent, direction in zip(self.tangents, self._directions, strict=True):
            tangent.state.params.copy_(self.shards.part(direction.init))
        self._expect(self.length - self.meta.origin)  # each has second derivatives

    def derivatives_of(self, objective: TrainedObjective) -> tuple[Tensor, list[Any]]:
        """The value of the objective at the end of the training, and its derivatives along the directions."""
        value, found = objective.tangents(self.shards, self.tangents)
        for i, each in enumerate(found):
            if not all_finite(each):
                raise NonFiniteState(self.length, f"the derivative of the objective along direction {i}")
        return value, found

    def model_tangents(self) -> list[dict[str, Tensor]]:
        """Of the trained parameters, by name, for each direction."""
        return [{n: x.clone() for n, x in self._views(each.state.params).items()} for each in self.tangents]

    def _train(self, t: int, tier: str | None) -> None:
        if t < self.meta.origin:  # nothing moves yet
            return super()._train(t, tier)
        if t == self.meta.origin:  # buffers may have grown
            for tangent in self.tangents:
                tangent.buffers = [torch.zeros_like(self.buffers[name]) for name in differentiable(self.buffers)]
        given = [
            StateDirection(tangent.state.params, tangent.buffers, direction.leaves)
            for tangent, direction in zip(self.tangents, self._directions, strict=True)
        ]
        with self.timings.timed("training"):
            result, gradients = self.step.tangents(t, self.state.params, self.buffers, self.meta, given)
        self.updates.skip(t, result.skipped)
        self.timings.counts["model steps"] += 1
        self._note_losses(t, result)
        scale = self.clipping.factor(t, result.gradient)
        with self.timings.timed("optimizer jvp"):
            gradients = self.clipping.tangents(t, result.gradient, gradients)
            table, tangents = self.meta.tables[t], [tangent.state for tangent in self.tangents]
            hypers = torch.stack([direction.hypers[t] for direction in self._directions])
            self.updates.jvp_(self.state, result.gradient, table, tangents, gradients, hypers, scale)
            for j, (tangent, moved) in enumerate(zip(self.tangents, given, strict=True)):
                tangent.buffers = moved.buffers
                self.reads.later(tangent.state.params.sum(), functools.partial(self._check_tangent, t, j))
        self.buffers = result.buffers[-1]

    def _check_tangent(self, step: int, direction: int, total: list[float]) -> None:
        if not self.shards.ranks.every(math.isfinite(total[0])):
            raise NonFiniteState(step, f"the tangent of the parameters along direction {direction}")
