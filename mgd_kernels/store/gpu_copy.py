"""Copies between a GPU and the store's host buffers: pinned memory, a side stream, one event per chunk.

The buffers are the pool's own, of exact size, pinned in place by ``cudaHostRegister`` (torch's pinned allocator rounds
up to powers of two). A thread never waits for a free buffer while it holds one: it finishes its own copies first.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import torch

from mgd_kernels.errors import BadArgument

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class DeviceCopies:
    """The GPU's side of one store; idle until the first GPU tensor comes."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._streams: dict[torch.device, torch.Stream] = {}
        self._pinning: _Pinning | None = None
        self._lock = threading.Lock()
        if torch.cuda.is_available():
            self._pinning = _Pinning()
            core.set_hooks(self._pinning.mapped, self._pinning.unmapping)

    def put(
        self, name: bytes, sequence: bool, tensors: list[torch.Tensor], layout: list[tuple[int, Any]], tier: str
    ) -> None:
        """Copies the tensors (contiguous, on one GPU or the CPU) into a new entry; returns when they are copied."""
        device = _one_gpu(tensors)
        module, side = torch.get_device_module(device), self._stream(device)
        sources = [_as_bytes(t) for t in tensors]
        put = self._core.begin_put(name, sequence, layout, tier)
        in_flight: deque[tuple[int, Any, torch.Event]] = deque()
        buffer: Any = None
        host: Any = None

        def commit_oldest() -> None:
            chunk, buffer, copied = in_flight.popleft()
            copied.synchronize()
            put.commit(chunk, buffer)

        try:
            side.wait_stream(module.current_stream(device))  # what computed the tensors
            with module.stream(side):
                for chunk in range(put.chunks):
                    buffer = put.buffer(chunk, not in_flight)
                    while buffer is None:
                        commit_oldest()
                        buffer = put.buffer(chunk, not in_flight)
                    host = torch.frombuffer(buffer, dtype=torch.uint8)
                    for i, start, at, n in put.pieces(chunk):
                        host[at : at + n].copy_(sources[i][start : start + n], non_blocking=True)
                    in_flight.append((chunk, buffer, _record(side)))
                while in_flight:
                    commit_oldest()
            put.close()
        finally:
            if in_flight:  # after an error: the buffers go back to the pool only when nothing writes to them
                side.synchronize()
                in_flight.clear()
            buffer = host = None  # the traceback of an error would keep them
            put.abort()

    def get(self, name: bytes, targets: list[torch.Tensor]) -> None:
        """Fills the targets (contiguous, on one GPU or the CPU) from an entry; returns when they are filled."""
        device = _one_gpu(targets)
        module, side = torch.get_device_module(device), self._stream(device)
        sinks = [_as_bytes(t) for t in targets]
        get = self._core.begin_get(name)
        in_flight: deque[tuple[Any, torch.Event]] = deque()
        buffer: Any = None
        host: Any = None
        try:
            side.wait_stream(module.current_stream(device))  # what still reads the targets' memory
            with module.stream(side):
                for chunk in range(get.chunks):
                    while in_flight and in_flight[0][1].query():
                        in_flight.popleft()
                    buffer = get.chunk(chunk, not in_flight)
                    while buffer is None:
                        in_flight.popleft()[1].synchronize()
                        buffer = get.chunk(chunk, not in_flight)
                    host = torch.frombuffer(buffer, dtype=torch.uint8)
                    for i, start, at, n in get.pieces(chunk):
                        sinks[i][start : start + n].copy_(host[at : at + n], non_blocking=True)
                    in_flight.append((buffer, _record(side)))
        finally:
            side.synchronize()
            in_flight.clear()
            buffer = host = None  # the traceback of an error would keep them
            get.end()

    def report(self) -> str:
        """Whether the host buffers are pinned, and why not."""
        return "no: no GPU" if self._pinning is None else self._pinning.report()

    def _stream(self, device: torch.device) -> Any:
        with self._lock:
            if device not in self._streams:
                self._streams[device] = torch.get_device_module(device).Stream(device)
                if self._pinning is not None and device.type == "cuda" and self._pinning.device is None:
                    self._pinning.device = device
                    self._core.trim()  # buffers that were mapped before are mapped again, pinned
            return self._streams[device]


class _Pinning:
    """The hooks of the buffer pool; they run in any thread, once for each piece of memory."""

    def __init__(self) -> None:
        self.device: torch.device | None = None  # whose driver context registers; none until a GPU tensor comes
        self._pinned: set[int] = set()
        self._why = ""

    def mapped(self, address: int, size: int) -> None:
        if self.device is None or self._why:
            return
        with torch.cuda.device(self.device):  # a thread of the store's has none of its own
            error = torch.cuda.cudart().cudaHostRegister(address, size, _PORTABLE)
        if int(error) == 0:
            self._pinned.add(address)
        else:
            self._why = f"cudaHostRegister answered {error}"  # copies then pass through the driver's own buffers

    def unmapping(self, address: int, size: int) -> None:
        if address in self._pinned:
            self._pinned.remove(address)
            torch.cuda.cudart().cudaHostUnregister(address)

    def report(self) -> str:
        if self.device is None:
            return "no: no GPU tensor was stored yet"
        return f"no: {self._why}" if self._why else "yes"


def _record(stream: Any) -> Any:
    event = torch.get_device_module(stream.device).Event(blocking=True)  # who waits for it sleeps
    event.record(stream)
    return event


def _one_gpu(tensors: list[torch.Tensor]) -> torch.device:
    devices = {t.device for t in tensors if t.device.type != "cpu"}
    if len(devices) != 1:
        raise BadArgument(f"expected the tensors of one entry on the CPU and one GPU; got {sorted(map(str, devices))}")
    return devices.pop()


def _as_bytes(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(torch.uint8)
