"""Deterministic algorithms on an accelerator, for as long as a call lasts: a replayed step must have its bits again."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import torch

from mgd.errors import BadArgument, NotDeterministic

# cuBLAS reads this when it is first used, and torch refuses its products otherwise: as early as may be.
WORKSPACE, REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
if torch.version.cuda is not None:
    os.environ.setdefault(WORKSPACE, REPEATABLE[0])

_REFUSED = re.compile(r"(\S+) does not have a deterministic implementation")


@contextlib.contextmanager
def deterministic_on(device: torch.device) -> Iterator[None]:
    """Operators inside give the same bits each time, or NotDeterministic names one that does not. The caller's settings
    are as before at the end. On the CPU nothing changes: its operators repeat themselves.

    Raises BadArgument where the environment makes cuBLAS vary.
    """
    if device.type == "cpu":
        yield
        return
    if device.type == "cuda" and torch.version.cuda and os.environ.get(WORKSPACE) not in REPEATABLE:
        raise BadArgument(
            f"expected {WORKSPACE} to be {' or '.join(REPEATABLE)}, with which cuBLAS repeats its sums; got "
            f"{os.environ.get(WORKSPACE)!r}: leave it unset, or set it before the process starts"
        )
    flags = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills, benchmark = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # it would write all new memory once more
        torch.backends.cudnn.benchmark = False  # it chooses by the clock
        yield
    except RuntimeError as error:
        if found := _REFUSED.search(str(error)):
            raise NotDeterministic(found[1]) from error
        raise
    finally:
        torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])
        memory.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = benchmark
