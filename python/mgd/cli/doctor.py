"""What this machine offers: versions, processor, backends, memory, data sets; and what to do where one is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from mgd.recipes import data
from mgd.util.system import fields, free_memory
from mgd.util.text import format_bytes
from mgd_kernels import __version__, backends
from mgd_kernels.dispatch import PREFERENCE, forced

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


def examine() -> dict[str, Any]:
    """Everything that `describe` shows, in JSON's types."""
    available = backends()
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ("cpu", "cuda") if accelerators else ("cpu",)
    return {
        "versions": {"mgd-kernels": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "processor": _processor() | {"system": f"{platform.system()} {platform.machine()}"},
        "extension": _extension(),
        "backends": available,
        "chosen_backend": {device: forced() or _first(PREFERENCE[device], available) for device in devices},
        "accelerators": accelerators,
        "threads": {
            "torch": torch.get_num_threads(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "free_memory_bytes": free_memory(),
        "free_disk_bytes": {
            str(path): shutil.disk_usage(path).free for path in dict.fromkeys((Path.cwd(), Path(tempfile.gettempdir())))
        },
        "data_sets": data.installed(),
    }


def describe(found: dict[str, Any]) -> str:
    """The findings as text, a section each."""
    lines: list[str] = []

    def section(title: str, rows: dict[str, Any]) -> None:
        width = max(map(len, rows))
        lines.extend([title, *(f"  {name.ljust(width)}  {value}" for name, value in rows.items()), ""])

    def ready(why: str | None) -> str:
        return "ready" if why is None else f"not available: {why}"

    processor, extension, threads = found["processor"], found["extension"], found["threads"]
    section("Versions", {name: version or "not installed" for name, version in found["versions"].items()})
    section(
        "Processor",
        {
            "model": processor["model"],
            "features": " ".join(processor["features"]) or "unknown",
            "threads": f"{threads['torch']} used by torch, {threads['usable_cores']} cores usable"
            + (f", OMP_NUM_THREADS={threads['OMP_NUM_THREADS']}" if threads["OMP_NUM_THREADS"] else ""),
        },
    )
    section(
        "C++ extension",
        {"state": ready(extension["unavailable"])}
        | (
            {"instruction set": f"{extension['isa']} (usable here: {', '.join(extension['isas'])})"}
            if extension["isa"]
            else {}
        ),
    )
    section("Backends", {name: ready(why) for name, why in found["backends"].items()})
    section("Chosen backend", {f"for tensors on {device}": name for device, name in found["chosen_backend"].items()})
    section("Accelerators", {"found": ", ".join(found["accelerators"]) or "none; everything runs on the CPU"})
    memory = found["free_memory_bytes"]
    disks = {f"free disk at {path}": format_bytes(free) for path, free in found["free_disk_bytes"].items()}
    section("Room", {"free memory": "unknown" if memory is None else format_bytes(memory)} | disks)
    section("Data sets for the demo", {name: ready(why) for name, why in found["data_sets"].items()})
    return "\n".join(lines).rstrip()


def _first(names: tuple[str, ...], available: dict[str, str | None]) -> str:
    return next(name for name in names if available[name] is None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> dict[str, Any]:
    from mgd_kernels.backends import cpu

    reason = cpu.unavailable()
    if reason is not None:
        return {"unavailable": reason, "isa": None, "isas": []}
    from mgd_kernels import _core

    return {"unavailable": None, "isa": _core.isa(), "isas": list(_core.isas())}


def _processor() -> dict[str, Any]:
    cpu = fields(Path("/proc/cpuinfo"))
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    return {
        "model": cpu.get("model name") or platform.processor() or platform.machine(),
        "features": [feature for feature in _FEATURES if feature in flags],
    }
