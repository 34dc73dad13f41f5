"""Hostile store directories, made from a second writer of docs/format.md (none of the store's code but its checksum).

`CASES` maps a name to (how to make the directory, the error that opening or reading it must raise, a part of its
text). Each directory is a store that holds the good entry "good" and, unless opening fails, the hostile entry "bad".
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

from mgd_kernels import _core

PAGE = 4096
FIXED = struct.Struct("<8sIIQQQIIIIQ16s")  # magic .. store id
FLOAT32, BOOL = 3, 10
ID = bytes(range(16))  # of the store
OTHER = bytes(range(16, 32))


def pad(data: bytes, unit: int) -> bytes:
    return data + bytes(-len(data) % unit)


def sealed(header: bytes) -> bytes:
    """The header with its checksum, which is taken with the field zeroed and stored in bytes 56..63."""
    zeroed = header[:56] + bytes(8) + header[64:]
    return zeroed[:56] + struct.pack("<Q", _core.checksum(zeroed)) + zeroed[64:]


def entry(
    key: bytes,
    tensors: list[tuple[int, tuple[int, ...], bytes]],
    *,
    sequence: bool = False,
    chunk: int = 4 << 20,
    magic: bytes = b"MGDSTATE",
    version: int = 2,
    flags: int = 0,
    checksum_kind: int = 1,
    payload_bytes: int | None = None,
    shift: int = 0,
    store: bytes = ID,
) -> bytes:
    """One entry's file; tensors are (dtype code, shape, bytes). The options after `chunk` forge single fields."""
    payload, table = b"", b""
    for dtype, shape, data in tensors:
        payload = pad(payload, 64)
        table += struct.pack("<II", dtype, len(shape)) + struct.pack(f"<{len(shape)}q", *shape)
        table += struct.pack("<QQ", len(payload) + shift, len(data))
        payload += data
    payload = pad(payload, PAGE)
    chunks = [payload[i : i + chunk] for i in range(0, len(payload), chunk)]
    variable = pad(key, 8) + table + b"".join(struct.pack("<Q", _core.checksum(c)) for c in chunks)
    length = -(-(FIXED.size + len(variable)) // PAGE) * PAGE
    stated = len(payload) if payload_bytes is None else payload_bytes
    fixed = FIXED.pack(
        magic,
        version,
        flags | sequence,
        length,
        stated,
        chunk,
        len(chunks),
        len(tensors),
        len(key),
        checksum_kind,
        0,
        store,
    )
    return sealed(pad(fixed + variable, PAGE)) + payload


def marker(kind: str = "persistent", version: int = 2, cleared: bytes = bytes(16)) -> str:
    return f"mgd-kernels state store\nformat {version}\n{kind}\nid {ID.hex()}\ncleared {cleared.hex()}\n"


def make_store(directory: Path, marker: str = marker()) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "MGD_STORE").write_text(marker)
    (directory / "text-good.mgd").write_bytes(entry(b"text-good", [good_tensor()]))


def good_tensor() -> tuple[int, tuple[int, ...], bytes]:
    return FLOAT32, (3,), struct.pack("<3f", 1.0, 2.0, 3.0)


def _bad(**forged: object) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        make_store(directory)
        (directory / "text-bad.mgd").write_bytes(entry(b"text-bad", [good_tensor()], **forged))  # type: ignore[arg-type]

    return make


def _file(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        make_store(directory)
        (directory / "text-bad.mgd").write_bytes(change(entry(b"text-bad", [good_tensor()])))

    return make


def _tensor(dtype: int, shape: tuple[int, ...], data: bytes) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        make_store(directory)
        (directory / "text-bad.mgd").write_bytes(entry(b"text-bad", [(dtype, shape, data)]))

    return make


def _field(offset: int, form: str, value: int) -> Callable[[Path], None]:
    """A header whose checksum is right and one of whose fields is absurd."""

    def change(data: bytes) -> bytes:
        size = struct.calcsize(form)
        header = data[:offset] + struct.pack(form, value) + data[offset + size : PAGE]
        return sealed(header) + data[PAGE:]

    return _file(change)


def _long_header(directory: Path) -> None:
    make_store(directory)
    header = struct.pack("<8sIIQ", b"MGDSTATE", 2, 0, 2 << 30)
    with (directory / "text-bad.mgd").open("wb") as file:
        file.write(pad(header, PAGE))
        file.truncate(3 << 30)  # a hole: it takes no room


def _link(directory: Path) -> None:
    make_store(directory)
    outside = directory.parent / "outside.mgd"
    outside.write_bytes(entry(b"text-bad", [good_tensor()]))
    os.symlink(outside, directory / "text-bad.mgd")


def _folder(directory: Path) -> None:
    make_store(directory)
    (directory / "text-bad.mgd").mkdir()


def _pipe(directory: Path) -> None:
    make_store(directory)
    os.mkfifo(directory / "text-bad.mgd")


def _path_is_a_file(directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.write_bytes(b"something of the user's")


def _foreign(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "thesis.tex").write_text("not ours")


def _marker(text: str) -> Callable[[Path], None]:
    return lambda directory: make_store(directory, text)


CASES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # the directory
    "path is a file": (_path_is_a_file, "StoreIOError", "directory"),
    "directory of somebody else": (_foreign, "UnknownFormat", "no marker"),
    "marker of another version": (
        _marker(marker(version=3)),
        "UnknownFormat",
        "not that of a store of format 2",
    ),
    "marker of version 1": (
        _marker("mgd-kernels state store\nformat 1\npersistent\n"),
        "UnknownFormat",
        "not that of a store of format 2",
    ),
    "marker with an id cut short": (_marker(marker()[:-3]), "UnknownFormat", "not that of a store"),
    "marker with an id in capitals": (
        _marker(marker().replace("0a0b", "0A0B")),
        "UnknownFormat",
        "not that of a store",
    ),
    "marker of another program": (_marker("photographs\n"), "UnknownFormat", "not that of a store"),
    "marker is empty": (_marker(""), "UnknownFormat", "not that of a store"),
    "left-over scratch": (_marker(marker("scratch")), "UnknownFormat", "scratch"),
    # what an entry may be
    "symbolic link out of the store": (_link, "StoreIOError", "follows no links"),
    "folder named as an entry": (_folder, "StoreIOError", "not a regular file"),
    "pipe named as an entry": (_pipe, "StoreIOError", "not a regular file"),
    # damage
    "empty file": (_file(lambda data: b""), "CorruptState", "ends after 0"),
    "half a header": (_file(lambda data: data[:1000]), "CorruptState", "ends after 1000"),
    "header never written": (_file(lambda data: bytes(PAGE) + data[PAGE:]), "CorruptState", "magic"),
    "header torn in the middle": (
        _file(lambda data: data[:80] + bytes(PAGE - 80) + data[PAGE:]),
        "CorruptState",
        "sum",
    ),
    "payload missing": (_file(lambda data: data[:PAGE]), "CorruptState", "expected a file of 8192 bytes"),
    "one byte short": (_file(lambda data: data[:-1]), "CorruptState", "expected"),
    "one byte long": (_file(lambda data: data + b"\0"), "CorruptState", "expected"),
    "a bit of the payload": (_file(lambda data: data[:PAGE] + b"\1" + data[PAGE + 1 :]), "CorruptState", "checksum"),
    "a bit of the padding": (_file(lambda data: data[:-1] + b"\1"), "CorruptState", "checksum"),
    "renamed": (
        lambda d: (make_store(d), os.rename(d / "text-good.mgd", d / "text-bad.mgd"), make_store(d))[0],
        "CorruptState",
        "renamed",
    ),
    # other formats, and forgeries with a right checksum
    "magic of another format": (_bad(magic=b"SAFETENS"), "CorruptState", "magic"),
    "version 1": (_bad(version=1), "UnknownFormat", "version 1"),
    "version 3": (_bad(version=3), "UnknownFormat", "version 3"),
    "version 0": (_bad(version=0), "UnknownFormat", "version 0"),
    "unknown flag": (_bad(flags=2), "UnknownFormat", "flags"),
    "unknown checksum": (_bad(checksum_kind=2), "UnknownFormat", "checksum"),
    "payload longer than its tensors": (_bad(payload_bytes=2 * PAGE), "UnknownFormat", "payload|chunks"),
    "payload of 2^64 - 4096": (_field(24, "<Q", 2**64 - 4096), "UnknownFormat", "payload"),
    "payload of 2^62": (_field(24, "<Q", 2**62), "UnknownFormat", "payload"),
    "payload not of whole pages": (_bad(payload_bytes=100), "UnknownFormat", "payload"),
    "chunk of nothing": (_field(32, "<Q", 0), "UnknownFormat", "chunks"),
    "chunk of 2^63": (_field(32, "<Q", 2**63), "UnknownFormat", "chunks"),
    "many chunks": (_field(40, "<I", 2**32 - 1), "UnknownFormat", "chunks"),
    "many tensors": (_field(44, "<I", 2**32 - 1), "UnknownFormat", "tensor"),
    "no tensor": (_field(44, "<I", 0), "UnknownFormat", "tensors"),
    "long key": (_field(48, "<I", 2**32 - 1), "UnknownFormat", "key"),
    "header of 2^64 - 4096": (_field(16, "<Q", 2**64 - 4096), "CorruptState", "header"),
    "header of 2 GiB in a file that has them": (_long_header, "CorruptState", "header"),
    "header of nothing": (_field(16, "<Q", 0), "CorruptState", "header"),
    "something after the tables": (_field(2000, "<Q", 7), "UnknownFormat", "after"),
    "of another store": (_bad(store=OTHER), "ForeignEntry", "copied here"),
    "a bool of 2": (_tensor(BOOL, (3,), b"\0\1\2"), "CorruptState", "bools"),
    "a bool of 255": (_tensor(BOOL, (2, 2), b"\0\1\xff\1"), "CorruptState", "bools"),
    "unknown dtype": (_tensor(11, (3,), bytes(12)), "UnknownFormat", "dtype"),
    "dtype 0": (_tensor(0, (3,), b""), "UnknownFormat", "dtype"),
    "negative shape": (_tensor(FLOAT32, (-3,), bytes(12)), "UnknownFormat", "shape"),
    "shape that wraps": (_tensor(FLOAT32, (2**62, 2**62), b""), "UnknownFormat", "shape"),
    "shape larger than the tensor": (_tensor(FLOAT32, (4,), bytes(12)), "UnknownFormat", "shape"),
    "rank of 2^32 - 1": (_field(92, "<I", 2**32 - 1), "UnknownFormat", "dimensions"),
    "tensor beyond the payload": (_bad(shift=2**40), "UnknownFormat", "shape"),
}
