"""The state store against raw direct I/O on the same disk, alternating in one run.

Raw is the better of two ways to move the same files with nothing but O_DIRECT: one thread and one call per file, or two
threads and 4 MiB per call. Both sides create, fill and close the files; contents that were timed are compared.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from mgd_kernels.store import Store

SIZES = {"64 KB": 64 << 10, "4 MB": 4 << 20, "64 MB": 64 << 20}
PIECE = 4 << 20


class RawFiles:
    """Files of one size written and read through O_DIRECT, from one page-aligned buffer per thread."""

    def __init__(self, directory: str, size: int, count: int) -> None:
        self.directory, self.size, self.count = directory, size, count
        self.memory = mmap.mmap(-1, size)
        self.memory.write(os.urandom(min(size, 1 << 20)) * max(1, size >> 20))
        self.view = memoryview(self.memory)
        self.threads = ThreadPoolExecutor(2)
        self.direct = getattr(os, "O_DIRECT", 0)

    def _move(self, i: int, flags: int, call: Callable[..., int], in_pieces: bool) -> None:
        fd = os.open(os.path.join(self.directory, f"raw-{i}"), flags | self.direct, 0o666)
        try:
            if flags & os.O_CREAT:
                os.posix_fallocate(fd, 0, self.size)
            spans = range(0, self.size, PIECE) if in_pieces else [0]
            piece = PIECE if in_pieces else self.size

            def one(at: int) -> None:
                end = min(self.size, at + piece)
                part = self.view[at:end]
                done = call(fd, [part], at) if call is os.preadv else call(fd, part, at)
                assert done == end - at

            list(self.threads.map(one, spans)) if in_pieces else one(0)
        finally:
            os.close(fd)

    def write(self, in_pieces: bool) -> None:
        for i in range(self.count):
            self._move(i, os.O_RDWR | os.O_CREAT | os.O_EXCL, os.pwrite, in_pieces)

    def read(self, in_pieces: bool) -> None:
        for i in range(self.count):
            self._move(i, os.O_RDONLY, os.preadv, in_pieces)

    def remove(self) -> None:
        for i in range(self.count):
            os.remove(os.path.join(self.directory, f"raw-{i}"))


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(directory: str | os.PathLike[str], size: int, total: int | None = None, rounds: int = 5) -> dict[str, Any]:
    """Medians over `rounds` of: bandwidths in bytes per second, raw and store, both ways; seconds of one call.

    Writes about `total` bytes (a size in proportion by default, 512 MB at most) twice under `directory`, and removes
    them. `write_ratio` and `read_ratio` are medians of the rounds' own ratios. `put_call` and `get_call` are one call
    on an idle store, `raw_write_call` and `raw_read_call` one raw file; `get_call` reads from disk.
    """
    count = max(2, (total or min(512 << 20, max(16 << 20, 32 * size))) // size)
    columns: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        columns.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory(dir=directory, prefix="bench-store-") as scratch:
        raw = RawFiles(scratch, size, count)
        source = torch.frombuffer(raw.memory, dtype=torch.uint8).clone()
        out = torch.zeros_like(source)
        host = max(64 << 20, 4 * size)
        with Store(host=host, staging=host, disk=(scratch, 4 << 30), threads=2) as store:
            keys = [("gradient", i) for i in range(count)]

            def put_all() -> None:
                for key in keys:
                    store.put(key, source, tier="disk")
                store.flush()

            def get_all() -> None:
                store.prefetch(reversed(keys))
                for key in reversed(keys):
                    store.get(key, out=out)

            for round_ in range(rounds + 1):  # the first round maps buffers and is not counted
                seconds = {}
                for way in (False, True):
                    seconds["raw_write", way] = _timed(partial(raw.write, way))
                    seconds["raw_read", way] = _timed(partial(raw.read, way))
                    raw.remove()
                write, read = _timed(put_all), _timed(get_all)
                if not torch.equal(out, source):
                    raise AssertionError("the store returned other bytes than it was given")
                store.delete(keys[0])
                put_call = _timed(lambda: store.put(keys[0], source, tier="disk"))
                store.flush()
                get_call = _timed(lambda: store.get(keys[0], out=out))
                for key in keys:
                    store.delete(key)
                if round_ == 0:
                    continue
                best = {w: min(seconds[w, False], seconds[w, True]) for w in ("raw_write", "raw_read")}
                moved = size * count
                note("raw_write", moved / best["raw_write"])
                note("raw_read", moved / best["raw_read"])
                note("write", moved / write)
                note("read", moved / read)
                note("write_ratio", best["raw_write"] / write)
                note("read_ratio", best["raw_read"] / read)
                note("put_call", put_call)
                note("get_call", get_call)
                note("raw_write_call", best["raw_write"] / count)
                note("raw_read_call", best["raw_read"] / count)
            io = store.stats()["disk"]["io"]
    result: dict[str, Any] = {name: statistics.median(values) for name, values in columns.items()}
    return {"size": size, "count": count, "rounds": rounds, "io": io, **result}
