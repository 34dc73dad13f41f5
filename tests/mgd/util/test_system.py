"""What malloc does with freed memory once a metagradient has been computed, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from mgd.util import system
from mgd.util.system import busy_cores

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")

PROGRAM = """
import torch
from mgd.util.system import free_memory, keep_freed_memory

def resident_memory():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

print(keep_freed_memory())
before, free = resident_memory(), free_memory()
blocks = [torch.ones(20 << 20, dtype=torch.uint8) for _ in range(8)]
del blocks
print(resident_memory() - before, free - free_memory())
"""


def run(program: str = PROGRAM, **environment: str) -> tuple[bool, int, int]:
    """Whether freed memory is kept; bytes that 160 MiB leave behind when freed, and by how much less is free."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=True)
    kept, grown, less = done.stdout.split()
    return kept == "True", int(grown), int(less)


def test_a_metagradient_leaves_malloc_as_it_is():
    metagradient = """
import mgd, mgd_kernels
model, x = torch.nn.Linear(2, 1), torch.ones(3, 2)
loss = lambda model, batch, z: model(batch).square().mean()
mgd.TrainingFunction(model, loss, [x, x], optimizer=mgd_kernels.SGD(lr=0.1), objective=lambda model: model(x).sum()
).metagradient({"lr": torch.tensor([0.1, 0.1])})
print(True)
"""
    _, grown, _ = run(PROGRAM.replace("print(keep_freed_memory())", metagradient))
    assert grown < 40 << 20


def test_freed_memory_is_kept_and_counted_as_free():
    kept, grown, less = run()
    assert kept and grown > 140 << 20
    assert less < 80 << 20  # other processes take memory, too


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_malloc_settings_of_the_environment_win(name):
    value = "131072" if name.startswith("MALLOC") else "glibc.malloc.trim_threshold=131072"
    kept, grown, _ = run(**{name: value})
    assert not kept and grown < 40 << 20


def test_how_busy_the_machine_is(tmp_path, monkeypatch):
    assert busy_cores(0.0, tmp_path) is None
    stat = tmp_path / "proc" / "stat"
    stat.parent.mkdir()
    stat.write_text("cpu  10 0 5 100 7 1 1 0 0 0\n")
    assert busy_cores(0.0, tmp_path) == 0.0

    def later(seconds):  # half of two cores' time; the rest was idle or waited for a disk
        ticks = round(seconds * os.sysconf("SC_CLK_TCK"))
        stat.write_text(f"cpu  {10 + ticks} 0 5 {100 + ticks // 2} {7 + ticks // 2} 1 1 0 0 0\n")

    clock = iter([0.0, 2.0])
    monkeypatch.setattr(system.time, "sleep", later)
    monkeypatch.setattr(system.time, "perf_counter", lambda: next(clock))
    assert busy_cores(2.0, tmp_path) == 1.0
