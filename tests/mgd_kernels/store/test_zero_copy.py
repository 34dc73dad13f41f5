"""Entries that pass through the store without a copy: lent buffers, leases, and buffers kept for the next get."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from mgd_kernels import Store, _core
from mgd_kernels.errors import BadArgument, CorruptState, StoreFull, StoreIOError

MiB = 1 << 20


@pytest.fixture
def store(tmp_path):
    with Store(host=16 * MiB, staging=16 * MiB, disk=(tmp_path, 1 << 30)) as made:
        yield made


def lend(store, seed, numel=200_000, others=()):
    """A lent buffer full of random numbers, and a copy of them."""
    lent = store.lend([numel], torch.float32, room=sum(t.nbytes + 64 for t in others))
    assert lent is not None
    lent.tensor.copy_(torch.randn(numel, generator=torch.Generator().manual_seed(seed)))
    return lent, lent.tensor.clone()


@pytest.mark.parametrize("numel", [0, 1, 1000, 16384, 262_144, 1_000_003])
def test_what_is_lent_and_put_comes_back(store, numel):
    others = [torch.tensor([1.5, 2.5], dtype=torch.float64), torch.arange(7)[::2], torch.ones(3, 2).t()]
    lent, wanted = lend(store, 0, numel, others)
    store.put_lent("a", lent, others)
    lease, got = store.lease("a"), store.get("a")
    for found in (lease, got):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(found, [wanted, *others], strict=True))
    assert store.stats()["handed"] == {"lent": 1, "leased": 1}
    assert store.tier("a") == "disk"


def test_the_buffer_is_not_used_for_anything_else_while_it_is_held(store):
    lent, wanted = lend(store, 0)
    address = lent.tensor.data_ptr()
    store.put_lent("a", lent)
    store.flush()
    for i in range(40):
        store.put(("more", i), torch.full((200_000,), float(i)), tier="disk")
    assert torch.equal(lent.tensor, wanted) and lent.tensor.data_ptr() == address
    (leased,) = store.lease("a")
    for i in range(40):
        store.get(("more", i))
    assert torch.equal(leased, wanted)
    used = store.stats()["pool"]["in_use"]
    del leased, lent
    gc.collect()
    assert store.stats()["pool"]["in_use"] < used


def test_a_store_still_copies_what_it_was_not_lent(store):
    tensor = torch.zeros(1000)
    store.put("a", tensor, tier="disk")
    tensor.fill_(1)
    assert store.get("a").eq(0).all()


def test_writing_after_the_put_is_found_out(store):
    lent, _ = lend(store, 0)
    store.put_lent("a", lent)
    lent.tensor[5] += 1  # perhaps before, perhaps after the thread wrote it
    store.flush()
    try:
        assert store.get("a")[0][5] != lent.tensor[5]
    except CorruptState as error:
        assert error.key == "a"


@pytest.mark.parametrize("how", ["get", "lease"])
def test_writing_into_a_lease_never_comes_back(store, how):
    lent, wanted = lend(store, 0)
    store.put_lent("a", lent)
    del lent
    (leased,) = store.lease("a", again=True)  # its buffer is kept for the next get
    leased[7] = 1e9
    with pytest.raises(CorruptState):
        getattr(store, how)("a")
    (found,) = store.get("a")  # the spoilt buffer is gone; the file is good
    assert torch.equal(found, wanted)


def test_a_lease_that_was_damaged_on_disk(store, tmp_path):
    lent, _ = lend(store, 0)
    store.put_lent("a", lent)
    store.flush()
    (path,) = tmp_path.glob("*/*.mgd")
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    for read in (store.lease, store.get):
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


def test_kept_buffers_give_way(store):
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


def test_leases_leave_the_store_room_to_go_on(store):
    """As many buffers as are to be had are held, and everything else still works."""
    held = []
    while (lent := store.lend([MiB], torch.float32)) is not None:
        held.append(lent)
    assert 1 <= len(held) <= 3  # 4 MiB each of 16, and one is kept back
    big = torch.randn(5 * MiB)
    store.put("big", big, tier="disk")
    assert torch.equal(store.get("big"), big)
    for i, lent in enumerate(held):
        lent.tensor.fill_(i)
        store.put_lent(("lent", i), lent)
    assert store.lend([MiB], torch.float32) is None, "the borrower still has them"
    assert store.lease(("lent", 0)) is None
    assert store.get(("lent", 0))[0].eq(0).all()
    held.clear()
    del lent
    gc.collect()
    assert store.lend([MiB], torch.float32) is not None


def test_many_threads(tmp_path):
    with Store(host=8 * MiB, staging=8 * MiB, disk=(tmp_path, 1 << 30)) as store:
        wrong = []

        def work(k):
            for i in range(30):
                lent = store.lend([100_000 + k], torch.float32)
                if lent is None:
                    store.put((f"t{k}", i), [torch.full((100_000 + k,), float(i))], tier="disk")
                else:
                    lent.tensor.fill_(i)
                    store.put_lent((f"t{k}", i), lent)
                del lent
                found = store.lease((f"t{k}", i), again=i % 2 == 0) or store.get((f"t{k}", i))
                if not (found[0].numel() == 100_000 + k and found[0].eq(i).all()):
                    wrong.append((k, i))
                del found

        threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong and not any(thread.is_alive() for thread in threads)


def test_what_is_not_on_disk_in_one_chunk_is_not_leased(store, tmp_path):
    with Store(host=MiB) as memory:
        memory.put("a", torch.ones(10))
        assert memory.lease("a") is None and memory.lend([10], torch.float32) is None
    store.put("big", torch.ones(3 * MiB), tier="disk")
    assert store.lease("big") is None


def test_bad_use(store):
    with pytest.raises(BadArgument, match="a shape, a dtype"):
        store.lend([3], torch.complex64)
    lent, _ = lend(store, 0)
    with pytest.raises(BadArgument, match="ask for room"):
        store.put_lent("a", lent, [torch.ones(MiB)])
    store.put_lent("a", lent)
    with pytest.raises(BadArgument, match="put once"):
        store.put_lent("b", lent)
    with pytest.raises(KeyError):
        store.lease("nothing")


def test_a_full_disk_leaves_the_buffer_lent(tmp_path):
    with Store(host=4 * MiB, disk=(tmp_path, 100_000)) as store:
        lent, wanted = lend(store, 0, 100_000)
        with pytest.raises(StoreFull):
            store.put_lent("a", lent)
        assert "a" not in store and torch.equal(lent.tensor, wanted)


def test_a_lent_entry_whose_write_fails(store):
    lent, _ = lend(store, 0)
    _core.store_inject("write_error")
    store.put_lent("a", lent)
    with pytest.raises(StoreIOError):
        store.lease("a")
    with pytest.raises(StoreIOError):
        store.flush()
    store.delete("a")
    store.flush()


def test_a_lease_outlives_the_store(tmp_path):
    with Store(host=4 * MiB, disk=(tmp_path, 1 << 30)) as store:
        lent, wanted = lend(store, 0)
        store.put_lent("a", lent)
        del lent
        (leased,) = store.lease("a")
    assert torch.equal(leased, wanted)


def test_a_lent_entry_outlives_the_process_that_lent(tmp_path):
    with Store.open(tmp_path / "p") as store:
        lent, wanted = lend(store, 0)
        store.put_lent(("gradient", 3), lent, [torch.ones(2)])
    with Store.open(tmp_path / "p") as store:
        found = store.lease(("gradient", 3))
        assert torch.equal(found[0], wanted) and found[1].eq(1).all()
