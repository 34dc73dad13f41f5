"""How the adjoint grows on its way back: whether a metagradient is the slope of something that can be followed.

Going back over a step, the adjoint of the parameters is multiplied by `1 - r H`, with the step's learning rate r (as
the optimizer has it there, element by element) and the curvature H of its loss. With 0 <= r H <= 2 no direction grows.
Growth by a factor g in one step proves a rate times a curvature of at least g + 1, or at most 1 - g: the step
overshoots, or runs away from a maximum. A training of many such steps is chaotic, and its derivative, though right,
says nothing of a change that can be made (arXiv 2503.13751, section 4, measures the same thing by trainings alone).
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from mgd.errors import UnstableTraining
from mgd.ranks.shards import Shards
from mgd.sweep.adjoint import Adjoint

# Measured on 23 trainings of small networks by three optimizers: all that grew a hundredfold, at some step by half or
# more, had a metasmoothness below 0.65, most of them below 0.3; all above 0.8 grew less than 20-fold.
GROWTH = 100.0  # in all, from where the norm is least to an earlier step
STEEP = 1.5  # in one step: a rate times a curvature above 2.5, or below -0.5
NAMES = 3
TINY, HUGE = 1e-15, 1e15  # float32 norms between these have neither lost nor exceeded their squares


class AdjointGrowth:
    """The norms of the adjoints of k objectives after every step, as the reverse sweep comes to it.

    squares: float64 `[k, T, own pieces]`, NaN where the sweep has not been. Sums over processes are taken once, at the
    end, so that a step costs one pass over the adjoint and no exchange.
    """

    def __init__(self, objectives: int, steps: int, shards: Shards):
        self._shards = shards
        device = shards.arena.device
        self.squares = torch.full((objectives, steps, len(shards.pieces)), math.nan, dtype=torch.float64, device=device)
        # The same memory through numpy, on the CPU: to write a number through torch takes 5 µs.
        self._squares = self.squares.numpy() if device.type == "cpu" else None
        self._alone, self._whole = shards.ranks.size == 1, len(shards.pieces) == 1
        self._later = [math.inf] * objectives  # the squares at the step before in the sweep
        self._largest: dict[tuple[int, int], list[str]] = {}  # the parameters with most of the norm, at steep steps

    def note(self, t: int, adjoints: list[Adjoint]) -> None:
        """The adjoints after step `t`, before the sweep goes back over it."""
        for j, adjoint in enumerate(adjoints):
            flat = adjoint.state.params
            if self._squares is None:  # nobody waits for a device, so steep steps are not looked into
                parts = [flat[start:stop] for start, stop, _ in self._shards.pieces]
                self.squares[j, t] = torch.stack([x.double().square().sum() for x in parts])
                continue
            if self._whole:
                found = self._squares[j, t, 0] = _square(flat)
            else:
                squares = [_square(flat[start:stop]) for start, stop, _ in self._shards.pieces]
                self._squares[j, t], found = squares, sum(squares)
            if found > STEEP**2 * self._later[j] and self._alone:
                self._largest[j, t] = self._names(flat)
            self._later[j] = found or math.inf

    def whole(self) -> Tensor:
        """The squares of all pieces, float64 `[pieces, k, T]`. Called by every process."""
        return self._shards.ranks.numbers(self.squares.movedim(2, 0).cpu().contiguous())

    def load(self, whole: Tensor) -> None:
        """Continue with what `whole` returned, perhaps on other processes."""
        own = self._shards.own
        self.squares.copy_(whole[own.start : own.stop].movedim(0, 2) if len(whole) > 1 else whole.movedim(0, 2))

    def norms(self) -> Tensor:
        """Of the parameters' adjoints after every step, float64 `[k, T]`; NaN where the sweep has not been. Called by
        every process."""
        return self._shards.totals(self.squares.movedim(2, 0).cpu()).sqrt()

    def warn(self, norms: Tensor) -> None:
        """Warn of the objective whose adjoint grows most, if it grows as that of an unstable training does."""
        found = [(growth(row.tolist()), j) for j, row in enumerate(norms)]
        (factor, steepest, start, stop), j = max(found)
        if factor < GROWTH or steepest < STEEP:
            return
        names = self._largest.get((j, start), [])
        where = f", where most of it belongs to {', '.join(map(repr, names))}" if names else ""
        warnings.warn(
            f"the adjoint grows {factor:.3g}-fold from step {start} back to step {stop}, up to {steepest:.2g}-fold in "
            f"one step{where}. There the learning rate times the curvature leaves the range from 0 to 2 in which a "
            "training is stable, so that the metagradient is the slope of a rough function, and following it may not "
            "help. Lower the rate or warm it up, or differentiate fewer steps (since=); mgd.diagnose tells what helps",
            UnstableTraining,
            stacklevel=2,
        )

    def _names(self, flat: Tensor) -> list[str]:
        arena = self._shards.arena
        norms = torch.stack([x.detach().double().norm() for x in arena.slices(flat)])
        return [arena.names[i] for i in norms.topk(min(NAMES, len(norms))).indices.tolist()]


def _square(x: Tensor) -> float:
    """The squared norm of a flat buffer, in double where its own dtype might not hold it."""
    norm = float(torch.linalg.vector_norm(x))
    if not TINY < norm < HUGE:
        norm = float(torch.linalg.vector_norm(x, dtype=torch.float64))
    return norm * norm


def growth(norms: list[float]) -> tuple[float, float, int, int]:
    """The largest factor by which norms `[T]` grow from a step back to an earlier one; within that stretch the largest
    in one step, the latest step before which it grows steeply (else the latest of all), and the earliest."""
    best, low, stop = 1.0, math.inf, -1
    first = last = len(norms) - 1
    for t in range(len(norms) - 1, -1, -1):
        if not norms[t] >= low:  # also NaN, where the sweep has not been
            low, stop = (norms[t], t) if norms[t] > 0 else (low, stop)
        elif norms[t] / low > best:
            best, first, last = norms[t] / low, t, stop
    steps = {t: norms[t] / norms[t + 1] for t in range(first, last)}
    steep = [t for t, ratio in steps.items() if ratio >= STEEP]
    return best, max(steps.values(), default=1.0), max(steep, default=last), first
