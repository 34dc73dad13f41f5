"""The optimizer's passes over the state of a training, with the parameters that a step leaves alone.

A parameter without a gradient at a step is skipped there, as `torch.optim` skips what has `grad` None: no decay, no
momentum, and its count of steps (Adam's bias correction) stands still. Its adjoint passes through. So a flat buffer
falls into stretches of parameters that are as many steps behind, and each is a state of its own to the kernels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from mgd.ranks.shards import Shards
from mgd_kernels import Arena, Optimizer, OptimizerState

Scale = float | Tensor
# start and stop in this process's flat buffers, and by how many steps these parameters are behind
Stretches = list[tuple[int, int, int]]

MOST_KNOWN = 64


class Updates:
    """behind: for parameters that earlier trainings skipped, how often, by name."""

    def __init__(self, optimizer: Optimizer, shards: Shards, behind: Mapping[str, int]):
        self.optimizer, self.shards = optimizer, shards
        arena = shards.arena
        self._before = [behind.get(name, 0) for name in arena.names]
        self._always = any(self._before)
        self._skipped: dict[int, tuple[int, ...]] = {}  # at each step, parameters by number
        self._steps: dict[int, list[int]] = {}  # the same by parameter, in order
        self._known: dict[tuple[int | None, ...], Stretches | None] = {}  # by the lags of those that some step skips
        self._bounds = [*arena.offsets, arena.numel]
        self._range = shards.ranges[shards.ranks.rank]
        self._arenas: dict[tuple[int, int], Arena | None] = {}

    def skip(self, t: int, parameters: Iterable[int]) -> None:
        """Step `t` leaves these parameters alone."""
        skipped = tuple(sorted(parameters))
        if skipped and t not in self._skipped:
            self._skipped[t] = skipped
            for i in skipped:
                if i not in self._steps:
                    self._steps[i] = []
                    self._known.clear()
                steps = self._steps[i]
                steps.insert(bisect_left(steps, t), t)

    def record(self) -> list[tuple[int, tuple[int, ...]]]:
        """What `restore` takes: of each step that skips some, these."""
        return list(self._skipped.items())

    def restore(self, record: Iterable[tuple[int, Sequence[int]]]) -> None:
        for t, skipped in record:
            self.skip(t, skipped)

    def behind(self, t: int) -> dict[str, int]:
        """How often each parameter was skipped before step `t`, where it was, by name."""
        return {name: n for name, n in zip(self.shards.arena.names, self._lags(t), strict=True) if n}

    def _lags(self, t: int) -> list[int]:
        return [n + bisect_left(self._steps.get(i, ()), t) for i, n in enumerate(self._before)]

    def _stretches(self, t: int) -> Stretches | None:
        """Those that step `t` advances; None where it is the whole buffer, without any that is behind."""
        if not self._always and not self._skipped:
            return None
        skipped = set(self._skipped.get(t, ()))
        # All that distinguishes one step from another; to look at every parameter takes as long as a small update.
        key = tuple([None if i in skipped else bisect_left(steps, t) for i, steps in self._steps.items()])
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._found(self._lags(t), skipped)
        return self._known[key]

    def _found(self, lags: list[int], skipped: set[int]) -> Stretches | None:
        if not skipped and not any(lags):
            return None
        start, stop = self._range
        found: Stretches = []
        kinds = [None if i in skipped else lag for i, lag in enumerate(lags)]
        for lag, run in groupby(range(len(kinds)), key=kinds.__getitem__):
            numbers = list(run)
            a, b = max(self._bounds[numbers[0]], start), min(self._bounds[numbers[-1] + 1], stop)
            if lag is not None and a < b:
                found.append((a - start, b - start, lag))
        return found

    def _part(self, state: OptimizerState, start: int, stop: int, lag: int) -> OptimizerState:
        part = state.part(start, stop, None if self.optimizer.elementwise else self._arena(start, stop))
        part.before -= lag
        return part

    def _arena(self, start: int, stop: int) -> Arena | None:
        """Of the parameters in a stretch, which has them whole."""
        if (start, stop) not in self._arenas:
            arena, begin = self.shards.arena, self._range[0]
            places = zip(arena.names, arena.offsets, strict=True)
            self._arenas[start, stop] = arena.part([n for n, at in places if start <= at - begin < stop])
        return self._arenas[start, stop]

    # --- passes ------------------------------------------------------------------------------------------------

    def step_(self, state: OptimizerState, gradient: Tensor, table: Tensor, scale: Scale) -> None:
        """Advance `state` by one step."""
        stretches = self._stretches(state.step)
        if stretches is None:
            self.optimizer.step_(state, gradient, table, scale)
            return
        for start, stop, lag in stretches:
            part = self._part(state, start, stop, lag)
            self.optimizer.step_(part, gradient[start:stop], table, scale)
        state.step += 1

    def replay_(
        self, state: OptimizerState, gradients: Sequence[Tensor], tables: Tensor, scales: Sequence[Scale]
    ) -> None:
        """Advance `state` by logged steps, in one pass over memory where none of them skips parameters."""
        steps = range(state.step, state.step + len(gradients))
        plain = self._stretches(steps[0]) is None and not any(t in self._skipped for t in steps)
        if plain:
            self.optimizer.replay_(state, gradients, tables, scales)
            return
        # Those that follow each other and skip the same ones have the same stretches.
        for _, run in groupby(range(len(steps)), key=lambda i: self._skipped.get(steps[i], ())):
            numbers = list(run)
            a, b = numbers[0], numbers[-1] + 1
            stretches = self._stretches(steps[a])
            for start, stop, lag in [(0, len(state.params), 0)] if stretches is None else stretches:
                part = self._part(state, start, stop, lag)
                cut = [gradient[start:stop] for gradient in gradients[a:b]]
                self.optimizer.replay_(part, cut, tables[a:b], scales[a:b])
            state.step += b - a

    def vjp_(
        self,
        state: OptimizerState,
        gradient: Tensor,
        table: Tensor,
        adjoint: OptimizerState,
        u: Tensor,
        scale: Scale,
        wanted: Collection[str] | None,
    ) -> Tensor:
        """The VJP of `step_`, as `Optimizer.vjp_table_`. Returns the cotangents of the whole: float64 `[G, H + 1]`."""
        shards, stretches = self.shards, self._stretches(state.step)
        if stretches is None:
            return shards.vjp_(self.optimizer, state, gradient, table, adjoint, u, scale, wanted)
        u.zero_()
        found = []
        for begin, end, _ in shards.pieces:
            total = table.new_zeros(table.shape[0], table.shape[1] + 1)
            for start, stop, lag in stretches:
                a, b = max(start, begin), min(stop, end)
                if a < b:
                    mine, theirs = (self._part(x, a, b, lag) for x in (state, adjoint))
                    out = self.optimizer.vjp_table_(mine, gradient[a:b], table, theirs, u[a:b], scale, wanted)
                    total = total.to(out.device) + out
            found.append(total)
        return shards.totals(torch.stack([x.to(found[-1].device) for x in found]))

    def jvp_(
        self,
        state: OptimizerState,
        gradient: Tensor,
        table: Tensor,
        tangents: Sequence[OptimizerState],
        gradients: Sequence[Tensor],
        hypers: Tensor,
        scale: Scale,
    ) -> None:
        """`step_`, with the tangents of the state. gradients: tangents of the scaled gradient."""
        stretches = self._stretches(state.step)
        if stretches is None:
            self.optimizer.step_jvp_(state, gradient, table, tangents, gradients, hypers, scale, advance=True)
            return
        for start, stop, lag in stretches:
            mine, *theirs = (self._part(x, start, stop, lag) for x in (state, *tangents))
            cut = [x[start:stop] for x in gradients]
            self.optimizer.step_jvp_(mine, gradient[start:stop], table, theirs, cut, hypers, scale, advance=True)
        state.step += 1
