"""Entries of the state store: what comes back is bit-equal to what went in, whichever tier it was in."""

from __future__ import annotations

import pytest
import torch
from store_helpers import MB, pattern, same_bits, small_disk_store

from mgd_kernels.errors import BadArgument
from mgd_kernels.store import Store
from mgd_kernels.store.format import DTYPES, decode_key, encode_key


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_equal(tmp_path, tier, dtype):
    bits = pattern(8 * 1001)
    value = bits.view(torch.int64).remainder(2).bool() if dtype == torch.bool else bits.view(dtype)  # NaNs included
    with Store(host=4 * MB, staging=MB, disk=(tmp_path, MB)) as store:
        store.put("x", value, tier=tier)
        assert store.tier("x") == tier
        assert same_bits(store.get("x"), value)
        out = torch.zeros_like(value)
        assert store.get("x", out=out) is out and same_bits(out, value)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_lists_scalars_empty_and_strided_tensors(tmp_path, tier):
    values = [
        torch.tensor(3.5, dtype=torch.bfloat16),
        torch.empty(0, 7),
        torch.arange(60.0).reshape(3, 4, 5).transpose(0, 2),
        pattern(100_003),
        torch.ones(5, requires_grad=True),
    ]
    with Store(host=4 * MB, staging=MB, disk=(tmp_path, MB)) as store:
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


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_never_aliases(tmp_path, tier):
    value = pattern(300_000)
    copy = value.clone()
    with Store(host=4 * MB, staging=MB, disk=(tmp_path, MB)) as store:
        store.put("x", value, tier=tier)
        value.zero_()  # at once: the write behind must not see it
        first = store.get("x")
        first.zero_()
        assert torch.equal(store.get("x"), copy)


def test_replacing_and_deleting_across_tiers(tmp_path):
    with Store(host=4 * MB, staging=MB, disk=(tmp_path, MB)) as store:
        for i, tier in enumerate(["disk", "host", "disk", "disk", "host", "host", "disk"]):
            store.put("x", pattern(100_000, i), tier=tier)
            assert (store.tier("x"), store.keys(), len(store)) == (tier, ["x"], 1)
            assert torch.equal(store.get("x"), pattern(100_000, i))
        store.delete("x")
        assert "x" not in store
        store.flush()
        assert store.stats()["host"]["used"] == 0
        for call in (store.get, store.delete, store.tier, lambda key: store.prefetch([key])):
            with pytest.raises(KeyError, match="x"):
                call("x")


def test_keys_and_their_spelling(tmp_path):
    keys = ["a", "text-a", "ü/../☃ %41", "\0", ("grad", 0), ("grad", -12), ("a-b\n", 10**15), "step-1-x"]
    with Store.open(tmp_path / "s") as store:
        for i, key in enumerate(keys):
            store.put(key, torch.tensor([i]))
    with Store.open(tmp_path / "s") as store:
        assert set(store.keys()) == set(keys) and len(store) == len(keys)
        assert [store.get(key).item() for key in keys] == list(range(len(keys)))
    assert all(decode_key(encode_key(key)) == key for key in keys)
    assert all(path.parent == tmp_path / "s" for path in tmp_path.rglob("*.mgd"))


BAD_KEYS = ["", (), ("a",), ("", 1), ("a", 1.0), ("a", True), 3, None, "x" * 300, "\udcff", ("\ud800", 1)]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_bad_keys(key):
    with Store(host=MB) as store, pytest.raises(BadArgument):
        store.put(key, torch.ones(3))


def test_bad_arguments(tmp_path):
    with Store(host=MB) as store:
        store.put("x", torch.ones(3))
        not_a_bool = torch.tensor([0, 1, 2], dtype=torch.uint8).view(torch.bool)
        not_dense = torch.ones(3).to_sparse()
        for bad in (torch.ones(3).cfloat(), not_dense, not_a_bool, 3.0, None, [torch.ones(1), "y"]):
            with pytest.raises(BadArgument):
                store.put("y", bad)
        with pytest.raises(BadArgument, match="tier"):
            store.put("y", torch.ones(3), tier="tape")
        for out in (torch.ones(4), torch.ones(3, dtype=torch.float64), torch.ones(6)[::2], [torch.ones(3)]):
            with pytest.raises(BadArgument, match="expected"):
                store.get("x", out=out)
        assert store.keys() == ["x"]
    places = [{"host": MB, "disk": (place, MB)} for place in ("", "a\0b", "\ud800", 3)]
    sizes = [{"host": -1}, {"host": 0, "disk": (tmp_path, 1)}, {"host": MB, "staging": 2 * MB}, {"host": 1.5}]
    for options in places + sizes:
        with pytest.raises(BadArgument):
            Store(**options)
