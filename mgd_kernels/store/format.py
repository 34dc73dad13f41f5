"""What docs/format.md says of keys, dtypes and the place of tensors in an entry."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import torch

from mgd_kernels.errors import BadArgument

Key = str | tuple[str, int]

ALIGNMENT = 64  # bytes, of every tensor in its entry
PAGE = 4096
CHUNK = 4 << 20  # bytes of one transfer and one checksum; 4 MiB reaches the disk's bandwidth with two threads

# The codes of docs/format.md.
DTYPES = {
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float32: 3,
    torch.float64: 4,
    torch.int64: 5,
    torch.uint8: 6,
    torch.int32: 7,
    torch.int16: 8,
    torch.int8: 9,
    torch.bool: 10,
}
DTYPE_OF = {code: dtype for dtype, code in DTYPES.items()}


def encode_key(key: Key) -> bytes:
    """The key as the format spells it: ``text-<text>`` or ``step-<step>-<kind>``."""
    try:
        if isinstance(key, str) and key:
            return b"text-" + key.encode()
        if isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str) and key[0]:
            kind, step = key
            if hasattr(step, "__index__") and not isinstance(step, bool):
                return b"step-%d-" % step.__index__() + kind.encode()
    except UnicodeEncodeError:
        pass  # half of a surrogate pair, which UTF-8 cannot spell
    raise BadArgument(f"expected a key: a text or (text, integer); got {key!r}")


def decode_key(name: bytes) -> Key:
    """The inverse of :func:`encode_key`."""
    if name.startswith(b"text-"):
        return name[5:].decode()
    match = re.fullmatch(rb"step-(-?\d+)-(.+)", name, re.DOTALL)
    assert match is not None, name
    return match[2].decode(), int(match[1])


def offsets(sizes: Iterable[int]) -> list[int]:
    """Where in an entry's payload tensors of these sizes in bytes begin, and where the last one ends."""
    starts = [0]
    for size in sizes:
        starts[-1] = -(-starts[-1] // ALIGNMENT) * ALIGNMENT
        starts.append(starts[-1] + size)
    return starts


def directory_name(directory: str | os.PathLike[str]) -> bytes:
    """A path as the system spells it. Raises BadArgument where it is none."""
    try:
        name = os.fsencode(directory)
    except (TypeError, UnicodeEncodeError):
        name = b""
    if not name or b"\0" in name:
        raise BadArgument(f"expected the path of a directory; got {directory!r}")
    return name
