"""Where a training first left the finite numbers.

A sweep looks at the losses alone, at the parameters at the end, and on the way back at the cotangents of
hyperparameters: to look at every gradient and adjoint would cost a pass over memory at each step. So the first NaN is
found late. Then the training is run once more, watched. On an accelerator, most numbers are looked at some steps after
theirs; here each is looked at as it comes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mgd.errors import NonFiniteState
from mgd.step.metaparameters import Gradients
from mgd.step.step import StepFunction, StepResult
from mgd.sweep.adjoint import Adjoint
from mgd.sweep.sweep import Sweep
from mgd.util.finite import all_finite
from mgd_kernels import OptimizerState


class WatchedSweep(Sweep):
    """A training that raises NonFiniteState at the first gradient, parameter, optimizer state or adjoint that is not
    finite."""

    def __init__(self, step: StepFunction, *arguments: Any, **options: Any):
        step.loss.reads.every = 1
        super().__init__(step, *arguments, **options)

    def _update(self, state: OptimizerState, result: StepResult) -> None:
        t = state.step
        self._look(t, "the gradient of parameter {}", result.gradient)
        super()._update(state, result)
        self._look(t, "parameter {} after an update with a finite gradient", state.params)
        for slot, flat in zip(self.optimizer.slots, state.slots, strict=True):
            self._look(t, f"{slot} of parameter {{}} after an update with a finite gradient", flat)

    def begin_reverse(self, value: Tensor, adjoints: list[Adjoint]) -> None:
        super().begin_reverse(value, adjoints)
        for adjoint in adjoints:
            self._look(self.length, "the gradient of the objective with respect to {}", adjoint.state.params)

    def _reverse_step(self, t: int, directions: list[Tensor], gradients: Gradients) -> None:
        super()._reverse_step(t, directions, gradients)
        for adjoint in self.adjoints:
            self._look(t, "the adjoint of parameter {}", adjoint.state.params)

    def _look(self, t: int, where: str, flat: Tensor) -> None:
        for name, tensor in self.arena.views(self.shards.whole(flat)).items():
            if not all_finite(tensor):
                raise NonFiniteState(t, where.format(repr(name)))
