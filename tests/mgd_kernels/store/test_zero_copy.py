"""Entries that pass through the store without a copy: reservations, views, and buffers kept for the next get."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from mgd_kernels import Store
from mgd_kernels.errors import BadArgument, CorruptState, StoreFull, StoreIOError

MiB = 1 << 20


@pytest.fixture
def store(tmp_path):
    with Store(host=16 * MiB, staging=16 * MiB, disk=(tmp_path, 1 << 30)) as made:
        yield made


def reserve(store, seed, numel=200_000, others=()):
    """A reserved buffer full of random numbers, and a copy of them."""
    reserved = store.reserve([numel], torch.float32, room=sum(t.nbytes + 64 for t in others))
    assert reserved is not None
    reserved.tensor.copy_(torch.randn(numel, generator=torch.Generator().manual_seed(seed)))
    return reserved, reserved.tensor.clone()


@pytest.mark.parametrize("numel", [0, 1, 1000, 16384, 262_144, 1_000_003])
def test_what_is_reserved_and_committed_comes_back(store, numel):
    others = [torch.tensor([1.5, 2.5], dtype=torch.float64), torch.arange(7)[::2], torch.ones(3, 2).t()]
    reserved, wanted = reserve(store, 0, numel, others)
    store.commit("a", reserved, others)
    viewed, got = store.view("a"), store.get("a")
    for tensors in (viewed, got):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(tensors, [wanted, *others], strict=True))
    assert store.stats()["handed"] == {"lent": 1, "leased": 1}
    assert store.tier("a") == "disk"


def test_the_buffer_is_not_used_for_anything_else_while_it_is_held(store):
    reserved, wanted = reserve(store, 0)
    address = reserved.tensor.data_ptr()
    store.commit("a", reserved)
    store.flush()
    for i in range(40):
        store.put(("more", i), torch.full((200_000,), float(i)), tier="disk")
    assert torch.equal(reserved.tensor, wanted) and reserved.tensor.data_ptr() == address
    (viewed,) = store.view("a")
    for i in range(40):
        store.get(("more", i))
    assert torch.equal(viewed, wanted)
    used = store.stats()["pool"]["in_use"]
    del viewed, reserved
    gc.collect()
    assert store.stats()["pool"]["in_use"] < used


def test_put_copies(store):
    tensor = torch.zeros(1000)
    store.put("a", tensor, tier="disk")
    tensor.fill_(1)
    assert store.get("a").eq(0).all()


def test_writing_after_the_put_is_found_out(store):
    reserved, _ = reserve(store, 0)
    store.commit("a", reserved)
    reserved.tensor[5] += 1  # perhaps before, perhaps after the thread wrote it
    store.flush()
    try:
        assert store.get("a")[0][5] != reserved.tensor[5]
    except CorruptState as error:
        assert error.key == "a"


@pytest.mark.parametrize("how", ["get", "view"])
def test_writing_into_a_view_never_comes_back(store, how):
    reserved, wanted = reserve(store, 0)
    store.commit("a", reserved)
    del reserved
    (viewed,) = store.view("a", again=True)  # its buffer is kept for the next get
    viewed[7] = 1e9
    with pytest.raises(CorruptState):
        getattr(store, how)("a")
    (found,) = store.get("a")  # the spoilt buffer is gone; the file is good
    assert torch.equal(found, wanted)


def test_a_view_of_an_entry_that_was_damaged_on_disk(store, tmp_path):
    reserved, _ = reserve(store, 0)
    store.commit("a", reserved)
    store.flush()
    (path,) = tmp_path.glob("*/*.mgd")
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    for read in (store.view, store.get):
        with pytest.raises(CorruptState):
            read("a")


def test_again_reads_the_file_once(store):
    tensors = [torch.randn(500_000), torch.randn(300_000)]
    store.put("a", tensors, tier="disk")
    store.flush()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(store.get("a", again=True), tensors, strict=True))
    once = store.stats()["read"]["bytes"]
    assert sum(t.nbytes for t in tensors) <= once < sum(t.nbytes for t in tensors) + 3 * 4096
    store.get("a")  # from the buffers, and no longer kept
    store.get("a")
    assert store.stats()["read"]["bytes"] == 2 * once


def test_kept_buffers_are_dropped_for_others(store):
    store.put("a", torch.randn(2 * MiB), tier="disk")  # 8 MiB of 16
    store.get("a", again=True)
    big = torch.randn(3 * MiB)  # 12 MiB
    store.put("b", big, tier="disk")
    assert torch.equal(store.get("b"), big)


def test_a_kept_entry_that_is_replaced_or_deleted(store):
    first, second = torch.zeros(1000), torch.ones(1000)
    store.put("a", first, tier="disk")
    store.get("a", again=True)
    store.put("a", second, tier="disk")
    assert torch.equal(store.get("a", again=True), second)
    store.delete("a")
    with pytest.raises(KeyError):
        store.get("a")


def test_reservations_leave_the_store_room_to_go_on(store):
    """As many buffers as are to be had are held, and everything else still works."""
    held = []
    while (reserved := store.reserve([MiB], torch.float32)) is not None:
        held.append(reserved)
    assert 1 <= len(held) <= 3  # 4 MiB each of 16, and one is kept back
    big = torch.randn(5 * MiB)
    store.put("big", big, tier="disk")
    assert torch.equal(store.get("big"), big)
    for i, reserved in enumerate(held):
        reserved.tensor.fill_(i)
        store.commit(("held", i), reserved)
    assert store.reserve([MiB], torch.float32) is None, "the borrower still has them"
    assert store.view(("held", 0)) is None
    assert store.get(("held", 0))[0].eq(0).all()
    held.clear()
    del reserved
    gc.collect()
    assert store.reserve([MiB], torch.float32) is not None


def test_many_threads(tmp_path):
    with Store(host=8 * MiB, staging=8 * MiB, disk=(tmp_path, 1 << 30)) as store:
        wrong = []

        def work(k):
            for i in range(30):
                reserved = store.reserve([100_000 + k], torch.float32)
                if reserved is None:
                    store.put((f"t{k}", i), [torch.full((100_000 + k,), float(i))], tier="disk")
                else:
                    reserved.tensor.fill_(i)
                    store.commit((f"t{k}", i), reserved)
                del reserved
                found = store.view((f"t{k}", i), again=i % 2 == 0) or store.get((f"t{k}", i))
                if not (found[0].numel() == 100_000 + k and found[0].eq(i).all()):
                    wrong.append((k, i))
                del found

        threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong and not any(thread.is_alive() for thread in threads)


def test_what_is_not_on_disk_in_one_chunk_is_not_viewed(store, tmp_path):
    with Store(host=MiB) as memory:
        memory.put("a", torch.ones(10))
        assert memory.view("a") is None and memory.reserve([10], torch.float32) is None
    store.put("big", torch.ones(3 * MiB), tier="disk")
    assert store.view("big") is None


def test_bad_use(store):
    with pytest.raises(BadArgument, match="a shape, a dtype"):
        store.reserve([3], torch.complex64)
    reserved, _ = reserve(store, 0)
    with pytest.raises(BadArgument, match="reserve room"):
        store.commit("a", reserved, [torch.ones(MiB)])
    store.commit("a", reserved)
    with pytest.raises(BadArgument, match="committed once"):
        store.commit("b", reserved)
    with pytest.raises(KeyError):
        store.view("nothing")


def test_a_full_disk_leaves_the_buffer_reserved(tmp_path):
    with Store(host=4 * MiB, disk=(tmp_path, 100_000)) as store:
        reserved, wanted = reserve(store, 0, 100_000)
        with pytest.raises(StoreFull):
            store.commit("a", reserved)
        assert "a" not in store and torch.equal(reserved.tensor, wanted)


def test_a_committed_entry_whose_write_fails(inject, store):
    reserved, _ = reserve(store, 0)
    inject("write_error")
    store.commit("a", reserved)
    with pytest.raises(StoreIOError):
        store.view("a")
    with pytest.raises(StoreIOError):
        store.flush()
    store.delete("a")
    store.flush()


def test_a_view_outlives_the_store(tmp_path):
    with Store(host=4 * MiB, disk=(tmp_path, 1 << 30)) as store:
        reserved, wanted = reserve(store, 0)
        store.commit("a", reserved)
        del reserved
        (viewed,) = store.view("a")
    assert torch.equal(viewed, wanted)


def test_a_committed_entry_outlives_its_process(tmp_path):
    with Store.open(tmp_path / "p") as store:
        reserved, wanted = reserve(store, 0)
        store.commit(("gradient", 3), reserved, [torch.ones(2)])
    with Store.open(tmp_path / "p") as store:
        found = store.view(("gradient", 3))
        assert torch.equal(found[0], wanted) and found[1].eq(1).all()
