"""The sweeps of an attribution: each has an objective of several numbers, and repeats the same training."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mgd.attribution import scores as files
from mgd.attribution.result import AttributionReport
from mgd.errors import BadObjective, ReplayDivergence
from mgd.function import TrainingFunction
from mgd.ranks.ranks import Ranks
from mgd.results import Metagradient, Trained
from mgd.util.progress import tracked
from mgd.util.text import describe

Objective = Callable[[nn.Module], Tensor]
Objectives = Callable[[nn.Module, Tensor], Tensor]


class Part(NamedTuple):
    """What shares a sweep. first, length: its rows among those of all parts. objective: makes the objective of them."""

    first: int
    length: int
    objective: Callable[[], Objective]


@dataclass
class Sweeps:
    """How the sweeps of an attribution are made.

    f, z: the training. weights: the metaparameter whose gradients are the scores. groups: so many groups of f's ranks
    take turns. resume: a directory in which a sweep keeps its log. rehearsal: the training that each of them must
    repeat. report: what they cost is added. progress: show bars.
    """

    f: TrainingFunction
    z: Mapping[str, Any]
    weights: str
    groups: int
    resume: Path | None
    rehearsal: Trained
    report: AttributionReport
    progress: bool

    def run(
        self,
        kind: str,
        parts: Sequence[Part],
        done: Collection[int],
        take: Callable[[int, np.ndarray, Tensor], None],
    ) -> None:
        """Sweep for all parts but those whose first rows are in `done`. kind: of the rows, for people.

        take: is given every part's first row, its gradients `[length, n]` and values float64 `[length]`, on every rank.
        Raises ReplayDivergence unless every training repeats the rehearsal.
        """
        todo = [part for part in parts if part.first not in done]
        self.report.chunks_kept = len(parts) - len(todo)
        self._forget(kind, (part for part in parts if part.first in done))
        total, left = (sum(part.length for part in some) for some in (parts, todo))
        bar = self.progress and len(parts) > 1  # else the bars of its two sweeps are shown instead
        with tracked(kind, total, total - left, enabled=bar) as tick, _Group.of(self.f, self.groups) as group:
            for turn in (todo[i : i + self.groups] for i in range(0, len(todo), self.groups)):
                found: list[tuple[int, np.ndarray, Tensor]] = []
                for part in turn[group.index : group.index + 1]:
                    group.function.objective = part.objective()
                    result = self._repeated(group.function, self._place(kind, part), self.progress and not bar)
                    self.report.add(result)
                    found.append((part.first, result.grads[self.weights].cpu().numpy(), result.value.double().cpu()))
                    del result
                with self.report.timed("scores"):
                    for each in group.exchanged(found):
                        take(*each)
                self._forget(kind, turn)
                for _ in range(sum(part.length for part in turn)):
                    tick("")

    def _place(self, kind: str, part: Part) -> Path | None:
        return self.resume and self.resume / f"{kind}-{part.first}"

    def _forget(self, kind: str, parts: Iterable[Part]) -> None:
        """Remove what sweeps kept that is not needed any more."""
        for part in parts:
            if (place := self._place(kind, part)) is not None:
                shutil.rmtree(place, ignore_errors=True)

    def _repeated(self, f: TrainingFunction, place: Path | None, progress: bool) -> Metagradient:
        """A metagradient. Raises ReplayDivergence unless its training repeated the rehearsal bit by bit."""
        try:
            result = f.metagradient(self.z, resume=place, progress=progress)
        except ReplayDivergence:
            # The reverse sweep meets the last differing step first; training once more finds the first one.
            check_same_training(self.rehearsal, f.train(self.z))
            raise
        check_same_training(self.rehearsal, result)
        return result


@dataclass
class _Group:
    """The group of ranks to which this one belongs. function: its own training, which has the traces of f. all_ranks:
    those of all groups, if there are several."""

    function: TrainingFunction
    index: int = 0
    count: int = 1
    all_ranks: Ranks | None = None

    @classmethod
    @contextlib.contextmanager
    def of(cls, f: TrainingFunction, count: int) -> Iterator[_Group]:
        ranks, index = f.ranks.split(count)
        if count == 1:
            yield cls(copy.copy(f))
            return
        with f.ranks.call():  # an error of one group ends the others, too
            yield cls(f.replaced(process_group=ranks), index, count, f.ranks)

    def exchanged(self, found: list[Any]) -> Iterator[Any]:
        """What all groups have found, that of one group at a time."""
        if self.all_ranks is None:
            yield from found
            return
        own = found if self.function.ranks.rank == 0 else []
        for index in range(self.count):
            yield from (one for each in self.all_ranks.objects(own if index == self.index else []) for one in each)


def objective_of(objectives: Objectives, part: list[int]) -> Objective:
    """The objective of a chunk: the losses of its queries, `[len(part)]`."""

    def objective(model: nn.Module) -> Tensor:
        losses = objectives(model, torch.tensor(part))
        if not isinstance(losses, Tensor) or losses.shape != (len(part),):
            raise BadObjective(
                f"expected objectives(model, index) to return one loss for each of {len(part)} queries, of shape "
                f"[{len(part)}]; got {describe(losses)}. Use reduction='none' and index the queries with `index`."
            )
        return losses

    return objective


def check_same_training(first: Trained, second: Trained | Metagradient) -> None:
    """Raise ReplayDivergence unless both trainings have the same losses and the same trained state, bit by bit."""
    advice = (
        "An attribution needs a training that repeats itself: the same batches each time (a fixed order and fixed "
        "augmentation), random numbers from torch's generators only, no state outside the model's buffers, and "
        "deterministic kernels (torch.use_deterministic_algorithms)."
    )
    step = files.first_difference(first.losses.numpy(), second.losses.numpy())
    if step is not None:
        a, b = float(first.losses[step]), float(second.losses[step])
        raise ReplayDivergence(step, f"its loss was {a!r} in one training and {b!r} in the next. {advice}")
    for name, tensor in first.model_state.items():
        if not torch.equal(tensor, second.model_state[name]):
            last = len(first.losses) - 1
            cause = f"two trainings with equal losses end with different values of {name}. {advice}"
            raise ReplayDivergence(last, cause)
