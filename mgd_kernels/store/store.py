"""The state store: tensors written once and read back in a known order, from device memory, host memory and disk.

>>> from mgd_kernels import Store
>>> with Store(host=2 << 30, disk=("runs/log", 100 << 30)) as store:
...     store.put(("grad", 0), gradient)  # copied; a thread writes it
...     store.prefetch([("grad", 1), ("grad", 0)])  # read ahead in this order
...     gradient = store.get(("grad", 0))  # bit-equal, or an error

The work is done in C++ (csrc/store); the file format is docs/format.md.
"""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mgd_kernels.errors import BackendUnavailable, BadArgument, StoreClosed, StoreFull
from mgd_kernels.store.device_tier import DeviceTier
from mgd_kernels.store.format import CHUNK, DTYPE_OF, DTYPES, PAGE, Key, decode_key, encode_key
from mgd_kernels.store.gpu_copy import DeviceCopies
from mgd_kernels.store.zero_copy import Lent, leased_tensors

__all__ = ["CHUNK", "PAGE", "Key", "Store"]

Tensors = torch.Tensor | Sequence[torch.Tensor]

UNLIMITED = 1 << 62


class Store:
    """Tensors under keys, in the fastest tier that has room.

    Args:
        host: bytes of host memory: entries kept there, and the buffers through which others pass to and from disk.
            Never exceeded; at least 64 KiB where there is a disk tier.
        disk: ``(directory, bytes)``. A scratch directory is made inside and removed on close; those that a crash left
            there are removed on start.
        device: bytes of memory of the device the tensors are on (of plain memory, for CPU tensors).
        threads: threads that read and write.
        durable: every finished entry survives a power failure (fsync), rather than a crash of the process alone.
        staging: the part of ``host`` that only buffers use; a quarter of it by default, at least a few chunks, and
            nothing without a disk tier.

    A key is a text or ``(kind, step)``. A store may be used from several threads; what an entry holds while another
    thread replaces or deletes it is the old content, the new content, or an error.
    """

    def __init__(
        self,
        host: int = 0,
        disk: tuple[str | os.PathLike[str], int] | None = None,
        device: int | None = None,
        threads: int = 2,
        durable: bool = False,
        staging: int | None = None,
    ) -> None:
        self._start(host, disk, device, threads, durable, staging, persistent=False)

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        host: int = 256 << 20,
        limit: int | None = None,
        device: int | None = None,
        threads: int = 2,
        durable: bool = False,
        staging: int | None = None,
    ) -> Store:
        """The persistent store in ``directory``, made if there is none; it may fill ``limit`` bytes of disk.

        It holds exactly the disk entries that were complete when its last process ended. Entries that fit in host
        memory do not outlive the process, so ``tier=None`` means disk here.

        Raises:
            StoreBusy: another store has it open.
            UnknownFormat: the directory is something else, or of another version.
            StoreIOError: it cannot be made, read or written.
        """
        store = cls.__new__(cls)
        disk = (directory, UNLIMITED if limit is None else limit)
        store._start(host, disk, device, threads, durable, staging, persistent=True)
        return store

    def _start(
        self,
        host: int,
        disk: tuple[str | os.PathLike[str], int] | None,
        device: int | None,
        threads: int,
        durable: bool,
        staging: int | None,
        persistent: bool,
    ) -> None:
        for name, value in {"host": host, "device": device or 0, "disk": disk[1] if disk else 0}.items():
            if not isinstance(value, int) or value < 0:
                raise BadArgument(f"{name} is a number of bytes, 0 or more; {value!r} came")
        if disk and host < 16 * PAGE:
            raise BadArgument(f"a disk tier needs host buffers: host >= {16 * PAGE} expected, {host} came")
        if disk and not 1 <= threads <= 64:
            raise BadArgument(f"1 to 64 threads expected, {threads} came")
        if staging is None:
            staging = min(host, max(host // 4, 2 * (threads + 2) * CHUNK)) if disk else 0
        if not (16 * PAGE if disk else 0) <= staging <= host:
            raise BadArgument(f"staging lies between {16 * PAGE} bytes and host = {host}; {staging} came")
        # Small pools get small chunks: every thread should have one to work on while another is filled.
        room = staging if disk else max(host, PAGE)
        chunk = max(PAGE, min(CHUNK, room // (threads + 2) // PAGE * PAGE))
        try:
            core = importlib.import_module("mgd_kernels._core")
        except ImportError as error:
            raise BackendUnavailable(f"the store needs the package's C++ extension: {error}; reinstall it") from error
        self._core = core.TieredStore(
            host=host,
            staging=staging,
            chunk=chunk,
            directory=os.fsencode(disk[0]) if disk else b"",
            disk=disk[1] if disk else 0,
            persistent=persistent,
            durable=durable,
            threads=threads,
        )
        self._finalizer = weakref.finalize(self, _close_quietly, self._core)
        self._owner = os.getpid()
        self._host, self._disk, self._persistent = host, disk is not None, persistent
        self._device = DeviceTier(device or 0)
        self._devices: dict[bytes, list[torch.device]] = {}  # where an entry's tensors were, if not all on the CPU
        self._copies = DeviceCopies(self._core)

    # --- entries

    def put(self, key: Key, tensors: Tensors, tier: str | None = None) -> None:
        """Copies one tensor or a list of them under ``key``, replacing what was there.

        Returns when the copy is made; a thread writes it to disk afterwards. Waits while all buffers are in use.
        A write that fails later is told by :meth:`get` of that key, :meth:`check`, :meth:`flush` and :meth:`close`.

        Args:
            tensors: any shape; bfloat16, float16, float32, float64, int64, int32, int16, int8, uint8 or bool. Values,
                shape and dtype are kept, not strides.
            tier: ``"device"``, ``"host"``, ``"disk"``; ``None`` means the fastest that has room.

        Raises:
            StoreFull: no tier (that was asked for) has room; nothing was stored.
            BadArgument: a key or tensor of the wrong kind.
        """
        core, name = self._live(), encode_key(key)
        sequence = not isinstance(tensors, torch.Tensor)
        items = [_storable(t, i) for i, t in enumerate(tensors if sequence else [tensors])]
        layout = [(DTYPES[t.dtype], tuple(t.shape)) for t in items]
        if tier not in (None, "device", "host", "disk"):
            raise BadArgument(f"tier 'device', 'host', 'disk' or None expected, {tier!r} came")
        refusals: list[StoreFull] = []
        for candidate in [tier] if tier else ["disk"] if self._persistent else self._tiers():
            try:
                if candidate == "device":
                    self._device.put(name, sequence, items)
                    if core.contains(name):
                        core.remove(name)
                    return
                if all(t.device.type == "cpu" for t in items):
                    core.put(name, sequence, layout, [t.data_ptr() for t in items], candidate)
                    self._devices.pop(name, None)
                else:
                    self._copies.put(name, sequence, items, layout, candidate)
                    self._devices[name] = [t.device for t in items]
                self._device.drop(name)
                return
            except StoreFull as refusal:
                refusals.append(refusal)
        raise StoreFull(
            max((r.needs for r in refusals), default=sum(t.nbytes for t in items)),
            max((r.has for r in refusals), default=0),
            " or ".join(r.tier for r in refusals) or "any (the store has none)",
        )

    def get(
        self,
        key: Key,
        out: Tensors | None = None,
        device: torch.device | str | None = None,
        again: bool = False,
    ) -> torch.Tensor | list[torch.Tensor]:
        """What was put under ``key``, bit-equal: a tensor, or a list of them.

        Args:
            out: contiguous tensors of the stored dtypes and shapes to fill and return; after an error their contents
                are undefined.
            device: where to make the tensors, without ``out``; by default where they were put from, in this process.
            again: it will be got again soon: the buffers stay filled for that while nobody needs their room. What is
                in them is checked again.

        Raises:
            KeyError: nothing was put under this key.
            CorruptState: the file does not hold what was written.
            StoreIOError: reading failed, or the write that should have stored it did.
            UnknownFormat: the file is of another version.
        """
        core, name = self._live(), encode_key(key)
        stored = self._device.get(name)
        if stored is not None:
            sequence, sources = stored
            layout = [(DTYPES[t.dtype], tuple(t.shape)) for t in sources]
            default = [t.device for t in sources]
        else:
            _, sequence, layout = core.describe(name)
            default = self._devices.get(name) or [torch.device("cpu")] * len(layout)
        if out is None:
            where = default if device is None else [torch.device(device)] * len(layout)
            targets = [
                torch.empty(shape, dtype=DTYPE_OF[code], device=d)
                for (code, shape), d in zip(layout, where, strict=True)
            ]
        else:
            targets = _checked_targets(key, sequence, layout, out)
        if stored is not None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
        elif any(t.device.type != "cpu" for t in targets):
            self._copies.get(name, targets)
        else:
            core.get(name, [t.data_ptr() for t in targets], again)
        if out is not None:
            return out if isinstance(out, torch.Tensor) else list(out)
        return targets if sequence else targets[0]

    # --- entries without a copy

    def lend(self, shape: Sequence[int], dtype: torch.dtype, room: int = 0) -> Lent | None:
        """One of the buffers through which entries pass to the disk, to compute into and then :meth:`put_lent`.

        Its ``tensor`` has this shape and dtype, lies on the CPU and is not initialised. Waits for a free buffer.
        ``None`` without a disk tier, and where so much is lent and leased by now that the store could not go on.

        Args:
            room: bytes for further tensors of the entry, each with up to 64 more.
        """
        return Lent.of(self._live(), shape, dtype, room)

    def put_lent(self, key: Key, lent: Lent, others: Sequence[torch.Tensor] = ()) -> None:
        """Puts the list ``[lent.tensor, *others]`` on disk under ``key``, the first of them without a copy.

        The buffer is the store's from now on: ``lent.tensor`` may be read until it is let go of, and not written. What
        is written nevertheless never comes back as data: ``get`` of the key finds the entry damaged.

        Raises:
            StoreFull: the disk tier has no room; nothing was stored.
            BadArgument: the others need more room than was asked for, or the buffer was put before.
        """
        core, name = self._live(), encode_key(key)
        lent.put(core, name, [_storable(t, i + 1) for i, t in enumerate(others)])
        self._devices.pop(name, None)
        self._device.drop(name)

    def lease(self, key: Key, again: bool = False) -> list[torch.Tensor] | None:
        """An entry in the buffer into which it was read: the tensors on the CPU, to be read, and let go of soon.

        Until all of them are gone the buffer is not used for anything else. ``None`` where :meth:`get` has to copy: of
        entries that are not on disk, or not in one chunk (as those of :meth:`put_lent` are), and where so much is lent
        and leased by now that the store could not go on. ``again`` and the errors are those of :meth:`get`.
        """
        core, name = self._live(), encode_key(key)
        return None if self._device.get(name) is not None else leased_tensors(core, name, again)

    # --- what is where

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Starts to read these entries, in this order, as far as there are free buffers; the rest as buffers become
        free. Returns at once. Raises KeyError on a key that is not stored."""
        core = self._live()
        core.prefetch([name for name in map(encode_key, keys) if self._device.get(name) is None])

    def delete(self, key: Key) -> None:
        """Removes an entry, or raises KeyError."""
        core, name = self._live(), encode_key(key)
        self._devices.pop(name, None)
        if not self._device.drop(name):
            core.remove(name)

    def keys(self) -> list[Key]:
        """All keys, sorted by their spelling in the format. Damaged entries are among them: their get raises."""
        return [decode_key(name) for name in sorted({*self._live().keys(), *self._device.names()})]

    def tier(self, key: Key) -> str:
        """Where an entry is: ``"device"``, ``"host"`` or ``"disk"``."""
        core, name = self._live(), encode_key(key)
        return "device" if self._device.get(name) is not None else core.describe(name)[0]

    def __contains__(self, key: Key) -> bool:
        core, name = self._live(), encode_key(key)
        return self._device.get(name) is not None or core.contains(name)

    def __len__(self) -> int:
        return len(self.keys())

    # --- the whole store

    def flush(self) -> None:
        """Waits until everything is written; raises the error of a write that failed, until its key is deleted or
        stored again."""
        self._live().flush()

    def check(self) -> None:
        """Raises the error of a write that has failed by now, as :meth:`flush` does, but waits for nothing."""
        self._live().check()

    def close(self) -> None:
        """Waits for the writes, frees everything and lets go of the directory; a scratch directory is removed.

        A persistent store then raises the error of a write that failed. Closing twice does nothing.
        """
        self._device.clear()
        self._devices.clear()
        self._finalizer.detach()
        self._closed = True
        self._core.close()

    _closed = False

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # otherwise the first error is the one to hear of
                raise

    def stats(self) -> dict[str, Any]:
        """What the store holds and how fast it is.

        ``device``, ``host``, ``disk``: each ``limit`` and ``used`` bytes; ``disk`` also ``peak``, ``io`` ("direct" or
        "buffered"), ``why`` and ``directory``. ``pool``: the buffers of host memory: ``limit``, ``in_use``, ``mapped``
        and ``peak`` bytes, and how many requests were met by a ``reused`` buffer. ``handed``: entries put and
        got without a copy, ``lent`` and ``leased``. ``put``, ``get`` (copies in and
        out, waiting included), ``write`` and ``read`` (files): ``bytes``, busy ``seconds``, ``bandwidth`` in bytes a
        second. ``read_ahead``: chunks that were there when wanted (``hits``) and dropped for want of room (``drops``).
        """
        raw = self._live().stats()
        rates = {
            name: {**raw[name], "bandwidth": raw[name]["bytes"] / raw[name]["seconds"] if raw[name]["seconds"] else 0.0}
            for name in ("put", "get", "write", "read")
        }
        return {
            "entries": raw["entries"] + len(self._device.names()),
            "device": {"limit": self._device.limit, "used": self._device.used, "peak": self._device.peak},
            "host": {"limit": raw["host_limit"], "used": raw["host_used"]},
            "disk": {
                "limit": raw["disk_limit"],
                "used": raw["disk_used"],
                "peak": raw["disk_peak"],
                "io": "direct" if raw["direct"] else "buffered",
                "why": raw["why_buffered"],
                "directory": raw["directory"],
            },
            "pool": {name: raw["pool_" + name] for name in ("limit", "mapped", "in_use", "peak", "reused")},
            "read_ahead": {"hits": raw["read_ahead_hits"], "drops": raw["read_ahead_drops"]},
            "handed": {"lent": raw["lent"], "leased": raw["leased"]},
            "pinned": self._copies.report(),
            **rates,
        }

    def _tiers(self) -> list[str]:
        has = {"device": self._device.limit > 0, "host": self._host > 0, "disk": self._disk}
        return [name for name, there in has.items() if there]

    def _live(self) -> Any:
        if self._closed:
            raise StoreClosed("the store is closed; open a new one")
        if os.getpid() != self._owner:
            raise StoreClosed(f"the store belongs to process {self._owner}, not to a fork of it; open one here")
        return self._core


def _storable(t: Any, i: int) -> torch.Tensor:
    if not isinstance(t, torch.Tensor) or t.dtype not in DTYPES or t.layout is not torch.strided:
        what = f"{t.dtype}, {t.layout}" if isinstance(t, torch.Tensor) else type(t).__name__
        raise BadArgument(f"tensor {i}: a dense tensor of {', '.join(map(str, DTYPES))} expected, {what} came")
    if t.device.type not in ("cpu", "cuda"):
        raise BadArgument(f"tensor {i}: a tensor on cpu or cuda expected, {t.device} came")
    return t.detach().resolve_neg().contiguous()


def _checked_targets(key: Key, sequence: bool, layout: list[tuple[int, Any]], out: Tensors) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor) == sequence:
        raise BadArgument(f"out for {key!r}: {'a list' if sequence else 'one tensor'} expected, as was put")
    targets = [out] if isinstance(out, torch.Tensor) else list(out)
    if len(targets) != len(layout):
        raise BadArgument(f"out for {key!r}: {len(layout)} tensors expected, {len(targets)} came")
    for i, (t, (code, shape)) in enumerate(zip(targets, layout, strict=True)):
        if t.dtype != DTYPE_OF[code] or tuple(t.shape) != tuple(shape) or not t.is_contiguous():
            raise BadArgument(
                f"out[{i}] for {key!r}: contiguous {DTYPE_OF[code]} of shape {tuple(shape)} expected, "
                f"{t.dtype} {tuple(t.shape)} of strides {t.stride()} came"
            )
    return [t.detach() for t in targets]


def _close_quietly(core: Any) -> None:
    """What happens to a store that nobody closed."""
    try:
        core.close()
    except Exception:
        pass  # nobody is left to hear of it; its failed entries are not in the directory
