"""The recorder of CUDA graphs, where there is no CUDA: what it asks of torch, in which order, and how it ends."""

from __future__ import annotations

import contextlib
import gc
import inspect
from pathlib import Path

import pytest
import torch

from mgd.autodiff import cuda_graphs
from mgd.autodiff.cuda_graphs import CudaRecorder
from mgd.util.devices import set_aside

DEVICE = torch.device("cuda:1")


class Fake:
    """Takes the place of what the recorder uses of `torch.cuda`, and notes it. bad: captures cannot be ended."""

    def __init__(self, monkeypatch):
        self.log, self.current, self.mode, self.reserved, self.bad = [], "caller's", 0, 1000, False
        names = (
            "synchronize empty_cache memory_reserved current_stream set_stream stream device graph CUDAGraph".split()
        )
        names += "Stream graph_pool_handle get_sync_debug_mode set_sync_debug_mode".split()
        for name in names:
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        clear, end = lambda: self.log.append("clear"), lambda *arguments: self.log.append(("end", *arguments))
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        monkeypatch.setattr(cuda_graphs, "_unfinished", [])

    def synchronize(self):
        self.log.append("synchronize")

    def empty_cache(self):
        self.log.append("empty")

    def memory_reserved(self):
        return self.reserved

    def current_stream(self):
        return Stream(self, self.current)

    def set_stream(self, stream):
        self.current = stream.name

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def graph_pool_handle(self):
        return "pool"

    def Stream(self, device):
        assert device == DEVICE
        return Stream(self, "side")

    def CUDAGraph(self):
        return Graph()

    @contextlib.contextmanager
    def device(self, device):
        assert device == DEVICE
        yield

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        """As torch's, which leaves the stream where the end of a capture fails."""
        self.log.append(("begin", pool, capture_error_mode))
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.reserved += 64
            if self.bad:
                raise RuntimeError("capture invalidated")
            self.current = before


class Stream:
    def __init__(self, fake, name):
        self.fake, self.name = fake, name

    def wait_stream(self, other):
        self.fake.log.append((self.name, "waits for", other.name))


class Graph:
    def replay(self):
        return "replayed"


@pytest.fixture
def fake(monkeypatch):
    return Fake(monkeypatch)


def test_it_is_rehearsed_then_captured(fake):
    recorder, ran = CudaRecorder(DEVICE), []
    replay = recorder.record(lambda: ran.append((fake.current, fake.mode)))
    assert replay() == "replayed" and ran == [("side", "error"), ("side", 0)]
    assert fake.log == [
        ("side", "waits for", "caller's"),
        ("caller's", "waits for", "side"),
        "synchronize",
        "empty",
        "clear",
        ("begin", "pool", "thread_local"),
        "clear",
    ]
    assert fake.current == "caller's" and recorder.held == set_aside[DEVICE] == 64
    del recorder, replay
    gc.collect()
    assert set_aside[DEVICE] == 0


def test_what_waits_is_not_captured(fake):
    def waits():
        raise RuntimeError("called a synchronizing CUDA operation")

    recorder = CudaRecorder(DEVICE)
    with pytest.raises(RuntimeError, match="synchronizing"):
        recorder.record(waits)
    assert fake.current == "caller's" and fake.mode == 0 and "clear" not in fake.log and not recorder.held


def test_a_capture_that_cannot_be_ended_leaves_the_callers_stream(fake):
    fake.bad, recorder = True, CudaRecorder(DEVICE)
    with pytest.raises(RuntimeError, match="invalidated"):
        recorder.record(lambda: None)
    assert fake.current == "caller's" and fake.log[-2:] == [("end", 1, "pool"), "clear"] and not recorder.held
    assert len(cuda_graphs._unfinished) == 1


def test_an_interrupt_passes(fake):
    calls = []

    def interrupted():
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CudaRecorder(DEVICE).record(interrupted)
    assert fake.current == "caller's"


def test_torch_has_what_is_asked_of_it():
    parameters = inspect.signature(torch.cuda.graph.__init__).parameters
    assert list(parameters)[1:5] == ["cuda_graph", "pool", "stream", "capture_error_mode"]
    assert len(cuda_graphs._settings()) == len(cuda_graphs._FLAGS) + len(cuda_graphs._PRECISIONS)
    text = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_getCurrentRawStream"):
        assert f"def {name}(" in text
