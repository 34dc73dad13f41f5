"""Errors of the kernels: one class per broken promise.

Every text says what was expected, what it got instead, and what to do.
"""

from __future__ import annotations

import errno
import os


class KernelError(RuntimeError):
    """Base class of every error this package raises on purpose."""


class BadArgument(KernelError, ValueError):
    """An argument has a wrong type, shape, dtype, device or value."""


class BackendUnavailable(KernelError):
    """The requested backend cannot run here, or not on these tensors; the text says why."""


class CorruptState(KernelError):
    """Stored data is not what was stored. `chunk` is the damaged chunk, None for the header or the whole file."""

    def __init__(
        self, key: object, chunk: int | None, found: str, advice: str = "Delete the entry and store it again."
    ) -> None:
        self.key, self.chunk, self.found = key, chunk, found
        where = "its file or header" if chunk is None else f"chunk {chunk}"
        super().__init__(f"entry {key!r} is damaged in {where}: {found}. {advice}")


class ForeignEntry(CorruptState):
    """A file of another store, or of what this one held before it was cleared, lies among the entries of a store."""

    def __init__(self, key: object, found: str) -> None:
        self.key, self.chunk, self.found = key, None, found
        KernelError.__init__(
            self,
            f"expected entry {key!r} to be one that this store wrote; got the file {found}: it was copied here. "
            "Remove the file, or copy the whole directory that it came from.",
        )


class StoreFull(KernelError):
    """No tier that was requested has room: `needs` and `has` in bytes, `tier` names it (or several)."""

    def __init__(self, needs: int, has: int, tier: str) -> None:
        self.needs, self.has, self.tier = needs, has, tier
        super().__init__(
            f"expected {needs:,} bytes of room in tier {tier}; got {has:,}. "
            "Delete entries, or give the store a larger budget."
        )


class StoreBusy(KernelError):
    """The directory belongs to another store that is open, in process `pid` (0: unknown)."""

    def __init__(self, path: str, pid: int) -> None:
        self.path, self.pid = path, pid
        super().__init__(
            f"expected {path} to be free; got: process {pid or 'unknown'} has it open. "
            "Close that store or end that process, or name another directory."
        )


class UnknownFormat(KernelError):
    """A directory or file is not in the format this version reads; nothing was changed."""

    def __init__(self, path: str, found: str) -> None:
        self.path = path
        super().__init__(f"expected {path} in the store's format; got {found}.")


class StoreIOError(KernelError, OSError):
    """The system refused to read or write; `errno` and `filename` say what and where."""

    def __init__(self, error: int, path: str, what: str) -> None:
        # RuntimeError comes first in the order of bases and would keep OSError from setting its fields.
        OSError.__init__(self, error, f"{what}: {os.strerror(error)}. {_IO_ADVICE.get(error, _IO_ADVICE[0])}", path)
        self.path, self.what = path, what


class StoreClosed(KernelError):
    """The store was closed, or belongs to the process this one was forked from."""


_IO_ADVICE = {
    0: "Check the disk; what was stored before is untouched.",
    errno.ENOSPC: "Free space on the file system, or lower the disk budget; the entry was not stored.",
    errno.EDQUOT: "The quota is used up: free space, or lower the disk budget; the entry was not stored.",
    errno.ENOENT: "The file was removed by somebody else; delete the entry and store it again.",
    errno.EROFS: "Name a directory on a writable file system.",
    errno.EACCES: "Name a directory this user may write.",
    errno.ENOTDIR: "Name the path of a directory.",
    errno.EEXIST: "Name the path of a directory.",
    errno.EAGAIN: "Raise the limit of threads (ulimit -u), or give the store fewer.",
    errno.EMFILE: "Close files, or raise the limit of open files (ulimit -n).",
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f); the entry was not stored.",
    errno.EMLINK: "Remove this file while no store has the directory open.",
    errno.ELOOP: "Replace the link by the file itself, or remove it.",
}
