"""Records what is launched on a CUDA device as CUDA graphs (`torch.cuda.graph`). No GPU has run this yet.

What these graphs compute with lies in a pool of torch's allocator that they share: a replay leaves nothing there, and
all of them run one after another, on one stream. What they read and write beside it is their caller's.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from mgd.util.devices import set_aside

_PRECISIONS = ("all", "matmul", "conv", "rnn")
_FLAGS = """cudnn_enabled cudnn_benchmark cudnn_deterministic deterministic_algorithms linalg_preferred_backend
blas_preferred_backend cublas_allow_fp16_accumulation cublas_allow_fp16_reduced_precision_reduction
cublas_allow_bf16_reduced_precision_reduction""".split()


@functools.cache
def _settings() -> tuple[Callable[[], Hashable], ...]:
    """What tells torch's settings that choose kernels, as far as this version has them."""
    found = [getattr(torch._C, f"_get_{name}", None) for name in _FLAGS]
    precision = torch._C._get_fp32_precision_getter
    return (*filter(None, found), *[functools.partial(precision, "cuda", kind) for kind in _PRECISIONS])


def settings() -> Hashable:
    return tuple([get() for get in _settings()])


_unfinished: list[Any] = []  # graphs whose capture failed: torch's allocator goes on asking them what is theirs


class CudaRecorder:
    """See `mgd.autodiff.device_recording.Recorder`."""

    alignment = 256  # bytes: cuBLAS looks at as much

    def __init__(self, device: torch.device):
        self.device, self._index = device, device.index or 0
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self._held = [0]
        weakref.finalize(self, _give_back, device, self._held).atexit = False

    @property
    def held(self) -> int:
        return self._held[0]

    def settings(self) -> Hashable:
        return torch._C._cuda_getCurrentRawStream(self._index), settings()

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device)

    def set_random_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self.device)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            self._rehearse(run)
            return self._capture(run)

    def _rehearse(self, run: Callable[[], None]) -> None:
        """Run it where it will be recorded. What waits for the device raises here, where nothing is broken by it."""
        current, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that not everything is found that waits
                torch.cuda.set_sync_debug_mode("error")
                run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self._stream)

    def _capture(self, run: Callable[[], None]) -> Callable[[], None]:
        current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # cuBLAS's memory then comes from the pool: whoever clears it later does not free what graphs write to.
        torch._C._cuda_clearCublasWorkspaces()
        before = torch.cuda.memory_reserved()
        try:
            # Other threads, of the store, go on with their copies.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                run()
        except BaseException:
            self._recover(graph, current)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        grown = max(0, torch.cuda.memory_reserved() - before)
        self._held[0] += grown
        set_aside[self.device] += grown
        return graph.replay

    def _recover(self, graph: Any, current: Any) -> None:
        """A capture that cannot be ended leaves its stream the current one, and the allocator at its pool."""
        torch.cuda.set_stream(current)
        _unfinished.append(graph)
        with contextlib.suppress(RuntimeError):  # it was ended
            torch._C._cuda_endAllocateToPool(self._index, self._pool)


def _give_back(device: torch.device, held: list[int]) -> None:
    set_aside[device] -= held[0]
