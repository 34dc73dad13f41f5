"""A recorder of device graphs without a device: it does what a CUDA graph would do, operator by operator.

What is recorded is operators with their arguments: tensors, which stand for their addresses, and numbers, as they were.
Nothing is computed while it is recorded, and a replay computes into the memory of the recording. What a replay computed
in memory of its own is overwritten when it is done, as others compute there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mgd.autodiff import device_graphs
from mgd.autodiff.cuda_graphs import settings


class Emulated:
    """See `mgd.autodiff.device_recording.Recorder`. made, replays: of all of them. failing: recordings raise."""

    alignment = 64
    made = replays = 0
    failing: Exception | None = None

    def __init__(self, device: torch.device):
        self.device, self.held = device, 0

    def settings(self) -> Hashable:
        return settings()

    def random_state(self) -> Tensor:  # a pretended device draws the CPU's
        return torch.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        tape, state = _Tape(), torch.get_rng_state()
        with tape:
            run()
            if self.failing is not None:
                raise self.failing
        torch.set_rng_state(state)
        for x in tape.written:
            _spoil(x)
        tape.spoil()
        Emulated.made += 1
        self.held += sum([x.untyped_storage().nbytes() for x in tape.own])
        return tape.replay


class _Tape(TorchDispatchMode):
    """own: tensors with memory of the recording. written: those of others that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any], Any]] = []
        self.own: list[Tensor] = []
        self.written: list[Tensor] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, results))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        others = {_memory(x) for x in given} - self._known
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and _memory(x) not in self._known | others:
                self._known.add(_memory(x))
                self.own.append(x)
        if func._schema.is_mutable:
            self.written += [x for x in tree_leaves(args[0]) if _memory(x) in others]
        return results

    def replay(self) -> None:
        Emulated.replays += 1
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for x, y in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(x, Tensor) and _memory(x) != _memory(y):
                    _whole(x).copy_(_whole(y))
        self.spoil()

    def spoil(self) -> None:
        for x in self.own:
            _spoil(x)


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _whole(x: Tensor) -> Tensor:
    """All of a tensor's memory, as bytes."""
    whole = torch.empty(0, dtype=torch.uint8, device=x.device)
    return whole.set_(x.untyped_storage())


def _spoil(x: Tensor) -> None:
    _whole(x).fill_(0xFF)  # NaNs, and numbers that are no index


@contextlib.contextmanager
def emulated(device: str, recorder: type[Emulated] = Emulated) -> Iterator[type[Emulated]]:
    """In the block, steps that are captured have device graphs on devices of this type."""
    before = dict(device_graphs.RECORDERS)
    device_graphs.RECORDERS[device] = recorder
    Emulated.made = Emulated.replays = 0
    try:
        yield recorder
    finally:
        device_graphs.RECORDERS.clear()
        device_graphs.RECORDERS.update(before)
