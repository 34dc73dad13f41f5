"""A training as it would run, recorded: the graphs of its steps and of its objective, and the tensors that they read.

Nothing of it is evaluated. What is recorded stays as it was, whatever the user's code does until it is run.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from mgd.autodiff.batched import BatchedObjectives, BatchedSteps
from mgd.autodiff.captured import CapturedEvaluator
from mgd.autodiff.gathered import NotRecorded
from mgd.autodiff.objectives import RecordedObjective
from mgd.autodiff.recorded import RecordedStep, recorded_step
from mgd.function import TrainingFunction
from mgd.step.batches import microbatches
from mgd.step.loss import Microbatch
from mgd.step.start import Start
from mgd.tasks.account import Account
from mgd_kernels import SGD, Adam, AdamW

_SETTINGS = ("seed", "objective_mode", "budget")


@dataclass(eq=False)
class Task:
    """A training that is to be run. start: before its first step, which other tasks may share. objective: None where it
    is evaluated by itself. reads: of each key of z that the loss reads, the first step that does. versions: of what it
    reads, how often each was changed in place. copied: whether some of that is its own copies. account: of its kind,
    where it runs with others only if that pays. seconds: that its recording took."""

    f: TrainingFunction
    start: Start
    steps: list[RecordedStep]
    objective: RecordedObjective | None
    reads: dict[str, int]
    versions: list[int]
    copied: bool
    account: Account | None = None
    seconds: float = 0.0

    def graphs(self) -> Hashable:
        """Tasks with the same ones can run at once."""
        return tuple([id(step.graph) for step in self.steps]), self.objective and id(self.objective.graph)

    def mapped(self) -> int:
        """How many graphs there are for several like it at once."""
        steps = sum([len(each.known) for each in {batched(step) for step in self.steps}])
        return steps + (len(batched_objective(self.objective).known) if self.objective else 0)

    def read(self) -> list[Tensor]:
        """Every tensor that it reads, beside parameters."""
        steps = [x for step in dict.fromkeys(self.steps) for x in step.given]
        return steps + (self.objective.given if self.objective else [])

    def reads_as(self, other: Task) -> bool:
        """Whether it would run as another one."""
        return self.graphs() == other.graphs() and all(map(_same, self._at_every_step(), other._at_every_step()))

    def _at_every_step(self) -> list[Tensor]:
        steps = [x for step in self.steps for x in step.given]
        return steps + (self.objective.given if self.objective else [])

    def share(self, other: Task) -> None:
        """Read the tensors of a task of the same graphs where they are equal, which spares copies."""
        for mine, theirs in zip(dict.fromkeys(self.steps), dict.fromkeys(other.steps), strict=False):
            if len(mine.given) == len(theirs.given):
                mine.given = [y if _same(x, y) else x for x, y in zip(mine.given, theirs.given, strict=True)]
        if self.objective and other.objective:
            pairs = zip(self.objective.given, other.objective.given, strict=True)
            self.objective.given = [y if _same(x, y) else x for x, y in pairs]

    def bytes(self, wanted: bool) -> int:
        """What it takes to run it. wanted: also back."""
        arena, slots = self.start.arena, len(self.f.optimizer.slots)
        state = arena.numel * arena.dtype.itemsize * (1 + slots)
        read = sum([x.nbytes for x in self.read()])
        if not wanted:
            return 2 * state + 2 * read
        gradient = arena.numel * arena.gradient_dtype.itemsize
        residuals = sum([step.graph.joint.residual_bytes for step in self.steps])
        return len(self.steps) * (state + gradient) + residuals + 2 * state + 2 * read


def may_share(f: TrainingFunction) -> bool:
    """Whether the settings of a training let it run together with others."""
    evaluator = f._evaluator
    return (
        type(f) is TrainingFunction
        and isinstance(evaluator, CapturedEvaluator)
        and not evaluator.compile
        and evaluator.refused is None
        and type(f.optimizer) in (SGD, Adam, AdamW)  # each element by itself
        and f.max_grad_norm is None
        and f.microbatches == 1
        and f.since is None
        and f.ranks.size == 1
        and f.autocast is None
        and f.schedule == "auto"
        and f.budget.disk is None
        and not (f.optimizer_state or {}).get("skipped")
    )


def same_settings(f: TrainingFunction, g: TrainingFunction) -> bool:
    """Whether two trainings differ in their batches and objectives alone. Both may run together with others."""
    return (
        f._evaluator is g._evaluator  # so they have one model and one loss
        and len(f) == len(g)
        and f.optimizer_state is g.optimizer_state
        and all(getattr(f, name) == getattr(g, name) for name in _SETTINGS)
        and _equal(f.fixed, g.fixed)
        and _equal(f.per_example, g.per_example)
        and (f.optimizer is g.optimizer or _equal(_described(f.optimizer), _described(g.optimizer)))
    )


def _described(x: Any) -> dict[str, Any]:
    return {"type": type(x), **vars(x)}


def _equal(x: Any, y: Any) -> bool:
    try:
        return bool(x == y)
    except RuntimeError:  # tensors, which are not the same ones
        return False


def same_start(a: Start, b: Start) -> bool:
    """Whether two trainings begin with the same numbers, and are shown the same metaparameters."""
    ours, theirs = ([s.meta.hypers, *s.state.tensors(), *s.buffers.values(), *_leaves(s)] for s in (a, b))
    return (
        a.arena.names == b.arena.names
        and a.state.before == b.state.before
        and list(a.buffers) == list(b.buffers)
        and list(a.meta.z) == list(b.meta.z)
        and len(ours) == len(theirs)
        and all(map(_same, ours, theirs))
    )


def _leaves(start: Start) -> list[Tensor]:
    return [x for x in tree_flatten(start.meta.z)[0] if isinstance(x, Tensor)]


def _same(x: Tensor, y: Tensor) -> bool:
    if x is y or x.dtype != y.dtype or x.shape != y.shape:
        return x is y
    return torch.equal(x, y) or (x.is_floating_point() and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True))


def recorded_task(f: TrainingFunction, start: Start, still: bool) -> Task:
    """The training, recorded. still: nobody's code runs between here and its run, so that tensors stay as they are.
    Raises NotRecorded, and errors of the user's code."""
    evaluator, loss = f._evaluator, start.step.loss
    assert isinstance(evaluator, CapturedEvaluator)
    listed = still and type(f.batches) in (list, tuple)
    parameters = start.arena.tensors(start.state.params)
    steps: list[RecordedStep] = []
    last = None
    start.meta.first_read = {}
    copied = not still
    for t in range(len(f)):
        batch = f.batches[t]
        plain = listed and _is_plain(batch)
        if plain and t and batch is last and not start.meta.per_example:
            steps.append(steps[-1])
            continue
        ((part, share),) = microbatches(batch, 1, t, range(1))
        microbatch = Microbatch(loss, f.batches, t, 0, part, share, start.meta.at(part, t))
        step = recorded_step(evaluator, microbatch, parameters, start.buffers)
        if why := batched(step).alone:
            raise NotRecorded(why)
        if not plain:
            copied, step.given = True, kept(step.given, steps[-1].given if steps else ())
        steps.append(step)
        last = batch
    objective = _objective(f, evaluator, start, parameters, still)
    task = Task(f, start, steps, objective, start.meta.first_read, [], copied)
    task.versions = versions(task)
    return task


def _is_plain(x: Any) -> bool:
    """Whether nobody's code runs where this is read: tensors and numbers in containers of Python's."""
    if type(x) in (tuple, list):
        return all(map(_is_plain, x))
    if type(x) is dict:
        return all(map(_is_plain, x.values()))
    return type(x) in (Tensor, torch.nn.Parameter, int, float, bool, str, type(None))


def versions(task: Task) -> list[int]:
    return [0 if x.is_inference() else x._version for x in task.read()]


def _objective(
    f: TrainingFunction, evaluator: CapturedEvaluator, start: Start, parameters: list[Tensor], still: bool
) -> RecordedObjective | None:
    how = start.step.loss, parameters, start.buffers, f.objective_mode
    try:
        found = evaluator.objectives.recorded(f.objective, *how)
        if why := batched_objective(found).alone:
            raise NotRecorded(why)
    except NotRecorded:
        # It can wait until the training has run. What it does beside may show then, which only who asked for it takes.
        if still and evaluator.at_once:
            return None
        raise
    if not still:
        found.given = kept(found.given, ())
    return found


def kept(tensors: Sequence[Tensor], known: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors that may change; those known in their place, where they are equal."""
    known = known if len(known) == len(tensors) else [None] * len(tensors)  # type: ignore[list-item]
    return [y if y is not None and _same(x, y) else x.clone() for x, y in zip(tensors, known, strict=True)]


def batched(step: RecordedStep) -> BatchedSteps:
    """The graphs for several steps of this kind at once."""
    graph = step.graph
    if graph.batched is None:
        graph.batched = BatchedSteps(graph)
    return graph.batched


def batched_objective(objective: RecordedObjective) -> BatchedObjectives:
    """The graphs for several objectives of this kind at once."""
    graph = objective.graph
    if graph.batched is None:
        graph.batched = BatchedObjectives(graph)
    return graph.batched
