"""Copies between a GPU and the store: on a GPU where there is one, and on a pretended one everywhere."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch

from mgd_kernels.errors import BadArgument, CorruptState, StoreFull
from mgd_kernels.store import Store, gpu_copy


class Pretended:
    """Stands for torch.cuda: a side stream runs a copy only when its event is waited for, as late as may be."""

    def __init__(self) -> None:
        self.pending: list = []
        self.registered: dict[int, int] = {}
        self.most_registered = 0
        self.random = random.Random(0)

    def run(self, until: int) -> None:
        for work in self.pending[:until]:
            if work is not None:
                work()
        self.pending[:until] = [None] * min(until, len(self.pending))

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address not in self.registered and address % 4096 == 0 and flags == 1
        self.registered[address] = size
        self.most_registered = max(self.most_registered, sum(self.registered.values()))
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture
def pretended(monkeypatch):
    gpu = Pretended()

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            pass

        def synchronize(self):
            gpu.run(len(gpu.pending))

    class Event:
        def __init__(self, blocking):
            pass

        def record(self, stream):
            self.upto = len(gpu.pending)

        def query(self):
            if gpu.random.random() < 0.5:
                return False
            self.synchronize()
            return True

        def synchronize(self):
            gpu.run(self.upto)

    def delayed_copy(target, source, non_blocking):
        assert non_blocking
        gpu.pending.append(lambda: torch.Tensor.copy_(target, source))

    class View:
        """A tensor whose slices copy when the pretended stream gets to it."""

        def __init__(self, t):
            self.t = t

        def __getitem__(self, index):
            return View(self.t[index])

        def copy_(self, source, non_blocking):
            delayed_copy(self.t, getattr(source, "t", source), non_blocking)

    real_frombuffer = torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", lambda *a, **k: View(real_frombuffer(*a, **k)))
    monkeypatch.setattr(gpu_copy, "_as_bytes", lambda t: View(t.reshape(-1).view(torch.uint8)))
    monkeypatch.setattr(gpu_copy, "_one_gpu", lambda tensors: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: gpu)
    return gpu


def put(store: Store, key: str, tensors: list[torch.Tensor], tier: str) -> None:
    from mgd_kernels.store.format import DTYPES, encode_key

    store._copies.put(encode_key(key), True, tensors, [(DTYPES[t.dtype], tuple(t.shape)) for t in tensors], tier)


def get(store: Store, key: str, like: list[torch.Tensor]) -> list[torch.Tensor]:
    from mgd_kernels.store.format import encode_key

    targets = [torch.zeros_like(t) for t in like]
    store._copies.get(encode_key(key), targets)
    return targets


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("staging", [64 << 10, 300 << 10])
def test_chunks_through_a_side_stream(tmp_path, pretended, tier, staging):
    values = [torch.randn(50_001), torch.tensor(3), torch.randn(7, 1001).bfloat16()]
    with Store(host=staging + (2 << 20), staging=staging, disk=(tmp_path, 1 << 30)) as store:
        store.put("before", torch.ones(30_000), tier="disk")  # its buffers are mapped before anything is pinned
        store.flush()
        for i in range(5):
            put(store, f"x{i}", [v + i for v in values], tier)
            assert all(work is None for work in pretended.pending), "put returned before its copies were made"
            for a, b in zip(get(store, f"x{i}", values), values, strict=True):
                assert torch.equal(a, b + i)
        store.prefetch([f"x{i}" for i in range(5)])
        for i in range(5):
            assert torch.equal(get(store, f"x{i}", values)[0], values[0] + i)
            assert torch.equal(store.get(f"x{i}")[2], values[2] + i)  # the host's way reads the same
        assert store.stats()["pinned"] == "yes"
        pool = store.stats()["pool"]
        assert sum(pretended.registered.values()) == pool["mapped"] and pretended.most_registered <= pool["limit"]
    assert pretended.registered == {}, "memory is unmapped only after it is unpinned"


def test_an_error_leaves_no_copy_under_way(tmp_path, pretended, monkeypatch):
    values = [torch.randn(100_000)]
    with Store(host=256 << 10, staging=256 << 10, disk=(tmp_path, 600_000)) as store:
        put(store, "x", values, "disk")
        with pytest.raises(StoreFull):
            put(store, "y", values, "disk")
        assert store.keys() == ["x"]
        store.flush()
        path = next(tmp_path.glob("*/text-x.mgd"))
        data = path.read_bytes()
        path.write_bytes(data[:200_000] + b"?" + data[200_001:])
        with pytest.raises(CorruptState) as damage:
            get(store, "x", values)
        assert damage.value.chunk == 2
        assert all(work is None for work in pretended.pending)
        path.write_bytes(data)
        assert torch.equal(get(store, "x", values)[0], values[0])


def test_failed_pinning_is_reported_and_harmless(tmp_path, pretended, monkeypatch):
    monkeypatch.setattr(pretended, "cudaHostRegister", lambda *_: 2)
    with Store(host=1 << 20) as store:
        put(store, "x", [torch.ones(9)], "host")
        assert torch.equal(get(store, "x", [torch.ones(9)])[0], torch.ones(9))
        assert store.stats()["pinned"] == "no: cudaHostRegister answered 2"


def test_without_a_gpu_nothing_is_pinned():
    with Store(host=1 << 20) as store:
        assert store.stats()["pinned"].startswith("no: no GPU")
        with pytest.raises(BadArgument, match="with values"):
            store.put("x", torch.ones(3, device="meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_on_a_gpu(tmp_path, tier):
    values = [torch.randn(3_000_001, device="cuda"), torch.randn(5, 7, device="cuda").bfloat16(), torch.tensor(3)]
    with Store(host=64 << 20, staging=32 << 20, disk=(tmp_path, 1 << 30)) as store:
        for i in range(3):
            store.put(("g", i), [v + i for v in values], tier=tier)
        store.prefetch([("g", i) for i in range(3)])
        for i in range(3):
            back = store.get(("g", i), out=[torch.zeros_like(v) for v in values])
            assert all(torch.equal(a, b + i) and a.device == b.device for a, b in zip(back, values, strict=True))
        assert store.stats()["pinned"] == "yes"
