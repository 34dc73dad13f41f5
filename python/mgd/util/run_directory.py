"""The directory of a run that outlives its process: of a descent, a rater, an attribution or a search.

It is a state store (`docs/format.md`), which gives checksums over every byte, entries that are replaced as a whole and
that no other store takes for its own, and a lock. The entry "run" says whose it is. `docs/directories.md` says what
such a directory survives.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from mgd.errors import CorruptState, StaleRun, StoreIOError, UnknownFormat
from mgd.util.files import path_of, write_file
from mgd.util.fingerprint import Identity, differing
from mgd.util.values import from_bytes, from_tensors, to_bytes, to_tensors
from mgd_kernels.store import Key, Store

ADVICE = "It cannot be recovered: restore the directory from a copy, or delete it to start again."
_BUFFERS = 16 << 20  # bytes of memory for transfers
_HEADER, _FORMAT = "run", 1


class RunDirectory:
    """Values by name, in a directory that belongs to one run. Close it, or use it in a `with` block.

    kind: what the run is, such as "descent". identity: what its results depend on. Both are compared with those of the
    run that began the directory.

    Raises StaleRun if the directory belongs to another run, CorruptState if it is damaged, StoreBusy if another process
    has it open, UnknownFormat if it holds something else, and StoreIOError if the system refuses.
    """

    def __init__(self, directory: str | os.PathLike[str], kind: str, identity: Identity):
        mine = {"the kind of run": kind, **identity}
        self._opened(directory)
        with self._closed_after_errors():
            if self._store.keys():
                header = self._header()
                if differences := differing(header["identity"], mine):
                    raise StaleRun(str(self.path), differences)
            else:
                self._store.put(_HEADER, to_bytes(json.dumps({"format": _FORMAT, "identity": mine})))
                self._store.flush()

    @classmethod
    def existing(cls, directory: str | os.PathLike[str], kind: str) -> RunDirectory:
        """The directory of a run of this kind, whatever its identity. Raises UnknownFormat if it holds none."""
        try:
            os.stat(path_of(directory) / "MGD_STORE")
        except (FileNotFoundError, NotADirectoryError):
            raise UnknownFormat(os.fspath(directory), f"no directory of a run ({kind})") from None
        except OSError as error:
            raise StoreIOError(error.errno or 0, os.fspath(directory), "cannot look into the directory") from error
        self = cls.__new__(cls)
        self._opened(directory)
        with self._closed_after_errors():
            header = self._header()
            if header["identity"].get("the kind of run") != kind:
                raise UnknownFormat(str(self.path), f"a run of another kind than {kind}")
        return self

    def _opened(self, directory: str | os.PathLike[str]) -> None:
        self.path = path_of(directory)
        self._store = Store.open(directory, host=_BUFFERS, threads=1, durable=True)

    def __contains__(self, key: Key) -> bool:
        return key in self._store

    def keys(self) -> list[Key]:
        """Those of all values."""
        return [key for key in self._store.keys() if key != _HEADER]

    def read(self, key: Key) -> Any:
        """The value under a key, None if there is none. Raises CorruptState if it is not what was written."""
        if key not in self._store:
            return None
        try:
            tensors = self._store.get(key)
            record = from_tensors(tensors if isinstance(tensors, list) else [])
            return record["value"]
        except (CorruptState, ValueError, TypeError, KeyError) as error:
            raise _with_advice(key, error) from error

    def need(self, key: Key) -> Any:
        """The value under a key that was written before. Raises CorruptState if it is gone, too."""
        if key not in self._store:
            raise CorruptState(key, None, "its file is gone", ADVICE)
        return self.read(key)

    def write(self, key: Key, value: Any) -> None:
        """Replace the value under a key. It is on the disk when the call returns."""
        self._store.put(key, to_tensors({"value": value}))
        self._store.flush()

    def remove(self, key: Key) -> None:
        """Remove the value under a key, which must be there."""
        self._store.delete(key)

    def show(self, name: str, value: Any) -> None:
        """Write a value as JSON beside the others, for people. It is never read back."""
        write_file(self.path / name, json.dumps(value, indent=1) + "\n", private=True)

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._store.__exit__(kind, error, trace)

    def _header(self) -> dict[str, Any]:
        """The entry that says whose run this is."""
        try:
            tensor: Any = self._store.get(_HEADER) if _HEADER in self._store else None
            header = json.loads(from_bytes(tensor))
            if header["format"] != _FORMAT or not isinstance(header["identity"], dict):
                raise ValueError(f"a run in format {header['format']!r}")
        except CorruptState as error:
            raise _with_advice(_HEADER, error) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # Its bytes are those that were written, so it is no damage: somebody else wrote them.
            raise UnknownFormat(str(self.path), "a store of something else: name a new or empty directory") from error
        return header

    @contextlib.contextmanager
    def _closed_after_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise


def _with_advice(key: Key, error: Exception) -> Exception:
    """The error of an entry that is damaged, or is not one of a run, with what to do about a directory."""
    if not isinstance(error, CorruptState):
        return CorruptState(key, None, str(error), ADVICE)
    # A kind of damage with a class of its own says better what to do.
    return CorruptState(key, error.chunk, error.found, ADVICE) if type(error) is CorruptState else error
