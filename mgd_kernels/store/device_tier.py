"""The store's tier in the memory of the device."""

from __future__ import annotations

import threading

import torch

from mgd_kernels.errors import StoreFull


class DeviceTier:
    """Clones on the tensors' own device, under a byte limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.peak = limit, 0, 0
        self._entries: dict[bytes, tuple[bool, list[torch.Tensor]]] = {}
        self._lock = threading.Lock()

    def put(self, name: bytes, sequence: bool, tensors: list[torch.Tensor]) -> None:
        needs = sum(t.nbytes for t in tensors)
        with self._lock:
            if needs > self.limit - self.used:
                raise StoreFull(needs, self.limit - self.used, "device")
            self.used += needs
            self.peak = max(self.peak, self.used)
        try:
            copies = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        except BaseException:
            with self._lock:
                self.used -= needs
            raise
        self.drop(name)
        with self._lock:
            self._entries[name] = (sequence, copies)

    def get(self, name: bytes) -> tuple[bool, list[torch.Tensor]] | None:
        return self._entries.get(name)

    def drop(self, name: bytes) -> bool:
        with self._lock:
            entry = self._entries.pop(name, None)
            if entry is not None:
                self.used -= sum(t.nbytes for t in entry[1])
            return entry is not None

    def names(self) -> list[bytes]:
        return list(self._entries)

    def clear(self) -> None:
        for name in self.names():
            self.drop(name)
