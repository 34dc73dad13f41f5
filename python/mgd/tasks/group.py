"""Several trainings of one kind at once, forward and backward: their states lie side by side.

Evaluations are those of the graphs that each training has, made for several; updates run on one flat buffer of all
states, since every rule here takes each element by itself. Everything a step leaves stays in memory, as in
`ResidentSweep`. Where anything is not as it should be, Doubt is raised, and the trainings are run one by one: the error
or the result is then theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mgd.autodiff.batched import Rows, Steps, StepsInTurn, rows_agree
from mgd.results import Trained
from mgd.step.arguments import warn_of_noise
from mgd.step.metaparameters import BatchMetaparameters, Gradients
from mgd.step.rng import seed_generators, seed_of
from mgd.sweep.adjoint import TrainedObjective
from mgd.sweep.growth import GROWTH, AdjointGrowth
from mgd.tasks.recorded import Task, batched, batched_objective
from mgd.util.finite import all_finite
from mgd_kernels import OptimizerState
from mgd_kernels.arena import Segments


class Doubt(Exception):
    """Why trainings that ran together are to be run one by one."""


@dataclass(slots=True)
class _Inputs:
    """What the steps of all trainings read. shared: which tensors they have in common; the others are `[B, ...]`."""

    tensors: list[Tensor]
    shared: tuple[bool, ...]
    slices: BatchMetaparameters


@dataclass(slots=True)
class _Step:
    """What a step leaves. state: parameters and slots before it."""

    state: tuple[Tensor, ...]
    gradient: Tensor
    inputs: _Inputs
    runner: Steps
    residuals: Any


class Group:
    """tasks: of the same graphs, with one start. at_once: by graphs for all of them, where these can be made."""

    def __init__(self, tasks: list[Task], at_once: bool = True):
        self.at_once = at_once
        self.tasks, self.f, self.start = tasks, tasks[0].f, tasks[0].start
        self.arena, self.meta, self.optimizer = self.start.arena, self.start.meta, self.f.optimizer
        self.meta.first_read = dict(tasks[0].reads)
        self.size, self.steps = len(tasks), len(self.f)
        arena, size = self.arena, self.size
        places = zip(arena.shapes, arena.offsets, strict=True)
        self._places = [((size, *s), (arena.numel, *torch.empty(s, device="meta").stride()), at) for s, at in places]
        ends = [*arena.offsets[1:], arena.numel]
        sizes = [(at, end, shape.numel()) for shape, at, end in zip(arena.shapes, arena.offsets, ends, strict=True)]
        kind = arena.gradient_dtype
        self._gaps = [torch.zeros(size, end - at - count, dtype=kind, device=arena.device) for at, end, count in sizes]
        rows = self.start.state.segments.rows()
        shifted = [(a + i * arena.numel, b + i * arena.numel, g) for i in range(size) for a, b, g in rows]
        self._segments = Segments.merged(shifted, self.start.state.segments.groups)

    # --- flat buffers of all trainings -------------------------------------------------------------------------

    def _views(self, flat: Tensor) -> list[Tensor]:
        """The parameters of all, `[B, ...]` each."""
        return [flat.as_strided(*place) for place in self._places]

    def _rows(self, flat: Tensor) -> Tensor:
        return flat.view(self.size, self.arena.numel)

    def _flat(self, tensors: Rows) -> Tensor:
        """Gradients of all parameters as a flat buffer; None stands for zeros."""
        parts: list[Tensor] = []
        for tensor, (shape, _, _), gap in zip(tensors, self._places, self._gaps, strict=True):
            x = gap.new_zeros(shape) if tensor is None else tensor
            parts += [x.reshape(self.size, -1), gap] if gap.numel() else [x.reshape(self.size, -1)]
        return torch.cat(parts, 1).reshape(-1)

    def _state(self, tensors: tuple[Tensor, ...], step: int) -> OptimizerState:
        return OptimizerState(tensors[0], tensors[1:], step, self._segments, None, self.start.state.before)

    # --- what steps read ---------------------------------------------------------------------------------------

    def _inputs(self, t: int, before: tuple[list[Any], _Inputs] | None) -> tuple[list[Any], _Inputs]:
        """Of step `t`. before: those of the step before it, which are the same where its batches are."""
        own = [task.steps[t] for task in self.tasks]
        if before is not None and all(x is y for x, y in zip(own, before[0], strict=True)):
            return own, before[1]
        tensors, shared = side_by_side([step.given for step in own])
        indices = []
        for each in zip(*[step.metaparameters.indices for step in own], strict=True):
            index = [x for x in each if x is not None]
            indices.append(torch.stack(index) if index else None)
        return own, _Inputs(tensors, shared, BatchMetaparameters(self.meta, [], indices, t))

    # --- forward -----------------------------------------------------------------------------------------------

    def train(self, keep: bool) -> tuple[OptimizerState, list[_Step]]:
        """The state at the end, and what each step leaves, where it is kept."""
        state = self._state(tuple([x.repeat(self.size) for x in self.start.state.tensors()]), 0)
        left: list[_Step] = []
        inputs = None
        for t in range(self.steps):
            inputs = self._inputs(t, inputs)
            given = inputs[1]
            parameters = self._views(state.params)
            runner = batched(self.tasks[0].steps[t]).runner(parameters, given.tensors, given.shared, self.at_once)
            losses, gradients, residuals = runner.forward(parameters, given.tensors, keep)
            if not all_finite(losses):
                raise Doubt(f"a loss at step {t} is not finite")
            gradient = self._flat(list(gradients))
            if keep:
                before = tuple([x.clone() for x in state.tensors()])
                left.append(_Step(before, gradient, given, runner, residuals))
            self.optimizer.step_(state, gradient, self.meta.tables[t])
        if not all_finite(state.params):
            raise Doubt("a trained parameter is not finite")
        self.meta.check_all_read()
        return state, left

    # --- the objectives ----------------------------------------------------------------------------------------

    def objectives(self, end: OptimizerState, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """The values `[B]`, and the adjoint of the parameters, flat, if it is wanted."""
        if self.tasks[0].objective is None:
            return self._each_objective(end, wanted)
        given, shared = side_by_side([task.objective.given for task in self.tasks if task.objective])
        values, gradients = batched_objective(self.tasks[0].objective)(
            self._views(end.params), given, shared, self.at_once
        )
        if not all_finite(values):
            raise Doubt("an objective is not finite")
        return values, self._flat(gradients) if wanted else None

    def _each_objective(self, end: OptimizerState, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """By the objectives as they are written."""
        start, values, found = self.start, [], []
        for task, *tensors in zip(self.tasks, *[self._rows(x).unbind() for x in end.tensors()], strict=True):
            trained = Trained(self.arena.views(tensors[0]), dict(start.buffers), {}, torch.empty(0))
            seed_generators(seed_of(self.f.seed, start.state.before + self.steps), self.arena.device)
            how = self.steps, self.f.objective_mode, start.step.loss.written
            objective = TrainedObjective(start.binding, task.f.objective, trained, *how)
            if wanted:
                value, adjoints = objective.adjoints(start.step.shards, start.state)
                found.append(adjoints[0].state.params)
            else:
                value = objective.value()
            if value.ndim:
                raise Doubt("an objective has several components")
            values.append(value)
        return torch.stack(values), torch.cat(found) if wanted else None

    # --- backward ----------------------------------------------------------------------------------------------

    def go_back(self, steps: list[_Step], adjoint: Tensor) -> dict[str, Any]:
        """The sum of the gradients, by the keys of z. adjoint: of the parameters at the end."""
        meta, ranks = self.meta, self.start.step.shards.ranks
        whole = self._state((adjoint, *[torch.zeros_like(adjoint) for _ in self.optimizer.slots]), self.steps)
        gradients, u = Gradients(meta, 1, ranks), torch.zeros_like(adjoint)
        growth = AdjointGrowth(self.size, self.steps, self.start.step.shards)
        warn_of_noise(self.optimizer, meta.hypers, self.start.step.shards, self._stillest(steps[-1]))
        for t in range(self.steps - 1, meta.first_step - 1, -1):
            left = steps.pop()
            growth.squares[:, t, 0] = torch.linalg.vector_norm(self._rows(adjoint), dim=1, dtype=torch.float64) ** 2
            state = self._state(left.state, t)
            out = self.optimizer.vjp_table_(state, left.gradient, meta.tables[t], whole, u, wanted=meta.hyper_keys)
            gradients.add_hyper(0, t, out, self.start.step.loss.reads)
            if t > meta.first_step or meta.reads_at(t):
                self._through_gradient(t, left, adjoint, u, gradients)
        total = self._rows(adjoint).sum(0)
        if not gradients.finite([total]):
            raise Doubt("a metagradient is not finite")
        norms = growth.squares[:, meta.first_step :, 0].sqrt()
        if bool((norms.amax(1) >= GROWTH * norms.amin(1)).any()):
            growth.warn(growth.norms())
        found = gradients.collect([self.arena.views(total)] if meta.wants_initial else [])
        return tree_map(lambda g: g[0], found)

    def _stillest(self, last: _Step) -> OptimizerState:
        """The state, before the last step, of the training most of whose second moments are 0."""
        rows = [self._rows(x) for x in last.state]
        i = int((rows[-1] == 0).sum(1).argmax())
        own, slots = rows[0][i], tuple([x[i] for x in rows[1:]])
        return OptimizerState(
            own, slots, self.steps - 1, self.start.state.segments, self.arena, self.start.state.before
        )

    def _through_gradient(self, t: int, left: _Step, adjoint: Tensor, u: Tensor, gradients: Gradients) -> None:
        """The adjoint through the gradients of the losses."""
        parameters, directions, given = self._views(left.state[0]), self._views(u), left.inputs.tensors
        with_parameters, with_metaparameters, products = left.runner.second(
            parameters, given, left.residuals, directions
        )
        agreement = self.start.step.agreement
        found = agreement.discrepancies(self._rows(left.gradient), self._rows(u), products)
        if doubtful := [i for i, x in enumerate(found) if x > agreement.tolerance]:  # perhaps rounding
            results = [*with_parameters, *with_metaparameters]
            self._confirm(t, left, doubtful, parameters, directions, results)
            agreement.widen(max(found))
        pairs = [
            (x, g if g.dtype == x.dtype else g.to(x.dtype))
            for x, g in zip(self._views(adjoint), with_parameters, strict=True)
            if g is not None
        ]
        if pairs:
            torch._foreach_add_([x for x, _ in pairs], [g for _, g in pairs])
        slices = left.inputs.slices
        terms = [
            g if g is None or index is not None else g.sum(0)
            for g, index in zip(with_metaparameters, slices.indices, strict=True)
        ]
        gradients.add(0, t, [(slices, terms)])

    def _confirm(
        self,
        t: int,
        left: _Step,
        doubtful: list[int],
        parameters: list[Tensor],
        directions: list[Tensor],
        results: Rows,
    ) -> None:
        """Raises Doubt where the graphs of these trainings by themselves have another gradient, or other second
        derivatives."""
        shared = left.inputs.shared
        plain = StepsInTurn(batched(self.tasks[0].steps[t]).joint, shared, len(doubtful))
        parameters, directions = [x[doubtful] for x in parameters], [x[doubtful] for x in directions]
        given = [x if same else x[doubtful] for x, same in zip(left.inputs.tensors, shared, strict=True)]
        _, gradients, residuals = plain.forward(parameters, given, keep=True)
        first, second, _ = plain.second(parameters, given, residuals, directions)
        own = [None if x is None else x[doubtful] for x in (*self._views(left.gradient), *results)]
        if not rows_agree(own, [*gradients, *first, *second]):
            raise Doubt(f"the gradient at step {t} is not the one that trained")


def side_by_side(rows: list[list[Tensor]]) -> tuple[list[Tensor], tuple[bool, ...]]:
    """Tensors of several trainings, and which of them they have in common; the others become one, `[B, ...]`."""
    tensors, shared = [], []
    for each in zip(*rows, strict=True):
        first = each[0]
        same = all(x is first or (x.data_ptr() == first.data_ptr() and x.numel()) for x in each)
        tensors.append(first if same else torch.stack(each))
        shared.append(same)
    return tensors, tuple(shared)
