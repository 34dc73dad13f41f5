"""Failing system calls under the state store: recovered from, or reported; what was stored before is still there."""

from __future__ import annotations

import errno

import pytest
import torch
from store_helpers import CHUNK, KB, pattern, small_disk_store

from mgd_kernels.errors import StoreIOError
from mgd_kernels.store import Store


@pytest.mark.parametrize("kind", ["short_read", "short_write", "interrupted", "refuse_direct"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_faults_that_are_recovered(inject, tmp_path, kind, nth):
    value = pattern(300_000)
    with small_disk_store(tmp_path) as store:
        inject(kind, nth, 2)
        store.put("x", value)
        store.flush()
        if kind == "short_read":
            inject(kind, nth, 2)
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
def test_failed_write_is_told_and_stores_nothing(inject, tmp_path, kind, number):
    nths = [1] if kind == "rename_error" else [1, 3, 6]  # the first chunk, one inside, and the header
    for nth in nths:
        with Store.open(tmp_path / f"{kind}{nth}", host=256 * KB) as store:
            store.put("other", pattern(1000))
            store.flush()
            inject(kind, nth)
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
            inject(kind, 1)
            store.put("y", pattern(1000, 1))
            with pytest.raises(StoreIOError):
                store.close()
        with Store.open(tmp_path / f"{kind}{nth}", host=256 * KB) as store:
            assert store.keys() == ["other", "x"]
        assert not list(tmp_path.rglob("*.tmp"))


def test_failed_read_is_told_and_can_be_repeated(inject, tmp_path):
    value = pattern(200_000)
    with small_disk_store(tmp_path) as store:
        store.put("x", value)
        store.flush()
        inject("read_error", 1, 100)
        store.prefetch(["x"])
        with pytest.raises(StoreIOError, match=r"read of .* failed"):
            store.get("x")
        inject("none")
        assert torch.equal(store.get("x"), value)


def test_durable_reports_a_failed_sync(inject, tmp_path):
    with Store.open(tmp_path / "s", durable=True) as store:
        store.put("x", pattern(10))
        store.flush()
        inject("sync_error")
        store.put("x", pattern(10, 1))
        with pytest.raises(StoreIOError, match="fsync"):
            store.flush()
        store.delete("x")


def test_read_only_directory(inject, tmp_path):
    inject("open_read_only")
    with pytest.raises(StoreIOError, match="writable"):
        Store.open(tmp_path / "s")
    with Store.open(tmp_path / "s") as store:
        inject("open_read_only")
        store.put("x", torch.ones(3))
        with pytest.raises(StoreIOError, match="Read-only"):
            store.flush()
        store.delete("x")


def test_replacing_keeps_the_old_entry_until_the_new_is_whole(inject, tmp_path):
    with Store.open(tmp_path / "s") as store:
        store.put("x", pattern(1000))
        store.flush()
        inject("write_error")
        store.put("x", pattern(1000, 1))
        with pytest.raises(StoreIOError):
            store.close()
    with Store.open(tmp_path / "s") as store:
        assert torch.equal(store.get("x"), pattern(1000))
