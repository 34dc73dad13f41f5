"""Where a training first left the finite numbers.

A sweep looks at the losses alone, and at the parameters at the end: to look at every gradient would cost a pass over
memory at each step. So the first NaN is found late. Then the training is run once more, watched.
"""

from __future__ import annotations

from torch import Tensor

from mgd.errors import NonFiniteState
from mgd.step.step import StepResult
from mgd.sweep.sweep import Sweep
from mgd.util.finite import all_finite
from mgd_kernels import OptimizerState


class WatchedSweep(Sweep):
    """A training that raises NonFiniteState at the first gradient, parameter or optimizer state that is not finite."""

    def _update(self, state: OptimizerState, result: StepResult) -> None:
        t = state.step
        self._look(t, "the gradient of parameter {}", result.gradient)
        super()._update(state, result)
        self._look(t, "parameter {} after an update with a finite gradient", state.params)
        for slot, flat in zip(self.optimizer.slots, state.slots, strict=True):
            self._look(t, f"{slot} of parameter {{}} after an update with a finite gradient", flat)

    def _look(self, t: int, where: str, flat: Tensor) -> None:
        for name, tensor in self.arena.views(flat).items():
            if not all_finite(tensor):
                raise NonFiniteState(t, where.format(repr(name)))
