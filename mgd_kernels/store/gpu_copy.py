"""Copies between a GPU and the store's host buffers: pinned memory, a side stream, one event per chunk.

The host waits for none of them. What is put is on its way when `put` returns, and a chunk goes to the store's threads,
which compute its checksum and write it, once its event has come to pass; every later call looks. What is got is there
for all that is launched on the current stream afterwards. No buffer is used for anything else before the event of the
copy that fills or reads it.

The buffers are the pool's own, of exact size, pinned in place by ``cudaHostRegister`` (torch's pinned allocator rounds
up to powers of two). A thread never waits for a free buffer while copies hold some: it waits for the oldest of them.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mgd_kernels.errors import BadArgument
from mgd_kernels.memory import as_bytes

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
AHEAD = 2  # entries on their way to the host, at most: their tensors take memory of the device until they are there


@dataclass(eq=False)
class _Arriving:
    """An entry on its way to the host. chunks: what is left of it, each with its buffer and its event, in order.
    whole: all of its copies have been launched. wanted: it is to be prefetched once it is stored."""

    name: bytes
    put: Any
    tensors: Sequence[torch.Tensor]
    chunks: deque[tuple[int, Any, Any]] = field(default_factory=deque)
    whole: bool = False
    wanted: bool = False


class DeviceCopies:
    """The GPU's side of one store; idle until the first GPU tensor comes. waited: how often the host had to wait."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._streams: dict[torch.device, Any] = {}
        self._pinning: _Pinning | None = None
        self._arriving: deque[_Arriving] = deque()
        self._leaving: deque[tuple[Any, Any]] = deque()  # buffers that a GPU reads, each with its event
        self._lock = threading.RLock()
        self.waited = 0
        if torch.cuda.is_available():
            self._pinning = _Pinning()
            core.set_hooks(self._pinning.mapped, self._pinning.unmapping)

    def put(
        self,
        name: bytes,
        sequence: bool,
        tensors: Sequence[torch.Tensor],
        layout: list[tuple[int, Any]],
        tier: str,
        unchanging: bool = False,
    ) -> None:
        """Begins to copy the tensors (contiguous, on one GPU or the CPU) into a new entry.

        unchanging: nobody writes to the tensors any more; they are held until they are copied. Otherwise the current
        stream goes on only then.
        """
        device = _one_gpu(tensors)
        with self._lock:
            side, current = self._stream(device), torch.get_device_module(device).current_stream(device)
            self.settle(name)
            while len(self._arriving) >= AHEAD:
                self._finish_oldest()
            sources = [as_bytes(t) for t in tensors]
            entry = _Arriving(name, self._core.begin_put(name, sequence, layout, tier), tensors)
            self._arriving.append(entry)

            def copy(chunk: int, host: Any) -> None:
                for i, start, at, n in entry.put.pieces(chunk):
                    host[at : at + n].copy_(sources[i][start : start + n], non_blocking=True)

            buffer: Any = None
            try:
                side.wait_stream(current)  # what computed the tensors
                for chunk in range(entry.put.chunks):
                    buffer = self._free(partial(entry.put.buffer, chunk))
                    entry.chunks.append((chunk, buffer, _launched(copy, chunk, buffer, side)))
            except BaseException:
                side.synchronize()  # the buffers go back to the pool only when nothing writes to them
                self._arriving.remove(entry)
                entry.chunks.clear()
                buffer = None  # the traceback would keep it
                entry.put.abort()
                raise
            entry.whole = True
            if not unchanging:
                current.wait_stream(side)
            self.look()

    def get(self, name: bytes, targets: list[torch.Tensor]) -> None:
        """Fills the targets (contiguous, on one GPU or the CPU) from an entry, before what the current stream does
        next."""
        device = _one_gpu(targets)
        with self._lock:
            side, current = self._stream(device), torch.get_device_module(device).current_stream(device)
            self.settle(name)
            sinks, get = [as_bytes(t) for t in targets], self._core.begin_get(name)

            def copy(chunk: int, host: Any) -> None:
                for i, start, at, n in get.pieces(chunk):
                    sinks[i][start : start + n].copy_(host[at : at + n], non_blocking=True)

            buffer: Any = None
            try:
                side.wait_stream(current)  # what still reads the targets' memory
                for chunk in range(get.chunks):
                    buffer = self._free(partial(get.chunk, chunk))
                    self._leaving.append((buffer, _launched(copy, chunk, buffer, side)))
            finally:
                buffer = None  # the traceback of an error would keep it
                current.wait_stream(side)
                get.end()
            self.look()

    def prefetch(self, names: Sequence[bytes]) -> None:
        """As the store's own; entries that are on their way are read once they are stored."""
        with self._lock:
            arriving = {entry.name: entry for entry in self._arriving}
            for name in arriving.keys() & set(names):
                arriving[name].wanted = True
            self._core.prefetch([name for name in names if name not in arriving])

    def look(self) -> None:
        """Hand on what has arrived, and let go of what has left. Waits for nothing."""
        with self._lock:
            while self._leaving and self._leaving[0][1].query():
                self._leaving.popleft()
            while self._arriving and self._arriving[0].whole:
                chunks = self._arriving[0].chunks
                if chunks and not chunks[0][2].query():
                    return
                self._store_next()

    def settle(self, name: bytes | None = None) -> None:
        """Wait until an entry, or everything, has arrived; everything has then left, too."""
        with self._lock:
            while self._arriving and (name is None or any(entry.name == name for entry in self._arriving)):
                self._store_next()
            while self._leaving and name is None:
                self._finish_oldest()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """In the block no copy holds a buffer, nor begins to: its caller may wait for one."""
        with self._lock if self._streams else contextlib.nullcontext():
            self.settle()
            yield

    def give_up(self) -> None:
        """Let go of everything, also where a device does not answer any more."""
        with self._lock, contextlib.suppress(Exception):
            for side in self._streams.values():
                side.synchronize()
        for entry in self._arriving:
            entry.put.abort()
        self._arriving.clear()
        self._leaving.clear()

    def _free(self, acquire: Callable[[bool], Any]) -> Any:
        """A buffer. acquire: of one argument, whether to wait for it."""
        while True:
            held = bool(self._leaving) or any(entry.chunks for entry in self._arriving)
            if (buffer := acquire(not held)) is not None:
                return buffer
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        """Wait for the oldest copy of either kind."""
        if self._leaving:
            self._wait(self._leaving[0][1])
            self._leaving.popleft()
        else:
            self._store_next()

    def _store_next(self) -> None:
        """Hand the oldest chunk that is arriving to the store; after the last one, its entry is stored."""
        entry = self._arriving[0]
        if entry.chunks:
            chunk, buffer, copied = entry.chunks[0]
            self._wait(copied)
            entry.chunks.popleft()
            entry.put.commit(chunk, buffer)
        if entry.whole and not entry.chunks:
            self._arriving.popleft()
            entry.put.close()
            if entry.wanted:
                self._core.prefetch([entry.name])

    def _wait(self, event: Any) -> None:
        if not event.query():
            self.waited += 1
            event.synchronize()

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


def _launched(copy: Callable[[int, Any], None], chunk: int, buffer: Any, side: Any) -> Any:
    """Launch the copies of a chunk on the side stream. Returns the event after them."""
    module = torch.get_device_module(side.device)
    with module.stream(side):
        copy(chunk, torch.frombuffer(buffer, dtype=torch.uint8))
    event = module.Event(blocking=True)  # who waits for it sleeps
    event.record(side)
    return event


def _one_gpu(tensors: Sequence[torch.Tensor]) -> torch.device:
    devices = {t.device for t in tensors if t.device.type != "cpu"}
    if len(devices) != 1:
        raise BadArgument(f"expected the tensors of one entry on the CPU and one GPU; got {sorted(map(str, devices))}")
    return devices.pop()
