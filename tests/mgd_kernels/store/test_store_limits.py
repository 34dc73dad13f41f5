"""Limits of the state store: memory and disk are never exceeded, and nothing waits for ever."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from store_helpers import KB, MB, pattern, small_disk_store

from mgd_kernels.errors import StoreFull
from mgd_kernels.store import Store


def test_fastest_tier_with_room_then_full(tmp_path):
    value = pattern(100 * KB)
    with Store(host=600 * KB, staging=256 * KB, disk=(tmp_path, 300 * KB)) as store:
        for i in range(5):
            store.put(("g", i), value)
        assert [store.tier(("g", i)) for i in range(5)] == ["host"] * 3 + ["disk"] * 2
        with pytest.raises(StoreFull, match="Delete entries") as full:
            store.put(("g", 5), value)
        assert full.value.needs == 104 * KB + 0 and full.value.has < full.value.needs
        assert ("g", 5) not in store
        with pytest.raises(StoreFull) as full:
            store.put(("g", 5), value, tier="host")
        assert (full.value.needs, full.value.has) == (100 * KB, 344 * KB - 300 * KB)
        store.delete(("g", 4))
        store.put(("g", 5), value, tier="disk")  # room is free again as soon as delete returned
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
