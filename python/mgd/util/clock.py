"""How long a block takes where its work is done: by the host's clock, or by events of an accelerator."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Clock:
    """Times blocks of work for a device. The host only launches what an accelerator does: its time is between two
    events on the current stream, which are looked at once they have come to pass. Nobody waits for them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._waiting: deque[tuple[Any, Any, Callable[[float], None]]] = deque()
        self._spare: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def timed(self, note: Callable[[float], None]) -> Iterator[None]:
        """Calls `note` with the seconds of the block, then or in a later call of `look`; not where it raises."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            yield
            note(time.perf_counter() - start)
            return
        module = torch.get_device_module(self.device)
        stream = module.current_stream(self.device)
        begin, end = self._spare.pop() if self._spare else [module.Event(enable_timing=True) for _ in range(2)]
        begin.record(stream)
        yield
        end.record(stream)
        self._waiting.append((begin, end, note))

    def look(self) -> None:
        """Note what the device has timed by now."""
        while self._waiting and self._waiting[0][1].query():
            begin, end, note = self._waiting.popleft()
            note(begin.elapsed_time(end) / 1e3)
            self._spare.append((begin, end))
