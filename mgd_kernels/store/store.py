"""The state store: tensors written once and read back in a known order, from host memory and disk.

>>> from mgd_kernels import Store
>>> with Store(host=2 << 30, disk=("runs/log", 100 << 30)) as store:
...     store.put(("grad", 0), gradient)  # copied; a thread writes it
...     store.prefetch([("grad", 1), ("grad", 0)])  # read ahead in this order
...     gradient = store.get(("grad", 0))  # bit-equal, or an error

The work is done in C++ (csrc/store); the file format is docs/format.md.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mgd_kernels.errors import BackendUnavailable, BadArgument, StoreClosed, StoreFull
from mgd_kernels.memory import address, wrote
from mgd_kernels.store.format import CHUNK, DTYPE_OF, DTYPES, PAGE, Key, decode_key, directory_name, encode_key
from mgd_kernels.store.gpu_copy import DeviceCopies
from mgd_kernels.store.tensors import Tensors, matching_targets, storable
from mgd_kernels.store.zero_copy import Reservation, viewed_tensors

UNLIMITED = 1 << 62


class Store:
    """Tensors under keys, in the fastest tier that has room.

    Args:
        host: bytes of host memory: entries kept there, and the buffers through which others pass to and from disk.
            Never exceeded; at least 64 KiB where there is a disk tier.
        disk: ``(directory, bytes)``. A scratch directory is made inside and removed on close; those that a crash left
            there are removed on start.
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
        threads: int = 2,
        durable: bool = False,
        staging: int | None = None,
    ) -> None:
        self._start(host, disk, threads, durable, staging, persistent=False)

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        host: int = 256 << 20,
        limit: int | None = None,
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
        store._start(host, disk, threads, durable, staging, persistent=True)
        return store

    def _start(
        self,
        host: int,
        disk: tuple[str | os.PathLike[str], int] | None,
        threads: int,
        durable: bool,
        staging: int | None,
        persistent: bool,
    ) -> None:
        directory = directory_name(disk[0]) if disk else b""
        for name, value in {"host": host, "disk": disk[1] if disk else 0}.items():
            if not isinstance(value, int) or value < 0:
                raise BadArgument(f"expected a number of bytes >= 0 for {name}; got {value!r}")
        if disk and host < 16 * PAGE:
            raise BadArgument(f"expected host >= {16 * PAGE}, for the buffers of a disk tier; got {host}")
        if disk and not 1 <= threads <= 64:
            raise BadArgument(f"expected 1 to 64 threads; got {threads}")
        if staging is None:
            staging = min(host, max(host // 4, 2 * (threads + 2) * CHUNK)) if disk else 0
        if not (16 * PAGE if disk else 0) <= staging <= host:
            raise BadArgument(f"expected staging between {16 * PAGE} bytes and host = {host}; got {staging}")
        # Small pools get small chunks: every thread should have one to work on while another is filled.
        room = staging if disk else max(host, PAGE)
        chunk = max(PAGE, min(CHUNK, room // (threads + 2) // PAGE * PAGE))
        try:
            core = importlib.import_module("mgd_kernels._core")
        except ImportError as error:
            raise BackendUnavailable(f"expected the package's C++ extension; got {error}: reinstall it") from error
        self._core = core.TieredStore(
            host=host,
            staging=staging,
            chunk=chunk,
            directory=directory,
            disk=disk[1] if disk else 0,
            persistent=persistent,
            durable=durable,
            threads=threads,
        )
        self._owner = os.getpid()
        self._tiers = ["host"] * (host > 0 and not persistent) + ["disk"] * (disk is not None)  # fastest first
        self._devices: dict[bytes, list[torch.device]] = {}  # where an entry's tensors were, if not all on the CPU
        self._copies = DeviceCopies(self._core)
        self._finalizer = weakref.finalize(self, _close_quietly, self._core, self._copies, self._owner)

    # --- entries

    def put(self, key: Key, tensors: Tensors, tier: str | None = None, unchanging: bool = False) -> None:
        """Copies one tensor or a list of them under ``key``, replacing what was there.

        Returns when the copy is made, or of a GPU's tensors when it is on its way; a thread writes it to disk
        afterwards. Waits while all buffers are in use. A write that fails later is reported by :meth:`get` of that
        key, :meth:`check`, :meth:`flush`, :meth:`close`.

        Args:
            unchanging: nobody writes to these tensors any more. A GPU then goes on while they are copied; otherwise
                its current stream waits for that.
            tensors: any shape; bfloat16, float16, float32, float64, int64, int32, int16, int8, uint8 or bool. Values,
                shape and dtype are kept, not strides.
            tier: ``"host"`` or ``"disk"``; ``None`` means the fastest that has room.

        Raises:
            StoreFull: no tier (that was asked for) has room; nothing was stored.
            BadArgument: a key or tensor of the wrong kind.
        """
        core, name = self._live(), encode_key(key)
        sequence = not isinstance(tensors, torch.Tensor)
        if sequence and not isinstance(tensors, Iterable):
            raise BadArgument(f"expected a tensor or a list of tensors; got {type(tensors).__name__}")
        items = [storable(t, i) for i, t in enumerate(tensors if sequence else [tensors])]
        layout = [(DTYPES[t.dtype], tuple(t.shape)) for t in items]
        if tier not in (None, "host", "disk"):
            raise BadArgument(f"expected tier 'host', 'disk' or None; got {tier!r}")
        refusals: list[StoreFull] = []
        for candidate in [tier] if tier else self._tiers:
            try:
                if all(t.device.type == "cpu" for t in items):
                    with self._copies.alone():
                        core.put(name, sequence, layout, [address(t) for t in items], candidate)
                    self._devices.pop(name, None)
                else:
                    self._copies.put(name, sequence, items, layout, candidate, unchanging)
                    self._devices[name] = [t.device for t in items]
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
        """What was put under ``key``, bit-equal: a tensor, or a list of them. Of a GPU's, the host does not wait: it
        is there for what the current stream does next.

        Args:
            out: contiguous tensors of the stored dtypes and shapes to fill and return; after an error their contents
                are undefined.
            device: where to make the tensors, without ``out``; by default where they were put from, in this process.
            again: it will be got again soon: the buffers stay filled for that while nobody needs their room. What is
                in them is checked again.

        Raises:
            KeyError: nothing was put under this key.
            CorruptState: the file does not hold what was written. `ForeignEntry`: another store wrote it.
            StoreIOError: reading failed, or the write that should have stored it did.
            UnknownFormat: the file is of another version.
        """
        core, name = self._live(), encode_key(key)
        self._copies.settle(name)
        _, sequence, layout = core.describe(name)
        if out is None:
            devices = self._devices.get(name) if device is None else [torch.device(device)] * len(layout)
            devices = devices or [torch.device("cpu")] * len(layout)
            targets = [
                torch.empty(shape, dtype=DTYPE_OF[code], device=d)
                for (code, shape), d in zip(layout, devices, strict=True)
            ]
        else:
            targets = matching_targets(key, sequence, layout, out)
        if any(t.device.type != "cpu" for t in targets):
            self._copies.get(name, targets)
        else:
            with self._copies.alone():
                core.get(name, [address(t) for t in targets], again)
            wrote(targets)
        if out is not None:
            return out if isinstance(out, torch.Tensor) else list(out)
        return targets if sequence else targets[0]

    # --- entries without a copy

    def reserve(self, shape: Sequence[int], dtype: torch.dtype, room: int = 0) -> Reservation | None:
        """A buffer on its way to the disk, to compute into and then to :meth:`commit`.

        Its ``tensor`` has this shape and dtype, lies on the CPU and is not initialised. Waits for a free buffer.
        ``None`` without a disk tier, and where so much is reserved and viewed already that the store could not go on.

        Args:
            room: bytes for further tensors of the entry, each with up to 64 more.
        """
        with self._copies.alone():
            return Reservation.of(self._live(), shape, dtype, room)

    def commit(self, key: Key, reservation: Reservation, others: Sequence[torch.Tensor] = ()) -> None:
        """Puts the list ``[reservation.tensor, *others]`` on disk under ``key``, the first of them without a copy.

        The buffer then belongs to the store: ``reservation.tensor`` may still be read, but not written. Anything
        written to it never comes back as data: ``get`` of the key reports the entry as damaged.

        Raises:
            StoreFull: the disk tier has no room; nothing was stored.
            BadArgument: the others need more room than was reserved, or the buffer was committed before.
        """
        core, name = self._live(), encode_key(key)
        self._copies.settle(name)
        reservation.commit(core, name, [storable(t, i + 1) for i, t in enumerate(others)])
        self._devices.pop(name, None)

    def view(self, key: Key, again: bool = False) -> list[torch.Tensor] | None:
        """An entry in the buffer into which it was read: its tensors on the CPU, to be read and soon let go of.

        The buffer is not used for anything else until all of them are gone. ``None`` where :meth:`get` has to copy:
        for entries that are not on disk or not in one chunk (those of :meth:`commit` are), and where so much is
        reserved and viewed already that the store could not go on. ``again`` and the errors are those of :meth:`get`.
        """
        with self._copies.alone():
            return viewed_tensors(self._live(), encode_key(key), again)

    # --- what is where

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Starts to read these entries, in this order, as far as there are free buffers; the rest as buffers become
        free. Returns at once. Raises KeyError on a key that is not stored."""
        self._live()
        self._copies.prefetch([encode_key(key) for key in keys])

    def delete(self, key: Key) -> None:
        """Removes an entry, or raises KeyError."""
        core, name = self._live(), encode_key(key)
        self._devices.pop(name, None)
        self._copies.settle(name)
        core.remove(name)

    def clear(self) -> None:
        """Removes every entry, in one step: a process that dies meanwhile, or a power failure, leaves all or none."""
        core = self._settled()
        self._devices.clear()
        core.clear()

    def keys(self) -> list[Key]:
        """All keys, sorted by their spelling in the format. Damaged entries are among them: their get raises."""
        return [decode_key(name) for name in sorted(self._settled().keys())]

    def layout(self, key: Key) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """The dtypes and shapes of an entry's tensors; the errors of a damaged header are those of :meth:`get`."""
        _, _, layout = self._settled(key).describe(encode_key(key))
        return [(DTYPE_OF[code], tuple(shape)) for code, shape in layout]

    def tier(self, key: Key) -> str:
        """Where an entry is: ``"host"`` or ``"disk"``."""
        return self._settled(key).describe(encode_key(key))[0]

    def __contains__(self, key: Key) -> bool:
        return self._settled(key).contains(encode_key(key))

    def __len__(self) -> int:
        return len(self.keys())

    # --- the whole store

    def flush(self) -> None:
        """Waits until everything is written; raises the error of a write that failed, until its key is deleted or
        stored again."""
        self._settled().flush()

    def check(self) -> None:
        """Raises the error of a write that has failed by now, as :meth:`flush` does, but waits for nothing."""
        core = self._live()
        self._copies.look()
        core.check()

    def close(self) -> None:
        """Waits for the writes, frees everything and lets go of the directory; a scratch directory is removed.

        A persistent store then raises the error of a write that failed. Closing twice does nothing.
        """
        self._devices.clear()
        self._finalizer.detach()
        self._closed, ours = True, os.getpid() == self._owner
        try:
            if ours:
                self._copies.settle()
        finally:
            if ours:
                self._copies.give_up()
            self._core.close()

    _closed = False

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # otherwise the first error is the one to report
                raise

    def stats(self) -> dict[str, Any]:
        """What the store holds and how fast it is.

        ``host``, ``disk``: each ``limit`` and ``used`` bytes; ``disk`` also ``peak``, ``io`` ("direct" or "buffered"),
        ``why`` and ``directory``. ``pool``: the buffers of host memory: ``limit``, ``in_use``, ``mapped`` and ``peak``
        bytes, and how many requests were met by a ``reused`` buffer. ``handed``: entries put and got without a copy,
        ``lent`` and ``leased``. ``put``, ``get`` (copies in and out, waiting included), ``write`` and ``read`` (files):
        ``bytes``, busy ``seconds``, ``bandwidth`` in bytes per second. ``read_ahead``: chunks that were there when
        wanted (``hits``) and dropped for want of room (``drops``). ``waited``: how often the host waited for a copy
        from or to a GPU.
        """
        raw = self._live().stats()
        rates = {
            name: {**raw[name], "bandwidth": raw[name]["bytes"] / raw[name]["seconds"] if raw[name]["seconds"] else 0.0}
            for name in ("put", "get", "write", "read")
        }
        return {
            "entries": raw["entries"],
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
            "handed": {"lent": raw["committed"], "leased": raw["viewed"]},
            "pinned": self._copies.report(),
            "waited": self._copies.waited,
            **rates,
        }

    def _settled(self, key: Key | None = None) -> Any:
        """The core, when it has the entry, or all entries, that a GPU was asked for."""
        core = self._live()
        self._copies.settle(None if key is None else encode_key(key))
        return core

    def _live(self) -> Any:
        if self._closed:
            raise StoreClosed("the store is closed; open a new one")
        if os.getpid() != self._owner:
            raise StoreClosed(f"the store belongs to process {self._owner}, not to a fork of it; open one here")
        return self._core


def _close_quietly(core: Any, copies: DeviceCopies, owner: int) -> None:
    """Closes a store that its user did not close. There is no caller to report errors to; failed entries are not in
    the directory."""
    for part in (copies.settle, copies.give_up, core.close) if os.getpid() == owner else (core.close,):
        with contextlib.suppress(Exception):
            part()
