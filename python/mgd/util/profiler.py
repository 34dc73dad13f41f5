"""A Chrome trace of what runs inside a block, by torch.profiler, with the package's phases marked in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def chrome_trace(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Write the trace of the block to `path` where one is given, also where the block ends with an error."""
    if path is None:
        yield
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # a path that cannot be written is said before the work, not after it
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    try:
        with profiler:
            yield
    finally:
        profiler.export_chrome_trace(str(path))


def phase(name: str) -> contextlib.AbstractContextManager | None:
    """A mark in the trace; None where nobody profiles."""
    return torch.profiler.record_function(f"mgd: {name}") if torch.autograd._profiler_enabled() else None
