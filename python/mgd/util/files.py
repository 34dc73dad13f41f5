"""Replacing a file: all of the old one or all of the new one, and nothing beside it."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

from mgd.errors import BadArgument, StoreIOError


def path_of(path: Any) -> Path:
    """What was given as the path of a file or a directory. Raises BadArgument where it is none."""
    try:
        name = os.fsdecode(path)
    except TypeError:
        name = ""
    if not name or "\0" in name:
        raise BadArgument(f"expected a path; got {path!r}")
    return Path(name)


def write_file(path: str | os.PathLike[str], content: bytes | str, *, private: bool = False) -> None:
    """Write a file, and the folder that it is in, atomically: whenever the process ends, `path` holds all of the old
    content or all of the new one.

    private: only this user may read it. Raises BadArgument where the path is a link or no file, which are left alone,
    and StoreIOError where the system refuses.
    """
    path, data = path_of(path), content.encode() if isinstance(content, str) else content
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise BadArgument(
            f"expected {path} to be a file, or free; got a link, a folder or a device. Name another path."
        )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(temporary, flags, 0o600 if private else 0o666), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise StoreIOError(error.errno or 0, str(path), "cannot write the file") from error
