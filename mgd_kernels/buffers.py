"""Buffers that are used again: what torch's caching allocator does on a GPU, for the CPU.

An unrolled loop allocates several tensors of the model's size at every step and frees them in the backward pass. On the
CPU each of them is fresh memory, and the first touch of its pages costs several times what the fused kernel takes.
A buffer from `empty` goes to a list of free buffers when the last tensor on it is gone, and is handed out again.
"""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; malloc itself keeps smaller pieces
limit = 1 << 30  # bytes that lie free at most; beyond, memory goes back to the system

_free: dict[int, list[np.ndarray]] = defaultdict(list)


class _Lent(np.ndarray):
    """The array under a lent tensor: torch holds it for as long as the tensor's storage lives."""


def empty(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty([numel])`, with memory that may have been used before."""
    size = numel * dtype.itemsize
    if device.type != "cpu" or size < SMALLEST:
        return torch.empty(numel, dtype=dtype, device=device)
    try:
        memory = _free[size].pop()
    except IndexError:
        memory = torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
    lent = memory.view(_Lent)
    weakref.finalize(lent, _give_back, memory).atexit = False
    return torch.from_numpy(lent).view(dtype)


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return empty(numel, dtype, device).zero_()


def clone(tensor: Tensor) -> Tensor:
    """A copy of a tensor `[n]`."""
    return empty(tensor.numel(), tensor.dtype, tensor.device).copy_(tensor)


def free_bytes() -> int:
    """How much memory lies free."""
    return sum(size * len(buffers) for size, buffers in list(_free.items()))


def release() -> None:
    """Give the free memory back to the system."""
    _free.clear()


def _give_back(memory: np.ndarray) -> None:
    if free_bytes() + memory.nbytes <= limit:
        _free[memory.nbytes].append(memory)
