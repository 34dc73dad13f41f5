"""The state store: what comes back is bit-equal to what went in, memory and disk stay inside their limits."""

from __future__ import annotations

import gc
import os
import random
import runpy
import struct
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from mgd_kernels import _core
from mgd_kernels.errors import BadArgument, CorruptState, StoreBusy, StoreClosed, StoreFull, StoreIOError, UnknownFormat
from mgd_kernels.store import Store
from mgd_kernels.store.format import DTYPES, decode_key, encode_key

KB, MB = 1 << 10, 1 << 20
CHUNK = 64 * KB  # of a store with two threads and 256 KiB of staging
HOSTILE = runpy.run_path(str(Path(__file__).parent / "hostile_stores" / "generate.py"))


@pytest.fixture(autouse=True)
def no_fault_left_armed():
    yield
    _core.store_inject("none")


def pattern(size: int, seed: int = 0) -> torch.Tensor:
    """`size` random bytes."""
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit (so that NaN equals itself and 0.0 differs from -0.0)."""
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def small_disk_store(path: Path, host: int = 256 * KB, **options) -> Store:
    """A store all of whose host memory is staging, so that everything goes to disk, in chunks of 64 KiB or less."""
    return Store(host=host, staging=host, disk=(path, 1 << 30), **options)


# --- values


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_equal(tmp_path, tier, dtype):
    bits = pattern(8 * 1001)
    value = bits.view(torch.int64).remainder(2).bool() if dtype == torch.bool else bits.view(dtype)  # NaNs included
    with Store(host=4 * MB, staging=MB, disk=(tmp_path, MB), device=MB) as store:
        store.put("x", value, tier=tier)
        assert store.tier("x") == tier
        assert same_bits(store.get("x"), value)
        out = torch.zeros_like(value)
        assert store.get("x", out=out) is out and same_bits(out, value)


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_lists_scalars_empty_and_strided_tensors(tmp_path, tier):
    values = [
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.empty(0, 7),
        torch.arange(60.0).reshape(3, 4, 5).transpose(0, 2),
        pattern(100_003),
        torch.ones(5, requires_grad=True),
    ]
    with Store(host=4 * MB, staging=MB, disk=(tmp_path, MB), device=MB) as store:
        store.put(("state", 7), values, tier=tier)
        back = store.get(("state", 7))
        assert isinstance(back, list) and len(back) == len(values)
        assert all(same_bits(a, b.detach()) for a, b in zip(back, values, strict=True))
        store.put("none", [], tier=tier)
        assert store.get("none") == []
        store.put("one", [torch.ones(1)], tier=tier)
        assert isinstance(store.get("one"), list)


# Around a page, a chunk of this store (64 KiB), and several.
@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 65535, 65536, 65537, 131072, 262144 + 17, 3_000_001])
def test_sizes_around_pages_and_chunks(tmp_path, size):
    value = pattern(size)
    with small_disk_store(tmp_path) as store:
        store.put("x", value)
        assert torch.equal(store.get("x"), value)
        unaligned = torch.zeros(size + 1, dtype=torch.uint8)[1:]
        assert torch.equal(store.get("x", out=unaligned), value)
        assert store.stats()["disk"]["used"] == 4096 + -(-size // 4096) * 4096


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_never_aliases(tmp_path, tier):
    value = pattern(300_000)
    kept = value.clone()
    with Store(host=4 * MB, staging=MB, disk=(tmp_path, MB), device=MB) as store:
        store.put("x", value, tier=tier)
        value.zero_()  # at once: the write behind must not see it
        first = store.get("x")
        first.zero_()
        assert torch.equal(store.get("x"), kept)


def test_replacing_and_deleting_across_tiers(tmp_path):
    with Store(host=4 * MB, staging=MB, disk=(tmp_path, MB), device=MB) as store:
        for i, tier in enumerate(["disk", "host", "device", "disk", "disk", "device", "host", "disk"]):
            store.put("x", pattern(100_000, i), tier=tier)
            assert (store.tier("x"), store.keys(), len(store)) == (tier, ["x"], 1)
            assert torch.equal(store.get("x"), pattern(100_000, i))
        store.delete("x")
        assert "x" not in store
        store.flush()
        used = store.stats()
        assert used["device"]["used"] == used["host"]["used"] == 0
        for call in (store.get, store.delete, store.tier, lambda key: store.prefetch([key])):
            with pytest.raises(KeyError, match="x"):
                call("x")


def test_keys_and_their_spelling(tmp_path):
    keys = ["a", "text-a", "ü/../☃ %41", "\udcff", ("grad", 0), ("grad", -12), ("a-b\n", 10**15), "step-1-x"]
    with Store.open(tmp_path / "s") as store:
        for i, key in enumerate(keys):
            store.put(key, torch.tensor([i]))
    with Store.open(tmp_path / "s") as store:
        assert set(store.keys()) == set(keys) and len(store) == len(keys)
        assert [store.get(key).item() for key in keys] == list(range(len(keys)))
    assert all(decode_key(encode_key(key)) == key for key in keys)
    assert all(path.parent == tmp_path / "s" for path in tmp_path.rglob("*.mgd"))


@pytest.mark.parametrize("key", ["", (), ("a",), ("", 1), ("a", 1.0), ("a", True), 3, None, "x" * 300])
def test_bad_keys(key):
    with Store(host=MB) as store, pytest.raises(BadArgument):
        store.put(key, torch.ones(3))


def test_bad_arguments(tmp_path):
    with Store(host=MB) as store:
        store.put("x", torch.ones(3))
        for bad in (torch.ones(3, dtype=torch.complex64), torch.ones(3).to_sparse(), 3.0, None, [torch.ones(1), "y"]):
            with pytest.raises((BadArgument, TypeError)):
                store.put("y", bad)
        with pytest.raises(BadArgument, match="tier"):
            store.put("y", torch.ones(3), tier="tape")
        for out in (torch.ones(4), torch.ones(3, dtype=torch.float64), torch.ones(6)[::2], [torch.ones(3)]):
            with pytest.raises(BadArgument, match="expected"):
                store.get("x", out=out)
        assert store.keys() == ["x"]
    for options in ({"host": -1}, {"host": 0, "disk": (tmp_path, 1)}, {"host": MB, "staging": 2 * MB}, {"host": 1.5}):
        with pytest.raises(BadArgument):
            Store(**options)


# --- limits


def test_fastest_tier_with_room_then_full(tmp_path):
    value = pattern(100 * KB)
    with Store(host=600 * KB, staging=256 * KB, disk=(tmp_path, 300 * KB), device=250 * KB) as store:
        for i in range(7):
            store.put(("g", i), value)
        assert [store.tier(("g", i)) for i in range(7)] == ["device"] * 2 + ["host"] * 3 + ["disk"] * 2
        with pytest.raises(StoreFull, match="Delete entries") as full:
            store.put(("g", 7), value)
        assert full.value.needs == 104 * KB + 0 and full.value.has < full.value.needs
        assert ("g", 7) not in store
        with pytest.raises(StoreFull) as full:
            store.put(("g", 7), value, tier="host")
        assert (full.value.needs, full.value.has) == (100 * KB, 344 * KB - 300 * KB)
        store.delete(("g", 6))
        store.put(("g", 7), value, tier="disk")  # room is free again as soon as delete returned
        assert all(torch.equal(store.get(key), value) for key in store.keys())
    with Store() as nothing, pytest.raises(StoreFull, match="none"):
        nothing.put("x", value)


def test_memory_stays_inside_the_limit(tmp_path):
    host = 512 * KB
    with small_disk_store(tmp_path, host) as store:
        for i in range(20):
            store.put(("g", i), pattern(300_000 + 4096 * i, i))  # many sizes: buffers are exchanged, not added
        store.prefetch([("g", i) for i in reversed(range(20))])
        for i in reversed(range(20)):
            assert torch.equal(store.get(("g", i)), pattern(300_000 + 4096 * i, i))
        pool = store.stats()["pool"]
        assert 0 < pool["peak"] <= pool["limit"] == host
        assert pool["reused"] > 50
        store.flush()


def test_exact_sizes_are_not_rounded_to_powers_of_two():
    with Store(host=64 * MB) as store:
        store.put("x", torch.zeros(33 * MB, dtype=torch.uint8))
        assert store.stats()["pool"]["mapped"] == 33 * MB


def test_prefetch_reads_ahead(tmp_path):
    with small_disk_store(tmp_path, MB, threads=14) as store:
        for i in range(4):
            store.put(("g", i), pattern(200_000, i))
        store.flush()
        store.prefetch([("g", 3), ("g", 2), ("g", 1), ("g", 0)])
        for i in (3, 2, 1, 0):
            assert torch.equal(store.get(("g", i)), pattern(200_000, i))
        stats = store.stats()
        assert stats["read"]["bytes"] == 4 * 49 * 4096  # every chunk was read once
        assert stats["read_ahead"]["hits"] == 16  # of chunks; there was room for all of them
        assert stats["read"]["bandwidth"] > 0 and stats["write"]["bytes"] == stats["read"]["bytes"]


def test_prefetched_buffers_give_way_to_writers(tmp_path):
    with small_disk_store(tmp_path, 256 * KB) as store:
        for i in range(4):
            store.put(("g", i), pattern(200_000, i))
        store.flush()
        store.prefetch([("g", i) for i in range(4)])  # fills the pool
        for i in range(4, 8):
            store.put(("g", i), pattern(200_000, i))  # must not wait for ever
        assert all(torch.equal(store.get(("g", i)), pattern(200_000, i)) for i in range(8))


@pytest.mark.parametrize("host", [64 * KB, 200 * KB])
def test_many_threads_tiny_pool(tmp_path, host):
    """Puts, gets, prefetches, replacements and deletions of several threads, with room for a few chunks only."""
    errors: list[BaseException] = []

    def work(seed: int, store: Store) -> None:
        rng = random.Random(seed)
        mine: dict[tuple[str, int], int] = {}
        try:
            for step in range(60):
                key = (f"thread{seed}", rng.randrange(8))
                what = rng.random()
                if what < 0.45 or not mine:
                    size = rng.choice([1, 5000, 16384, 40_000, 150_000])
                    store.put(key, [pattern(size, seed * 1000 + step), torch.tensor(step)])
                    mine[key] = step * 1_000_000 + size
                elif what < 0.6:
                    store.prefetch(rng.sample(sorted(mine), min(3, len(mine))))
                elif what < 0.7 and key in mine:
                    store.delete(key)
                    del mine[key]
                else:
                    key = rng.choice(sorted(mine))
                    step_of, size = divmod(mine[key], 1_000_000)
                    bits, number = store.get(key)
                    assert number.item() == step_of and torch.equal(bits, pattern(size, seed * 1000 + step_of))
        except BaseException as error:
            errors.append(error)

    with small_disk_store(tmp_path, host) as store:
        threads = [threading.Thread(target=work, args=(seed, store), daemon=True) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "the store waits for ever"
        assert not errors, errors
        store.flush()
        assert store.stats()["pool"]["peak"] <= host


# --- faults


@pytest.mark.parametrize("kind", ["short_read", "short_write", "interrupted", "refuse_direct"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_faults_that_are_recovered(tmp_path, kind, nth):
    value = pattern(300_000)
    with small_disk_store(tmp_path) as store:
        _core.store_inject(kind, nth, 2)
        store.put("x", value)
        store.flush()
        if kind == "short_read":
            _core.store_inject(kind, nth, 2)
        assert torch.equal(store.get("x"), value)
        disk = store.stats()["disk"]
        if disk["io"] == "buffered":
            assert "O_DIRECT" in disk["why"]
        else:
            assert kind != "refuse_direct"


@pytest.mark.parametrize(
    ("kind", "number"),
    [("write_error", "EIO"), ("no_space", "ENOSPC"), ("zero_write", "EIO"), ("rename_error", "EIO")],
)
def test_failed_write_is_told_and_stores_nothing(tmp_path, kind, number):
    import errno

    nths = [1] if kind == "rename_error" else [1, 3, 6]  # the first chunk, one inside, and the header
    for nth in nths:
        with Store.open(tmp_path / f"{kind}{nth}", host=256 * KB) as store:
            store.put("other", pattern(1000))
            store.flush()
            _core.store_inject(kind, nth)
            store.put("x", pattern(5 * CHUNK))  # five chunks
            with pytest.raises(StoreIOError) as told:
                store.flush()
            assert told.value.errno == getattr(errno, number) and str(tmp_path) in str(told.value)
            with pytest.raises(StoreIOError):
                store.get("x")
            assert torch.equal(store.get("other"), pattern(1000))
            assert store.stats()["disk"]["used"] == 2 * 4096  # what failed takes no room
            store.put("x", pattern(1000, 1))  # stored again, it is good
            store.flush()
            assert torch.equal(store.get("x"), pattern(1000, 1))
            _core.store_inject(kind, 1)
            store.put("y", pattern(1000, 1))
            with pytest.raises(StoreIOError):
                store.close()
        with Store.open(tmp_path / f"{kind}{nth}", host=256 * KB) as store:
            assert store.keys() == ["other", "x"]
        assert not list(tmp_path.rglob("*.tmp"))


def test_failed_read_is_told_and_can_be_repeated(tmp_path):
    value = pattern(200_000)
    with small_disk_store(tmp_path) as store:
        store.put("x", value)
        store.flush()
        _core.store_inject("read_error", 1, 100)
        store.prefetch(["x"])
        with pytest.raises(StoreIOError, match=r"read of .* failed"):
            store.get("x")
        _core.store_inject("none")
        assert torch.equal(store.get("x"), value)


def test_durable_reports_a_failed_sync(tmp_path):
    with Store.open(tmp_path / "s", durable=True) as store:
        store.put("x", pattern(10))
        store.flush()
        _core.store_inject("sync_error")
        store.put("x", pattern(10, 1))
        with pytest.raises(StoreIOError, match="fsync"):
            store.flush()
        store.delete("x")


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


def test_read_only_directory(tmp_path):
    _core.store_inject("open_read_only")
    with pytest.raises(StoreIOError, match="writable"):
        Store.open(tmp_path / "s")
    with Store.open(tmp_path / "s") as store:
        _core.store_inject("open_read_only")
        store.put("x", torch.ones(3))
        with pytest.raises(StoreIOError, match="Read-only"):
            store.flush()
        store.delete("x")


@pytest.mark.parametrize("case", HOSTILE["CASES"])
def test_hostile_directories(tmp_path, case):
    """A clear error for the hostile entry, and the good entry beside it is still good; nothing is changed."""
    make, error, text = HOSTILE["CASES"][case]
    directory = tmp_path / "store"
    make(directory)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    expected = {"CorruptState": CorruptState, "UnknownFormat": UnknownFormat, "StoreIOError": StoreIOError}[error]
    with pytest.raises(expected, match=text):
        with Store.open(directory, host=MB) as store:
            assert store.get("good").tolist() == [1.0, 2.0, 3.0]
            assert "bad" in store
            store.prefetch(["bad", "good"])
            store.get("bad")
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "LOCK"}
    assert after == {p: data for p, data in before.items() if p.name != "LOCK"}


def test_a_damaged_entry_can_be_deleted_or_stored_again(tmp_path):
    for name in ("symbolic link out of the store", "header torn in the middle", "version 2"):
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
    files = {
        "step--3-%C3%A9%2F.mgd": HOSTILE["entry"]("step--3-é/".encode(), tensors, sequence=True, chunk=CHUNK),
        "text-one.mgd": HOSTILE["entry"](b"text-one", tensors[:1], chunk=CHUNK),
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
                outcomes[type(error).__name__] += 1
                continue
        # A forged header may describe the same bytes as other tensors; the bytes are verified either way.
        joined = b"".join(
            t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in (back if type(back) is list else [back])
        )
        assert joined == b"".join(t.view(torch.uint8).numpy().tobytes() for t in values)
        outcomes["same"] += 1
    assert outcomes["CorruptState"] > 100 and outcomes["UnknownFormat"] > 20, outcomes


# --- directories and processes


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = "import sys, os, torch\nfrom mgd_kernels.store import Store\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)


def test_reopened_by_a_later_process(tmp_path):
    done = run_python(
        """
        store = Store.open(sys.argv[1], host=1 << 20, staging=1 << 18)
        store.put(("state", 1), [torch.arange(100_000), torch.ones(3).bfloat16()])
        store.put("late", torch.ones(7), tier="host")
        store.flush()
        os._exit(9)  # a crash: nothing is closed
        """,
        tmp_path / "s",
    )
    assert done.returncode == 9, done.stderr
    (tmp_path / "s" / "text-y.mgd.3.tmp").write_bytes(b"unfinished")
    (tmp_path / "s" / "notes.txt").write_bytes(b"the user's")
    with Store.open(tmp_path / "s") as store:
        assert store.keys() == [("state", 1)]
        numbers, ones = store.get(("state", 1))
        assert torch.equal(numbers, torch.arange(100_000)) and torch.equal(ones, torch.ones(3).bfloat16())
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["LOCK", "MGD_STORE", "notes.txt", "step-1-state.mgd"]


def test_replacing_keeps_the_old_entry_until_the_new_is_whole(tmp_path):
    with Store.open(tmp_path / "s") as store:
        store.put("x", pattern(1000))
        store.flush()
        _core.store_inject("write_error")
        store.put("x", pattern(1000, 1))
        with pytest.raises(StoreIOError):
            store.close()
    with Store.open(tmp_path / "s") as store:
        assert torch.equal(store.get("x"), pattern(1000))


def test_a_second_store_is_refused_and_told_who_holds_it(tmp_path):
    with Store.open(tmp_path / "s"):
        with pytest.raises(StoreBusy, match=str(os.getpid())) as busy:
            Store.open(tmp_path / "s")
        assert busy.value.pid == os.getpid()
        other = run_python("Store.open(sys.argv[1])", tmp_path / "s")
        assert "StoreBusy" in other.stderr and f"process {os.getpid()} has it open" in other.stderr
    Store.open(tmp_path / "s").close()


def test_scratch_directories_come_and_go(tmp_path):
    with small_disk_store(tmp_path) as one, small_disk_store(tmp_path) as two:
        one.put("x", pattern(1000))
        two.put("x", pattern(1000, 1))
        assert len(list(tmp_path.iterdir())) == 2
        assert torch.equal(one.get("x"), pattern(1000))
    assert list(tmp_path.iterdir()) == []
    dropped = small_disk_store(tmp_path)
    dropped.put("x", pattern(1000))
    del dropped
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    left = run_python("s = Store(host=1 << 20, disk=(sys.argv[1], 1 << 20)); s.put('x', torch.ones(9))", tmp_path)
    assert left.returncode == 0 and list(tmp_path.iterdir()) == []  # the interpreter's end closes it


def test_only_our_own_stale_directories_are_swept(tmp_path):
    crash = run_python(
        """
        s = Store(host=1 << 20, staging=1 << 20, disk=(sys.argv[1], 1 << 20))
        s.put('x', torch.ones(9)); s.flush(); os._exit(9)
        """,
        tmp_path,
    )
    assert crash.returncode == 9, crash.stderr
    (stale,) = tmp_path.iterdir()
    assert (stale / "text-x.mgd").exists()

    scratch = "mgd-kernels state store\nformat {}\n{}\n"
    kept = {
        "mgd-scratch-nomarker": {"data": "the user's"},
        "mgd-scratch-version2": {"MGD_STORE": scratch.format(2, "scratch")},
        "mgd-scratch-persistent": {"MGD_STORE": scratch.format(1, "persistent")},
        "mgd-scratch-mixed": {"MGD_STORE": scratch.format(1, "scratch"), "thesis.tex": "the user's"},
        "elsewhere": {"MGD_STORE": scratch.format(1, "scratch"), "text-a.mgd": "reached by a link only"},
    }
    for name, files in kept.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    (tmp_path / "mgd-scratch-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mgd-scratch-file").write_text("a file")
    with small_disk_store(tmp_path) as running:
        running.put("x", pattern(10))
        with small_disk_store(tmp_path):  # sweeps again: the running one is left alone
            assert torch.equal(running.get("x"), pattern(10))
        running.flush()
        assert not stale.exists()
    for name, files in kept.items():
        assert {file: (tmp_path / name / file).read_text() for file in files} == files
    assert (tmp_path / "mgd-scratch-link").is_symlink() and (tmp_path / "mgd-scratch-file").exists()


@pytest.mark.filterwarnings("ignore:os.fork", "ignore::pytest.PytestUnraisableExceptionWarning")  # of JAX's fork hook
def test_closed_and_forked_stores_say_so(tmp_path):
    store = small_disk_store(tmp_path)
    store.put("x", pattern(10))
    pid = os.fork()
    if pid == 0:  # the child reports through its exit status and runs none of pytest's
        try:
            store.put("y", pattern(10))
        except StoreClosed as error:
            store.close()  # must neither hang nor remove the parent's files
            os._exit(7 if "fork" in str(error) else 1)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert torch.equal(store.get("x"), pattern(10))
    store.close()
    store.close()
    for call in (store.keys, store.flush, store.stats, lambda: store.get("x"), lambda: store.put("x", pattern(1))):
        with pytest.raises(StoreClosed):
            call()
