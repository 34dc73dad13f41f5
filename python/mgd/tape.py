"""What a sweep keeps: the gradient log and the snapshots, each entry on the tier its plan names.

Entries in the memory where the training runs are held as they are; others go through `mgd_kernels.Store`, which
copies, checks and prefetches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mgd.actions import Action, Advance, Drop, Load, Reverse, Save
from mgd.model import Buffers
from mgd.steps import Evaluated
from mgd_kernels import OptimizerState

if TYPE_CHECKING:
    from mgd_kernels.store import Store

Key = tuple[str, int]

HORIZON = 4  # actions looked at before their turn, so that their reads run behind the computation


@dataclass
class Snapshot:
    state: OptimizerState
    buffers: Buffers


class Tape:
    """The log and the snapshots of one sweep.

    store: holds what does not live in the training's own memory; None where nothing else is planned.
    constants: the buffers before the first step. One that the training never replaces is held once, here.
    microbatches: evaluations a step. persistent: the tape outlives the process: every entry is whole (it refers to no
    constants), all go to disk, and what is removed stays on disk until `sweep_out`.
    scratch: flat `[n]`, receives a gradient that is read from the store; it is valid until the next read.
    """

    def __init__(
        self,
        store: Store | None,
        constants: Buffers,
        scratch: Tensor,
        microbatches: int,
        on_device: bool = False,
        persistent: bool = False,
    ):
        self.store, self.constants, self.scratch = store, constants, scratch
        self._direct = ("device",) if on_device else ("device", "host")
        self._microbatches, self._persistent = microbatches, persistent
        self._condemned: set[Key] = set()
        self._held: dict[Key, Evaluated | Snapshot] = {}
        self._names: dict[Key, list[tuple[str, ...]]] = {}  # of stored entries: the buffers that are not constants

    def _in_memory(self, tier: str) -> bool:
        return self.store is None or (tier in self._direct and not self._persistent)

    # --- the log -----------------------------------------------------------------------------------------------

    def log(self, t: int, step: Evaluated, tier: str) -> None:
        """Keep what the evaluation of step `t` left behind."""
        if self._in_memory(tier):
            self._held["gradient", t] = step
        else:
            self._put(("gradient", t), [step.gradient, step.losses], step.buffers, tier)

    def logged(self, t: int) -> bool:
        return ("gradient", t) in self._held or ("gradient", t) in self._names

    def held(self, start: int, stop: int) -> list[Evaluated]:
        """The longest run of logged steps from `start` that lies in memory."""
        run = []
        for t in range(start, stop):
            step = self._held.get(("gradient", t))
            if step is None:
                break
            run.append(step)
        return run

    def read(self, t: int) -> Evaluated:
        """The log entry of step `t`."""
        if ("gradient", t) in self._held:
            return self._held["gradient", t]
        losses = torch.empty(self._microbatches, dtype=torch.float64)
        return Evaluated(self.scratch, losses, self._get(("gradient", t), [self.scratch, losses]))

    def forget(self, t: int) -> None:
        self._remove(("gradient", t))

    # --- snapshots ---------------------------------------------------------------------------------------------

    def save(self, state: OptimizerState, buffers: Buffers, tier: str) -> None:
        """Copy the state at its step."""
        key = ("snapshot", state.step)
        if self._in_memory(tier):
            self._held[key] = Snapshot(state.clone(), buffers)
        else:
            self._put(key, list(state.tensors()), [buffers], tier)

    def load(self, t: int, state: OptimizerState) -> Buffers:
        """Make `state` that of step `t`, and return its buffers."""
        snapshot = self._held.get(("snapshot", t))
        if snapshot is not None:
            state.copy_(snapshot.state)
            return snapshot.buffers
        buffers = self._get(("snapshot", t), list(state.tensors()))[0]
        state.step = t
        return buffers

    def drop(self, t: int) -> None:
        self._remove(("snapshot", t))

    # --- the store ---------------------------------------------------------------------------------------------

    def _put(self, key: Key, tensors: list[Tensor], histories: list[Buffers], tier: str) -> None:
        whole = self._persistent
        names = [tuple(n for n, b in buffers.items() if whole or b is not self.constants[n]) for buffers in histories]
        extra = [buffers[n] for buffers, changed in zip(histories, names, strict=True) for n in changed]
        self.store.put(key, tensors + extra, tier)
        self._names[key] = names
        self._condemned.discard(key)

    def _get(self, key: Key, out: list[Tensor]) -> list[Buffers]:
        """Fill `out` with the entry's first tensors, and return its buffers."""
        histories = [
            self.constants | {name: torch.empty_like(self.constants[name]) for name in changed}
            for changed in self._names[key]
        ]
        rest = [b[name] for b, changed in zip(histories, self._names[key], strict=True) for name in changed]
        self.store.get(key, out=[*out, *rest])
        return histories

    def _remove(self, key: Key) -> None:
        if self._held.pop(key, None) is None and self._names.pop(key, None) is not None:
            if self._persistent:
                self._condemned.add(key)
            else:
                self.store.delete(key)

    # --- across processes ----------------------------------------------------------------------------------------

    def adopt(self, keys: Iterable[Any]) -> None:
        """Take over the entries that an earlier process left in the store."""
        for key in keys:
            if key[0] in ("gradient", "snapshot"):
                histories = 1 + self._microbatches if key[0] == "gradient" else 1
                self._names[key] = [tuple(self.constants)] * histories

    def discard_after(self, step: int) -> None:
        """Remove what an earlier process wrote after it had reached this step."""
        for kind, t in list(self._names):
            if t > step or (kind, t) == ("gradient", step):
                self._remove((kind, t))
        self.sweep_out()

    def sweep_out(self) -> None:
        """Delete what was removed: nothing that a checkpoint refers to needs it any more."""
        for key in self._condemned:
            self.store.delete(key)
        self._condemned.clear()

    def close(self) -> None:
        self._held.clear()
        self._names.clear()
        if self.store is not None:
            self.store.close()

    def stats(self) -> dict[str, Any] | None:
        """What the store did, or None where there was none."""
        return None if self.store is None else self.store.stats()


def read_ahead(actions: Iterator[Action], tape: Tape, position: int) -> Iterator[Action]:
    """The actions from `position` on, while the store reads what the following ones need."""
    if tape.store is None:
        yield from actions
        return
    queue: deque[Action] = deque()
    for action in actions:
        queue.append(action)
        reads = [key for key in _reads(action, position) if key in tape._names]
        if reads:
            tape.store.prefetch(reads)
        if not isinstance(action, Save | Drop):
            position = action.stop if isinstance(action, Advance) else action.step
        if len(queue) > HORIZON:
            yield queue.popleft()
    yield from queue


def _reads(action: Action, position: int) -> list[Key]:
    """The entries that an action reads where they are kept."""
    if isinstance(action, Load):
        return [("snapshot", action.step)]
    if isinstance(action, Advance):
        return [("gradient", t) for t in range(position, action.stop)]
    if isinstance(action, Reverse):
        return [("gradient", action.step)]
    return []
