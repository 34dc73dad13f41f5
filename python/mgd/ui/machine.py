"""What this machine is: versions, processor, accelerators, and what of it is free."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgd.util.system import busy_cores, fields, free_memory

_PACKAGES = ("torch", "triton", "numpy", "matplotlib", "scikit-learn", "torchopt")
_FEATURES = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_bf16",
    "asimd",
)


def conditions() -> dict[str, Any]:
    """What a result was measured on, in JSON's types."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "processor": processor(),
        "instruction_set": extension()["isa"],
        "cores": usable_cores(),
        "accelerators": accelerators(),
        "free_memory_bytes": free_memory(),
        "busy_cores": busy_cores(),
    }


def describe(where: Mapping[str, Any]) -> str:
    """The conditions in one line."""
    model = where["processor"]["model"] if not where["accelerators"] else where["accelerators"][0]
    busy = ""
    if (where.get("busy_cores") or 0.0) > 0.3:
        busy = f", beside other programs, which took the time of {where['busy_cores']:.1f} cores at the start"
    elif "load_average" in where and where["load_average"][0] > 0.7:  # of earlier versions; of a minute before
        busy = f", load average {where['load_average'][0]:.1f} at the start"
    return f"{model}, {where['cores']} cores, torch {where['versions']['torch']}, {where['date']}{busy}"


def versions() -> dict[str, str | None]:
    """Of this package, Python, and the packages that matter here. None: not installed."""
    from mgd_kernels import __version__

    return {"mgd-kernels": __version__, "python": platform.python_version()} | {
        name: _version(name) for name in _PACKAGES
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> dict[str, Any]:
    cpu = fields(Path("/proc/cpuinfo"))
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    return {
        "model": cpu.get("model name") or platform.processor() or platform.machine(),
        "features": [feature for feature in _FEATURES if feature in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }


def extension() -> dict[str, Any]:
    """The C++ extension: why it is unavailable (None if it loads), the instruction set it uses, and those it could."""
    from mgd_kernels.backends import cpu

    reason = cpu.unavailable()
    if reason is not None:
        return {"unavailable": reason, "isa": None, "isas": []}
    from mgd_kernels import _core

    return {"unavailable": None, "isa": _core.isa(), "isas": list(_core.isas())}


def accelerators() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
