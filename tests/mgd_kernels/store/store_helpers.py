"""Sizes, random contents and a small store that the tests of the state store share."""

from __future__ import annotations

from pathlib import Path

import torch

from mgd_kernels.store import Store

KB, MB = 1 << 10, 1 << 20
CHUNK = 64 * KB  # of a store with two threads and 256 KiB of staging


def pattern(size: int, seed: int = 0) -> torch.Tensor:
    """`size` random bytes."""
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit (so that NaN equals itself and 0.0 differs from -0.0)."""
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def small_disk_store(path: Path, host: int = 256 * KB, **options) -> Store:
    """A store all of whose host memory is staging, so that everything goes to disk, in chunks of 64 KiB or less."""
    return Store(host=host, staging=host, disk=(path, 1 << 30), **options)
