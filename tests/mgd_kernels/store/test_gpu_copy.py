"""Copies between a GPU and the store: on a GPU where there is one, and on a pretended one everywhere."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch

from mgd_kernels.errors import BadArgument, CorruptState, StoreFull
from mgd_kernels.memory import as_bytes
from mgd_kernels.store import Store, gpu_copy


class Pretended:
    """Stands for torch.cuda: a side stream runs a copy only when its event is waited for, as late as may be."""

    def __init__(self) -> None:
        self.pending: list = []
        self.registered: dict[int, int] = {}
        self.most_registered = 0
        self.random = random.Random(0)
        self.quick = 0.5  # how likely an event has come to pass when it is asked for
        self.putting = False

    def run(self, until: int) -> None:
        for work in self.pending[:until]:
            if work is not None:
                work[0]()
        self.pending[:until] = [None] * min(until, len(self.pending))

    def used(self, start: int, size: int) -> None:
        """A buffer is to be used: no copy that is still to be made may write to it, nor read what a put overwrites."""
        for work in self.pending:
            if work is not None:
                _, first, last, writes = work
                assert not (start < last and first < start + size and (writes or self.putting)), "used too early"

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
            if self is main:  # what it does next may read or write everything
                other.synchronize()

        def synchronize(self):
            gpu.run(len(gpu.pending))

    class Event:
        def __init__(self, blocking):
            self.upto = 0

        def record(self, stream):
            self.upto = len(gpu.pending)

        def query(self):
            if gpu.random.random() >= gpu.quick and any(gpu.pending[: self.upto]):
                return False
            self.synchronize()
            return True

        def synchronize(self):
            gpu.run(self.upto)

    main = Stream(torch.device("cuda"))

    def delayed_copy(target, source, non_blocking):
        assert non_blocking
        host = target if gpu.putting else source
        first = host.data_ptr()
        copy = lambda: torch.Tensor.copy_(target, source)
        gpu.pending.append((copy, first, first + host.nbytes, gpu.putting))

    class View:
        """A tensor whose slices copy when the pretended stream gets to it."""

        def __init__(self, t):
            self.t = t

        def __getitem__(self, index):
            return View(self.t[index])

        def copy_(self, source, non_blocking):
            delayed_copy(self.t, getattr(source, "t", source), non_blocking)

    real_frombuffer = torch.frombuffer

    def frombuffer(*arguments, **options):
        found = real_frombuffer(*arguments, **options)
        gpu.used(found.data_ptr(), found.nbytes)
        return View(found)

    for name, putting in (("put", True), ("get", False)):
        real = getattr(gpu_copy.DeviceCopies, name)

        def told(self, *arguments, real=real, putting=putting):
            gpu.putting = putting
            return real(self, *arguments)

        monkeypatch.setattr(gpu_copy.DeviceCopies, name, told)
    monkeypatch.setattr(torch, "frombuffer", frombuffer)
    monkeypatch.setattr(gpu_copy, "as_bytes", lambda t: View(as_bytes(t)))
    monkeypatch.setattr(gpu_copy, "_one_gpu", lambda tensors: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: gpu)
    return gpu


def put(store: Store, key: str, tensors: list[torch.Tensor], tier: str, unchanging: bool = False) -> None:
    from mgd_kernels.store.format import DTYPES, encode_key

    layout = [(DTYPES[t.dtype], tuple(t.shape)) for t in tensors]
    store._copies.put(encode_key(key), True, tensors, layout, tier, unchanging)


def get(store: Store, key: str, like: list[torch.Tensor]) -> list[torch.Tensor]:
    from mgd_kernels.store.format import encode_key

    targets = [torch.zeros_like(t) for t in like]
    store._copies.get(encode_key(key), targets)
    return targets


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("staging", [64 << 10, 300 << 10])
def test_chunks_through_a_side_stream(tmp_path, pretended, tier, staging):
    one = torch.randn(4, 5)[1:2, 2]  # contiguous, with a stride of 5
    values = [torch.randn(50_001), torch.tensor(3), one, torch.randn(7, 1001).bfloat16()]
    with Store(host=staging + (2 << 20), staging=staging, disk=(tmp_path, 1 << 30)) as store:
        store.put("before", torch.ones(30_000), tier="disk")  # its buffers are mapped before anything is pinned
        store.flush()
        for i in range(5):
            put(store, f"x{i}", moving := [v + i for v in values], tier)
            for v in moving:
                v.zero_()  # by the current stream, which waits
            for a, b in zip(get(store, f"x{i}", values), values, strict=True):
                assert torch.equal(a, b + i)
        store.prefetch([f"x{i}" for i in range(5)])
        for i in range(5):
            assert torch.equal(get(store, f"x{i}", values)[0], values[0] + i)
            assert torch.equal(store.get(f"x{i}")[3], values[3] + i)  # the host's way reads the same
        assert store.stats()["pinned"] == "yes"
        pool = store.stats()["pool"]
        assert sum(pretended.registered.values()) == pool["mapped"] and pretended.most_registered <= pool["limit"]
    assert pretended.registered == {}, "memory is unmapped only after it is unpinned"


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("quick", [0.0, 0.5])
def test_what_is_put_is_on_its_way_when_put_returns(tmp_path, pretended, tier, quick):
    """Nobody waits before somebody asks: the tensors are held, and no buffer is used before its copy is made."""
    pretended.quick = quick
    values = [torch.randn(30_001), torch.tensor(3)]
    with Store(host=8 << 20, staging=256 << 10, disk=(tmp_path, 1 << 30)) as store:
        for i in range(12):
            put(store, f"x{i}", [v + i for v in values], tier, unchanging=True)
            assert i % 2 or quick or any(pretended.pending), "put waited"
        store.prefetch([f"x{i}" for i in range(12)])
        assert store.stats()["waited"] <= 12 * 2 + 2
        assert "x11" in store and not any(pretended.pending), "asked for, it is there"
        for i in reversed(range(12)):
            found = get(store, f"x{i}", values)
            assert torch.equal(found[0], values[0] + i)
            store.delete(f"x{i}")  # its buffers may be used again only when they have been read
            put(store, f"y{i}", [v - i for v in values], tier, unchanging=True)
        put(store, "y3", [v + 5 for v in values], tier, unchanging=True)
        store.flush()
        assert torch.equal(store.get("y3")[0], values[0] + 5) and torch.equal(store.get("y4")[0], values[0] - 4)
        put(store, "last", values, tier, unchanging=True)
    assert not any(pretended.pending)


def test_events_that_come_to_pass_in_time_make_nobody_wait(tmp_path, pretended):
    pretended.quick = 1.0
    with Store(host=8 << 20, staging=256 << 10, disk=(tmp_path, 1 << 30)) as store:
        for i in range(9):
            put(store, f"x{i}", [torch.full((70_000,), float(i))], "disk" if i % 2 else "host", unchanging=True)
        assert store.stats()["waited"] == 0
        assert all(bool((store.get(f"x{i}")[0] == i).all()) for i in range(9))


def test_the_host_tier_has_no_checksum_and_the_disk_has(tmp_path, pretended, monkeypatch):
    from mgd_kernels import _core

    values = [torch.randn(1000)]
    with Store(host=8 << 20, staging=256 << 10, disk=(tmp_path, 1 << 30)) as store:
        for tier in ("host", "disk"):
            put(store, tier, values, tier)
        store.flush()
        data = next(tmp_path.glob("*/text-disk.mgd")).read_bytes()
        payload = data[-(-(4 * 1000) // 4096) * 4096 * -1 :]
        assert _core.checksum(payload).to_bytes(8, "little") in data[: -len(payload)]
        assert torch.equal(get(store, "host", values)[0], values[0])
        assert torch.equal(store.get("host")[0], values[0]), "read by the host, too"


def test_a_store_that_nobody_closes_makes_its_copies(tmp_path, pretended):
    store = Store(host=1 << 20)
    put(store, "x", [torch.ones(9)], "host", unchanging=True)
    assert any(pretended.pending)
    del store
    assert not any(pretended.pending) and not pretended.registered


def test_what_cannot_be_put_does_not_hold_the_store_up(tmp_path, pretended, monkeypatch):
    with Store(host=8 << 20, staging=256 << 10) as store:
        monkeypatch.setattr(gpu_copy, "as_bytes", lambda t: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            put(store, "x", [torch.randn(100)], "host")
    assert not any(pretended.pending)


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
