"""The state store's files: written as the format says, and damaged or hostile ones are reported, never believed."""

from __future__ import annotations

import random
import runpy
import struct
from pathlib import Path

import pytest
import torch
from store_helpers import CHUNK, KB, MB, pattern, small_disk_store

from mgd_kernels import _core, errors
from mgd_kernels.errors import CorruptState, StoreIOError, UnknownFormat
from mgd_kernels.store import Store
from mgd_kernels.store.format import DTYPES

HOSTILE = runpy.run_path(str(Path(__file__).parent / "hostile_stores" / "generate.py"))


def entry_file(store: Store, name: str = "text-x.mgd") -> Path:
    return Path(store.stats()["disk"]["directory"]) / name


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_flipped_bit_in_any_chunk(tmp_path, prefetch):
    value = pattern(5 * CHUNK)
    with small_disk_store(tmp_path) as store:
        store.put("x", value)
        store.flush()
        path = entry_file(store)
        data = path.read_bytes()

        def expect(error: type[Exception], text: str, chunk: int | None) -> None:
            # Chunks read ahead before a failure are good and still there: as many reads as chunks use them all up.
            if prefetch:
                store.prefetch(["x"])
            with pytest.raises(error, match=text) as told:
                for _ in range(5):
                    store.get("x")
            if chunk is not None:
                assert (told.value.key, told.value.chunk) == ("x", chunk)

        for chunk in range(5):
            at = 4096 + chunk * CHUNK + 1234
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
            expect(CorruptState, "checksum", chunk)
        path.write_bytes(data[: 4096 + 2 * CHUNK + 100])
        expect(CorruptState, "ends after", 2)
        path.unlink()
        expect(StoreIOError, "No such file", None)
        path.write_bytes(data)
        assert torch.equal(store.get("x"), value)


def contents(directory: Path) -> dict[Path, object]:
    """What is in each file but the lock; of a long one, which has holes, its length."""
    files = [p for p in directory.rglob("*") if p.is_file() and p.name != "LOCK"]
    return {p: size if (size := p.stat().st_size) > MB else p.read_bytes() for p in files}


@pytest.mark.parametrize("case", HOSTILE["CASES"])
def test_hostile_directories(tmp_path, case):
    """A clear error for the hostile entry, and the good entry beside it is still good; nothing is changed."""
    make, error, text = HOSTILE["CASES"][case]
    directory = tmp_path / "store"
    make(directory)
    before = contents(tmp_path)
    with pytest.raises(getattr(errors, error), match=text):
        with Store.open(directory, host=MB) as store:
            assert store.get("good").tolist() == [1.0, 2.0, 3.0]
            assert "bad" in store
            store.prefetch(["bad", "good"])
            store.get("bad")
    assert contents(tmp_path) == before


def test_a_damaged_entry_can_be_deleted_or_stored_again(tmp_path):
    for name in ("symbolic link out of the store", "header torn in the middle", "version 3", "of another store"):
        directory = tmp_path / name / "store"
        directory.parent.mkdir()
        HOSTILE["CASES"][name][0](directory)
        for repair in (lambda store: store.put("bad", torch.ones(2)), lambda store: store.delete("bad")):
            with Store.open(directory) as store:
                repair(store)
        with Store.open(directory) as store:
            assert store.keys() == ["good"]
        outside = tmp_path / name / "outside.mgd"
        assert not outside.is_symlink() and outside.exists() == ("link" in name)


def test_the_format_is_the_one_that_is_written_down(tmp_path):
    """Byte for byte: the store's writer against the second writer in hostile_stores/generate.py."""
    values = [torch.arange(5000, dtype=torch.int64), torch.tensor(2.5), torch.empty(0, 3, dtype=torch.bool)]
    with Store.open(tmp_path / "s", host=256 * KB) as store:
        store.put(("é/", -3), values)
        store.put("one", values[0])
    tensors = [(DTYPES[t.dtype], tuple(t.shape), t.numpy().tobytes()) for t in values]
    identity = bytes.fromhex((tmp_path / "s" / "MGD_STORE").read_text().split()[7])
    bound = {"chunk": CHUNK, "store": identity}
    files = {
        "step--3-%C3%A9%2F.mgd": HOSTILE["entry"]("step--3-é/".encode(), tensors, sequence=True, **bound),
        "text-one.mgd": HOSTILE["entry"](b"text-one", tensors[:1], **bound),
    }
    for name, data in files.items():
        assert (tmp_path / "s" / name).read_bytes() == data


def test_checksum_is_xxh3():
    """Published values of XXH3-64 with seed 0 (xxhsum -H3) for the bytes 0, 1, ... 255, 0, ..."""
    data = bytes(range(256)) * 64
    known = {
        241: 0x02E8CD95421C6D02,
        1024: 0xA870F92984398D22,
        1025: 0x78C86E91EE939852,
        4096: 0xEB4B7C3707879151,
        16384: 0xC96B04EBEFA8F6DC,
    }
    assert {n: _core.checksum(data[:n]) for n in known} == known


def test_random_mutations_never_give_a_wrong_number(tmp_path):
    """A few hundred random edits of a valid file: an error, or (an edit that changes nothing) the same tensors."""
    rng = random.Random(0)
    values = [pattern(9000), torch.arange(700.0)]
    with Store.open(tmp_path / "s", host=256 * KB) as store:
        store.put("x", values)
    path = tmp_path / "s" / "text-x.mgd"
    data = path.read_bytes()
    outcomes = {"same": 0, "CorruptState": 0, "UnknownFormat": 0}
    for _ in range(400):
        mutant = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            if len(mutant) < 16:
                break
            # Most of the header is zeros: aim at its fields half of the time.
            at = rng.randrange(min(200, len(mutant))) if rng.random() < 0.5 else rng.randrange(len(mutant))
            action = rng.random()
            if action < 0.5:
                mutant[at] ^= 1 << rng.randrange(8)
            elif action < 0.7:
                value = rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 4096])
                at -= at % 8
                mutant[at : at + 8] = struct.pack("<Q", value)
            elif action < 0.8:
                del mutant[at:]
            elif action < 0.9:
                source = rng.randrange(len(mutant))
                mutant[at:at] = mutant[source : source + rng.randrange(1, 5000)]
            else:
                mutant[at : at + 512] = bytes(len(mutant[at : at + 512]))
        if rng.random() < 0.5 and len(mutant) >= 4096:  # a forger knows the checksum
            mutant[:4096] = HOSTILE["sealed"](bytes(mutant[:4096]))
        path.write_bytes(mutant)
        with Store.open(tmp_path / "s", host=256 * KB) as store:
            try:
                back = store.get("x")
            except (CorruptState, UnknownFormat) as error:
                outcomes["UnknownFormat" if isinstance(error, UnknownFormat) else "CorruptState"] += 1
                continue
        # A forged header may describe the same bytes as other tensors; the bytes are verified either way.
        joined = b"".join(
            t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in (back if type(back) is list else [back])
        )
        assert joined == b"".join(t.view(torch.uint8).numpy().tobytes() for t in values)
        outcomes["same"] += 1
    assert outcomes["CorruptState"] > 100 and outcomes["UnknownFormat"] > 20, outcomes
