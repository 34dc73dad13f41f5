"""A device that is not there: torch takes it for an accelerator, the CPU does its work (`pretend_device.cpp`).

What a GPU would do that costs time is counted: `launches`, copies, allocations, and what makes the host wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("pretend_device.cpp")
BUILD = Path(__file__).parents[3] / "build" / "pretend"
NAMES = "launches allocations allocated live peak uploads uploaded downloads downloaded waits".split()
MEMORY = 1 << 30  # bytes of each device


def missing() -> str | None:
    """Why the device cannot be had here."""
    return None if shutil.which("g++") else "no g++ to build the pretended device with"


@functools.cache
def load() -> ctypes.CDLL:
    """Build it, once for each version of torch (half a minute of one core), and make it known to torch as "pretend"."""
    root = Path(torch.__file__).parent
    text = SOURCE.read_bytes() + torch.__version__.encode()
    path = BUILD / f"{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        command = [
            "g++",
            "-std=c++20",
            "-O0",
            "-fPIC",
            "-shared",
            f"-I{root / 'include'}",
            "-o",
            str(made),
            str(SOURCE),
        ]
        done = subprocess.run([*command, f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        os.replace(made, path)
    library = ctypes.CDLL(str(path))
    library.pretend_counters.restype = ctypes.POINTER(ctypes.c_int64)
    library.pretend_waited.restype = ctypes.c_char_p
    library.pretend_exchange_lag.argtypes, library.pretend_exchange_lag.restype = [ctypes.c_int64], ctypes.c_int64
    library.pretend_register()
    torch.utils.rename_privateuse1_backend("pretend")
    torch._register_device_module("pretend", _module(library))
    torch.__future__.set_swap_module_params_on_conversion(True)  # else `model.to` parts tied weights, as no GPU does
    return library


def _module(library: ctypes.CDLL) -> types.ModuleType:
    """What `torch.cuda` is for CUDA, as far as it is used."""
    module = types.ModuleType("torch.pretend")

    @contextlib.contextmanager
    def device(which):
        before = library.pretend_exchange_device(torch.device(which).index or 0)
        try:
            yield
        finally:
            library.pretend_exchange_device(before)

    def mem_get_info(which=None):
        return MEMORY - library.pretend_counters()[NAMES.index("live")] - module.cached, MEMORY

    module.cached = 0  # bytes that an allocator would hold and that no tensor has
    module.is_available, module.device_count = lambda: True, lambda: 1  # of two: torch warns of several
    module.get_rng_state = lambda which=None: torch.get_rng_state()  # its random numbers are the CPU's
    module.set_rng_state = lambda state, which=None: torch.set_rng_state(state)
    module.synchronize = lambda which=None: torch.accelerator.synchronize()
    module.current_device = lambda: torch.accelerator.current_device_index()
    module.device, module.mem_get_info = device, mem_get_info
    module.memory_allocated = lambda which=None: library.pretend_counters()[NAMES.index("live")]
    module.memory_reserved = lambda which=None: module.memory_allocated() + module.cached
    module.Stream, module.Event, module.stream = torch.Stream, torch.Event, lambda stream: stream
    module.current_stream = lambda which=None: torch.accelerator.current_stream(which)
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module


@dataclass
class Counted:
    """What happened in a block. waited: the operators that made the host wait, and how often."""

    numbers: dict[str, int] = field(default_factory=dict)
    waited: Counter = field(default_factory=Counter)

    def __getattr__(self, name: str) -> int:
        try:
            return self.__dict__["numbers"][name]
        except KeyError:
            raise AttributeError(name) from None


@contextlib.contextmanager
def lagging(launches: int) -> Iterator[None]:
    """In the block copies on side streams are made after so many launches, if nobody waits for them earlier."""
    library = load()
    before = library.pretend_exchange_lag(launches)
    try:
        yield
    finally:
        library.pretend_exchange_lag(before)


@contextlib.contextmanager
def counted() -> Iterator[Counted]:
    """Counts what the device does in the block."""
    library, found = load(), Counted()
    library.pretend_reset()
    yield found
    counters = library.pretend_counters()
    found.numbers = {name: counters[i] for i, name in enumerate(NAMES)}
    found.waited = Counter(library.pretend_waited().decode().split())
