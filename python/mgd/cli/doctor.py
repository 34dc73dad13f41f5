"""What this machine offers: versions, processor, backends, memory, data sets; and what to do where one is missing."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from mgd.recipes import data
from mgd.ui import machine
from mgd.util.system import free_memory
from mgd.util.text import format_bytes
from mgd_kernels import backends
from mgd_kernels.dispatch import PREFERENCE, forced


def examine() -> dict[str, Any]:
    """Everything that `describe` shows, in JSON's types."""
    available, accelerators = backends(), machine.accelerators()
    devices = ("cpu", "cuda") if accelerators else ("cpu",)
    return {
        "versions": machine.versions(),
        "processor": machine.processor(),
        "extension": machine.extension(),
        "backends": available,
        "chosen_backend": {device: forced() or _first(PREFERENCE[device], available) for device in devices},
        "accelerators": accelerators,
        "threads": {
            "torch": torch.get_num_threads(),
            "usable_cores": machine.usable_cores(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "free_memory_bytes": free_memory(),
        "free_disk_bytes": {
            str(path): shutil.disk_usage(path).free for path in dict.fromkeys((Path.cwd(), Path(tempfile.gettempdir())))
        },
        "data_sets": data.installed(),
    }


def describe(offer: dict[str, Any]) -> str:
    """What `examine` returns, as text, one section for each entry."""
    lines: list[str] = []

    def section(title: str, rows: dict[str, Any]) -> None:
        width = max(map(len, rows))
        lines.extend([title, *(f"  {name.ljust(width)}  {value}" for name, value in rows.items()), ""])

    def ready(why: str | None) -> str:
        return "ready" if why is None else f"not available: {why}"

    processor, extension, threads = offer["processor"], offer["extension"], offer["threads"]
    section("Versions", {name: version or "not installed" for name, version in offer["versions"].items()})
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
    section("Backends", {name: ready(why) for name, why in offer["backends"].items()})
    section("Chosen backend", {f"for tensors on {device}": name for device, name in offer["chosen_backend"].items()})
    section("Accelerators", {"devices": ", ".join(offer["accelerators"]) or "none; everything runs on the CPU"})
    memory = offer["free_memory_bytes"]
    disks = {f"free disk at {path}": format_bytes(free) for path, free in offer["free_disk_bytes"].items()}
    section("Memory and disk", {"free memory": "unknown" if memory is None else format_bytes(memory)} | disks)
    section("Data sets for the demo", {name: ready(why) for name, why in offer["data_sets"].items()})
    return "\n".join(lines).rstrip()


def _first(names: tuple[str, ...], available: dict[str, str | None]) -> str:
    return next(name for name in names if available[name] is None)
