"""What a sweep keeps: the gradient log and the snapshots, each entry on the tier its plan names.

Entries in the memory where the training runs are held as they are; others go through `mgd_kernels.Store`, which
copies, checks and prefetches. A gradient for the disk is computed into a buffer that the store lends, and read back in
one that it leases, so that neither is copied; where the store has none to spare, they are.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mgd.errors import CorruptState, StoreIOError
from mgd.step.model import Buffers
from mgd.step.step import StepResult
from mgd_kernels import OptimizerState

if TYPE_CHECKING:
    from mgd.sweep.prefetch import Prefetcher
    from mgd_kernels import Arena
    from mgd_kernels.store import Store
    from mgd_kernels.store.zero_copy import Reservation

Key = tuple[str, int]

LEASED = 3  # gradients leased at a time, to advance over them in one pass


@dataclass
class Snapshot:
    state: OptimizerState
    buffers: Buffers


class History:
    """The log and the snapshots of one sweep.

    store: holds what does not live in the training's own memory; None where nothing else is planned.
    constants: the buffers before the first step. One that the training never replaces is held once, here.
    microbatches: evaluations a step. persistent: the tape outlives the process: every entry is whole (it refers to no
    constants), all go to disk, and what is removed stays on disk until `sweep_out`.
    gradient: flat `[n]` and uninitialised, or None where the store does not hold any: makes the memory for a gradient
    that has to be copied from the store. It is made once, and what was read is valid until the next such read.
    """

    def __init__(
        self,
        store: Store | None,
        constants: Buffers,
        gradient: Callable[[], Tensor] | None,
        microbatches: int,
        on_device: bool = False,
        persistent: bool = False,
    ):
        self.store, self.constants, self._new_gradient = store, constants, gradient
        self._scratch: Tensor | None = None
        self._lent: Reservation | None = None
        self._spare = (1 + microbatches) * sum(_room(b) for b in constants.values()) + 8 * microbatches + 64
        self._direct = ("device",) if on_device else ("device", "host")
        self._microbatches, self._persistent, self._copying = microbatches, persistent, on_device
        self._condemned: set[Key] = set()
        self._gradients: dict[int, StepResult] = {}  # in memory, as are these
        self._snapshots: dict[int, Snapshot] = {}
        self._names: dict[Key, list[tuple[str, ...]]] = {}  # of stored entries: the buffers that are not constants
        self.ahead: Prefetcher | None = None

    def in_memory(self, tier: str) -> bool:
        """Whether entries of this tier are held as they are, and not in the store."""
        return self.store is None or (tier in self._direct and not self._persistent)

    # --- the log -----------------------------------------------------------------------------------------------

    def blank(self, arena: Arena, tier: str | None) -> Tensor | None:
        """Memory of the store in which to compute the gradient that is logged next, or None: then anywhere."""
        if (tier != "disk" and not self._persistent) or tier is None or arena.device.type != "cpu":
            return None
        self._lent = self._entries.reserve([arena.numel], arena.gradient_dtype, self._spare)
        return None if self._lent is None else self._lent.tensor

    def log(self, t: int, step: StepResult, tier: str) -> None:
        """Keep what the evaluation of step `t` left behind."""
        if self.in_memory(tier):
            self._gradients[t] = step
        else:
            self._put(("gradient", t), [step.gradient, step.losses], step.buffers, tier)
        self._lent = None

    def logged(self, t: int) -> bool:
        return t in self._gradients or ("gradient", t) in self._names

    def run(self, start: int, stop: int) -> list[StepResult]:
        """Logged steps from `start` on, at least one: as many as lie in memory, or a few from the store."""
        run: list[StepResult] = []
        for t in range(start, stop):
            step = self._gradients.get(t)
            if step is None and ("gradient", t) in self._names and len(run) < LEASED:
                step = self._lease(t)
            if step is None:
                break
            run.append(step)
        return run or [self.read(start)]

    def read(self, t: int) -> StepResult:
        """The log entry of step `t`."""
        step = self._gradients.get(t) or self._lease(t)
        if step is not None:
            return step
        if self._scratch is None:
            assert self._new_gradient is not None
            self._scratch = self._new_gradient()
        losses = torch.empty(self._microbatches, dtype=torch.float64)
        return StepResult(self._scratch, losses, self._get(("gradient", t), [self._scratch, losses]))

    def _lease(self, t: int) -> StepResult | None:
        """The log entry of step `t` in the store's buffer, until the gradient is let go of; None where it must copy."""
        key = ("gradient", t)
        if self._copying or key not in self._names:
            return None
        with explained(key):
            leased = self._entries.view(key, self._again(key))
        if leased is None:
            return None
        if self.ahead is not None:
            self.ahead.got(key)
        rest = (b.clone() for b in leased[2:])  # buffers outlive the step
        histories = [self.constants | {name: next(rest) for name in changed} for changed in self._names[key]]
        return StepResult(leased[0], leased[1].clone(), histories)

    def _again(self, key: Key) -> bool:
        """Whether the entry is to be read again soon."""
        return self.ahead is not None and self.ahead.again(key)

    def forget(self, t: int) -> None:
        self._remove(("gradient", t))

    # --- snapshots ---------------------------------------------------------------------------------------------

    def save(self, state: OptimizerState, buffers: Buffers, tier: str) -> None:
        """Copy the state at its step."""
        key = ("snapshot", state.step)
        if self.in_memory(tier):
            self._snapshots[state.step] = Snapshot(state.clone(), buffers)
        else:
            self._put(key, list(state.tensors()), [buffers], tier)

    def load(self, t: int, state: OptimizerState) -> Buffers:
        """Make `state` that of step `t`, and return its buffers."""
        snapshot = self._snapshots.get(t)
        if snapshot is not None:
            state.copy_(snapshot.state)
            return snapshot.buffers
        buffers = self._get(("snapshot", t), list(state.tensors()))[0]
        state.step = t
        return buffers

    def drop(self, t: int) -> None:
        self._remove(("snapshot", t))

    # --- the store ---------------------------------------------------------------------------------------------

    @property
    def _entries(self) -> Store:
        assert self.store is not None  # or nothing is planned for it
        return self.store

    def _put(self, key: Key, tensors: list[Tensor], histories: list[Buffers], tier: str) -> None:
        whole = self._persistent
        names = [tuple(n for n, b in buffers.items() if whole or b is not self.constants[n]) for buffers in histories]
        extra = [buffers[n] for buffers, changed in zip(histories, names, strict=True) for n in changed]
        with explained(key):
            self._entries.check()  # a write that failed meanwhile: the training need not go on
            if self._lent is not None and tensors[0] is self._lent.tensor:
                self._entries.commit(key, self._lent, tensors[1:] + extra)
            else:
                self._entries.put(key, tensors + extra, tier)
        self._names[key] = names
        self._condemned.discard(key)
        if self.ahead is not None:
            self.ahead.put(key)

    def _get(self, key: Key, out: list[Tensor]) -> list[Buffers]:
        """Fill `out` with the entry's first tensors, and return its buffers."""
        if key not in self._names:
            raise CorruptState(key, None, f"{self._entries.stats()['disk']['directory']} holds it no longer", ADVICE)
        histories = [
            self.constants | {name: torch.empty_like(self.constants[name]) for name in changed}
            for changed in self._names[key]
        ]
        rest = [b[name] for b, changed in zip(histories, self._names[key], strict=True) for name in changed]
        with explained(key):
            self._entries.get(key, out=[*out, *rest], again=self._again(key))
        if self.ahead is not None:
            self.ahead.got(key)
        return histories

    def _remove(self, key: Key) -> None:
        held: dict[int, Any] = self._gradients if key[0] == "gradient" else self._snapshots
        if held.pop(key[1], None) is None and self._names.pop(key, None) is not None:
            if self.ahead is not None:
                self.ahead.removed(key)
            if self._persistent:
                self._condemned.add(key)
            else:
                self._entries.delete(key)

    def stored(self, key: Key) -> bool:
        """Whether the store has the entry."""
        return key in self._names

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
            self._entries.delete(key)
        self._condemned.clear()

    @property
    def late(self) -> int:
        """Snapshots that were removed and still take room."""
        return sum(kind == "snapshot" for kind, _ in self._condemned)

    def close(self) -> None:
        """Let go of everything. A resumable tape then raises the error of a write that failed."""
        self._gradients.clear()
        self._snapshots.clear()
        self._names.clear()
        self.ahead = self._lent = None
        if self.store is not None:
            self.store.close()

    @contextlib.contextmanager
    def closed_after_errors(self) -> Iterator[None]:
        """Closes the tape when the block fails; the block's error is the one to hear of."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(StoreIOError):
                self.close()
            raise

    def stats(self) -> dict[str, Any] | None:
        """What the store did, or None where there was none."""
        return None if self.store is None else self.store.stats()


def _room(tensor: Tensor) -> int:
    """Bytes that a tensor takes in an entry at most."""
    return tensor.nbytes + 64


ADVICE = "What it held cannot be had again: delete the directory, and begin anew."

_FILE = re.compile(r"step-(\d+)-(gradient|snapshot)\.mgd")


@contextlib.contextmanager
def damage_explained() -> Iterator[None]:
    """Errors of damaged entries say what to do about a directory that nobody but a metagradient writes."""
    try:
        yield
    except CorruptState as error:
        raise CorruptState(error.key, error.chunk, error.found, ADVICE) from error


@contextlib.contextmanager
def explained(key: Key) -> Iterator[None]:
    """Errors of the store say which step is concerned; their `step` is its number, and `key` that of the entry.

    An error may be that of another entry than `key`, which was being written meanwhile.
    """
    try:
        with damage_explained():
            yield
    except CorruptState as error:
        error.step = key[1]  # type: ignore[attr-defined]
        raise
    except StoreIOError as error:
        found = _FILE.search(str(error.path))
        kind, t = (found[2], int(found[1])) if found else key
        told: Any = StoreIOError(error.errno or 0, error.path, f"the {kind} of step {t}: {error.what}")
        told.key, told.step = (kind, t), t
        raise told from error
