"""What a sweep keeps: the gradient log and the snapshots, each entry on the tier its plan names.

Entries on a tier in the training's own memory are held as they are. Others go through `mgd_kernels.Store`, which
copies, checks and prefetches. A gradient for the disk is computed in a buffer that the store reserves, and read back as
a view of one, so that neither is copied; where the store has none to spare, they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mgd.errors import CorruptState, StoreIOError
from mgd.step.model import Buffers
from mgd.step.step import StepResult
from mgd.sweep.damage import ADVICE, Key, check_layout, layout_of, naming_the_step
from mgd_kernels import Arena, OptimizerState
from mgd_kernels.arena import Stretch

if TYPE_CHECKING:
    from mgd_kernels.store import Store
    from mgd_kernels.store.zero_copy import Reservation

VIEWED = 3  # gradients viewed or read at a time, to advance over them in one pass


class Listener(Protocol):
    """Hears what happens to stored entries, and knows what the plan will read."""

    def put(self, key: Key) -> None: ...

    def got(self, key: Key) -> None: ...

    def removed(self, key: Key) -> None: ...

    def reads_again(self, key: Key) -> bool:
        """Whether the entry, which is being read, will be read once more, as far as can be seen."""
        ...


@dataclass
class Snapshot:
    state: OptimizerState
    buffers: Buffers


class History:
    """The log and the snapshots of one sweep.

    constants: the buffers before the first step. One that the training never replaces is held once, here.
    microbatches: evaluations per step. layout: of flat buffers, this process's part. store: holds the entries of all
    tiers but those `in_memory`. durable: the entries outlive the process: each is whole (it refers to no constants),
    and what is removed stays on disk until `delete_pending`.
    """

    def __init__(
        self,
        constants: Buffers,
        microbatches: int,
        *,
        layout: Arena | Stretch | None = None,
        store: Store | None = None,
        in_memory: Iterable[str] = (),
        durable: bool = False,
    ):
        self.constants, self.microbatches, self.store, self.durable = constants, microbatches, store, durable
        self.listener: Listener | None = None
        self._layout, self._in_memory = layout, frozenset(in_memory)
        self._scratch: list[Tensor] = []  # what was read into these is valid until the next such read
        self._on_device = layout is not None and layout.device.type != "cpu"
        self._viewing = store is not None and layout is not None and not self._on_device
        self._spare = 2 * sum(_room(b) for b in constants.values()) + 8 * microbatches + 64
        self._pending: set[Key] = set()
        self._gradients: dict[int, StepResult] = {}  # in memory, as are these
        self._snapshots: dict[int, Snapshot] = {}
        self._names: dict[Key, list[tuple[str, ...]]] = {}  # of stored entries: the buffers that are not constants

    def stores(self, tier: str) -> bool:
        """Whether entries of this tier are in the store, rather than held as they are."""
        return tier not in self._in_memory

    def stored(self, key: Key) -> bool:
        """Whether the store has the entry."""
        return key in self._names

    # --- the log -----------------------------------------------------------------------------------------------

    def entry(self, t: int, tier: str | None) -> Entry:
        """The log entry of step `t`, to be computed inside the block and committed; None: the step is not logged."""
        return Entry(self, t, tier)

    def hold(self, t: int, result: StepResult) -> None:
        """Keep what the evaluation of step `t` left behind as it is, as a log entry on no tier."""
        self._gradients[t] = result

    def logged(self, t: int) -> bool:
        return t in self._gradients or ("gradient", t) in self._names

    def run(self, start: int, stop: int) -> list[StepResult]:
        """Logged steps from `start` on, at least one: as many as lie in memory, or a few from the store."""
        run: list[StepResult] = []
        copied = 0  # into places of their own
        for t in range(start, stop):
            step = self._gradients.get(t)
            if step is None and ("gradient", t) in self._names and len(run) < VIEWED:
                step = self._view(t)
                if step is None and self._on_device:
                    step, copied = self._copied(t, copied), copied + 1
            if step is None:
                break
            run.append(step)
        return run or [self.read(start)]

    def read(self, t: int) -> StepResult:
        """The log entry of step `t`."""
        return self._gradients.get(t) or self._view(t) or self._copied(t, 0)

    def _copied(self, t: int, place: int) -> StepResult:
        """The log entry of step `t`, copied to one of the places for that."""
        if not self._scratch:
            layout = self._layout
            assert layout is not None
            count = VIEWED if self._on_device else 1
            block = torch.zeros(count, layout.numel, dtype=layout.gradient_dtype, device=layout.device)
            self._scratch = list(block.unbind())  # at even distances, as kernels like it
        gradient = self._scratch[place]
        losses = torch.empty(self.microbatches, dtype=torch.float64, device=gradient.device)
        return StepResult(gradient, losses, self._get(("gradient", t), [gradient, losses]))

    def _view(self, t: int) -> StepResult | None:
        """The log entry of step `t` in the store's buffer, until the gradient is let go of; None where it must copy."""
        key = ("gradient", t)
        if not self._viewing or key not in self._names:
            return None
        with naming_the_step(key):
            viewed = self._entries.view(key, self._reads_again(key))
            if viewed is None:
                return None
            buffers = [self.constants[name] for changed in self._names[key] for name in changed]
            assert self._layout is not None
            gradient = (self._layout.gradient_dtype, (self._layout.numel,))
            losses = (torch.float64, (self.microbatches,))
            check_layout(key, layout_of(viewed), [gradient, losses, *layout_of(buffers)])
        if self.listener is not None:
            self.listener.got(key)
        rest = (b.clone() for b in viewed[2:])  # buffers outlive the step
        histories = [self.constants | {name: next(rest) for name in changed} for changed in self._names[key]]
        return StepResult(viewed[0], viewed[1].clone(), histories)

    def forget(self, t: int) -> None:
        self._remove(("gradient", t))

    # --- snapshots ---------------------------------------------------------------------------------------------

    def save(self, state: OptimizerState, buffers: Buffers, tier: str) -> None:
        """Copy the state at its step."""
        if self.stores(tier):
            self._put(("snapshot", state.step), list(state.tensors()), [buffers], tier)
        else:
            self._snapshots[state.step] = Snapshot(state.clone(), buffers)

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

    def _put(
        self, key: Key, tensors: list[Tensor], histories: list[Buffers], tier: str, reserved: Reservation | None = None
    ) -> None:
        whole, evaluated = self.durable, key[0] == "gradient"  # nobody writes to what an evaluation has left
        names = [tuple(n for n, b in buffers.items() if whole or b is not self.constants[n]) for buffers in histories]
        extra = [buffers[n] for buffers, changed in zip(histories, names, strict=True) for n in changed]
        with naming_the_step(key):
            self._entries.check()  # a write that failed meanwhile: the training need not go on
            if reserved is not None and tensors[0] is reserved.tensor:
                self._entries.commit(key, reserved, tensors[1:] + extra)
            else:
                self._entries.put(key, tensors + extra, tier, unchanging=evaluated)
        self._names[key] = names
        self._pending.discard(key)
        if self.listener is not None:
            self.listener.put(key)

    def _get(self, key: Key, out: list[Tensor]) -> list[Buffers]:
        """Fill `out` with the entry's first tensors, and return its buffers."""
        if key not in self._names:
            place = self._entries.stats()["disk"]["directory"]
            raise CorruptState(key, None, f"expected it in {place}; got no such file", ADVICE)
        histories = [
            self.constants | {name: torch.empty_like(self.constants[name]) for name in changed}
            for changed in self._names[key]
        ]
        rest = [b[name] for b, changed in zip(histories, self._names[key], strict=True) for name in changed]
        with naming_the_step(key):
            check_layout(key, self._entries.layout(key), layout_of([*out, *rest]))
            self._entries.get(key, out=[*out, *rest], again=self._reads_again(key))
        if self.listener is not None:
            self.listener.got(key)
        return histories

    def _reads_again(self, key: Key) -> bool:
        return self.listener is not None and self.listener.reads_again(key)

    def _remove(self, key: Key) -> None:
        held: dict[int, Any] = self._gradients if key[0] == "gradient" else self._snapshots
        if held.pop(key[1], None) is None and self._names.pop(key, None) is not None:
            if self.listener is not None:
                self.listener.removed(key)
            if self.durable:
                self._pending.add(key)
            else:
                self._entries.delete(key)

    # --- across processes --------------------------------------------------------------------------------------

    def adopt(self, keys: Iterable[Key]) -> None:
        """Take over the entries that an earlier process left in the store."""
        for key in keys:
            histories = 2 if key[0] == "gradient" else 1  # before the step and after it
            self._names[key] = [tuple(self.constants)] * histories

    def discard_after(self, step: int) -> None:
        """Remove what an earlier process wrote after it had reached this step."""
        for kind, t in list(self._names):
            if t > step or (kind, t) == ("gradient", step):
                self._remove((kind, t))
        self.delete_pending()

    def delete_pending(self) -> None:
        """Delete what was removed: no checkpoint refers to it any more."""
        for key in self._pending:
            self._entries.delete(key)
        self._pending.clear()

    @property
    def pending_snapshots(self) -> int:
        """Snapshots that were removed and still take room."""
        return sum(kind == "snapshot" for kind, _ in self._pending)

    # --- the end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of everything. A durable history then raises the error of a write that failed."""
        self._gradients.clear()
        self._snapshots.clear()
        self._names.clear()
        self.listener = None
        if self.store is not None:
            self.store.close()

    @contextlib.contextmanager
    def closed_after_errors(self) -> Iterator[None]:
        """Closes the history when the block fails; the block's error is the one to hear of."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(StoreIOError):
                self.close()
            raise

    def stats(self) -> dict[str, Any] | None:
        """What the store did, or None where there was none."""
        return None if self.store is None else self.store.stats()


class Entry:
    """A log entry while it is made.

    gradient: memory of the store in which to compute the gradient, flat `[n]`; None: anywhere.
    """

    __slots__ = ("_history", "_reserved", "_tier", "gradient", "step")

    def __init__(self, history: History, step: int, tier: str | None):
        self._history, self.step, self._tier = history, step, tier
        self._reserved: Reservation | None = None
        self.gradient: Tensor | None = None

    def __enter__(self) -> Entry:
        history, layout = self._history, self._history._layout
        if self._tier is not None and history._viewing and (self._tier == "disk" or history.durable):
            assert layout is not None
            self._reserved = history._entries.reserve([layout.numel], layout.gradient_dtype, history._spare)
            self.gradient = None if self._reserved is None else self._reserved.tensor
        return self

    def commit(self, result: StepResult) -> None:
        """Keep what the evaluation left behind, if the step is logged."""
        history, t = self._history, self.step
        if self._tier is None:
            return
        if history.stores(self._tier):
            tensors = [result.gradient, result.losses]
            history._put(("gradient", t), tensors, result.buffers, self._tier, self._reserved)
        else:
            history.hold(t, result)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reserved = self.gradient = None


def _room(tensor: Tensor) -> int:
    """The most bytes that a tensor takes in an entry."""
    return tensor.nbytes + 64
