"""The threads of an operator that is made of many products: the same bits for any number of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

_alone = threading.Lock()


class Team:
    """threads: how many take part."""

    def __init__(self, threads: int, pool: ThreadPoolExecutor | None):
        self.threads, self._pool = threads, pool

    def each(self, work: Callable[[Any], Any], pieces: Sequence[Any]) -> list[Any]:
        """work(piece) of all pieces, in their order. The pieces must follow from shapes alone, and what one writes no
        other may read or write."""
        if self._pool is None:
            return [work(piece) for piece in pieces]
        return list(self._pool.map(work, pieces))


@contextmanager
def team(device: torch.device | None = None) -> Iterator[Team]:
    """All of torch's threads, each with products of its own: a product of torch's on several threads may round
    otherwise than on one. Only this thread, where the work is that of a device other than a CPU. Outside autograd and
    the modes of the caller."""
    with _alone, torch.no_grad(), torch._C.DisableTorchFunction():
        threads = torch.get_num_threads()
        if threads == 1 or (device is not None and device.type != "cpu"):
            yield Team(1, None)
            return
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads, initializer=_start) as pool:
                yield Team(threads, pool)
        finally:
            torch.set_num_threads(threads)


def _start() -> None:
    """Both are settings of each thread."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def spans(total: int, step: int) -> list[slice]:
    """Slices of `range(total)`, `step` long but for the last."""
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
