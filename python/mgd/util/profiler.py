"""Chrome traces by torch.profiler, with the phases of this package marked in them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from mgd.errors import StoreIOError
from mgd.util.files import path_of


@contextlib.contextmanager
def chrome_trace(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Write a trace of the block to `path`, even if the block raises. Does nothing if `path` is None."""
    if path is None:
        yield
        return
    path = path_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # so that a path that cannot be written fails before the work, not after it
    except OSError as error:
        raise StoreIOError(error.errno or 0, str(path), "cannot write the file") from error
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
    """A mark in the trace; None if no profiler is running."""
    return torch.profiler.record_function(f"mgd: {name}") if torch.autograd._profiler_enabled() else None
