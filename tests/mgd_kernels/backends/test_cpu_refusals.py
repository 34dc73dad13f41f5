"""What the C++ backend refuses, and how it says why it cannot be used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import restore  # noqa: F401
from forked import run_python
from kernel_problem import (
    HYPER,
)

from mgd_kernels.arena import Segments
from mgd_kernels.backends import cpu
from mgd_kernels.errors import BadArgument
from mgd_kernels.rules import ADAM, Rule


def test_unsupported_names_the_reason():
    f32 = torch.zeros(4)
    assert cpu.unavailable() is None
    assert cpu.unsupported(ADAM, f32, f32) is None
    for params, grad, word in [
        (f32.half(), f32.half(), "float32 or float64"),
        (f32, f32.double(), "gradient"),
        (f32.double(), f32, "gradient"),
        (torch.zeros(8)[::2], f32, "contiguous"),
        (f32, torch.zeros(8)[::2], "contiguous"),
        (f32.to("meta"), f32, "CPU"),
    ]:
        assert word in cpu.unsupported(ADAM, params, grad)
    assert "no kernel" in cpu.unsupported(Rule("lion", ("lr",), ("exp_avg",)), f32, f32)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"grad": torch.zeros(9)}, "gradient"),
        ({"slots": [torch.zeros(10)]}, "2 slots"),
        ({"slots": [torch.zeros(10), torch.zeros(9)]}, "every slot"),
        ({"slots": [torch.zeros(10), torch.zeros(20)[::2]]}, "every slot"),
        ({"slots": [torch.zeros(10), torch.zeros(10).double()]}, "every slot"),
        ({"hyper": torch.zeros(1, 7)}, "float64"),
        ({"hyper": torch.zeros(1, 5).double()}, "hyperparameters"),
        ({"hyper": torch.zeros(2, 7).double()}, "hyperparameters"),
        ({"k": 0}, "step number"),
        ({"params": torch.zeros(2, 5), "grad": torch.zeros(2, 5)}, "flat"),
        ({"segments": Segments.single(11)}, "inside"),
        ({"segments": Segments(torch.tensor([[-1, 5, 0]]), 1)}, "inside"),
        ({"segments": Segments(torch.tensor([[0, 5, 1]]), 1)}, "inside"),
        ({"segments": Segments(torch.tensor([[0, 5, 0], [4, 6, 0]]), 1)}, "disjoint"),
        ({"segments": Segments(torch.tensor([[0, 5, 0]], dtype=torch.int32), 1)}, "int64"),
    ],
)
def test_bad_arguments_are_refused_before_memory_is_touched(change, word):
    arguments = {
        "rule": ADAM,
        "params": torch.zeros(10),
        "slots": [torch.zeros(10), torch.zeros(10)],
        "grad": torch.zeros(10),
        "hyper": torch.tensor([HYPER["adam"]], dtype=torch.float64),
        "k": 1,
        "segments": Segments.single(10),
    }
    cpu.step_(**arguments)
    with pytest.raises((BadArgument, ValueError), match=word):
        cpu.step_(**(arguments | change))


def run_with(**environment: str) -> subprocess.CompletedProcess[str]:
    return run_python(
        "from mgd_kernels.backends import cpu; print(cpu.unavailable() or cpu._core().isa())", **environment
    )


def test_the_environment_chooses_the_instruction_set():
    done = run_with(MGD_KERNELS_ISA="baseline")
    assert done.stdout.strip() == "baseline", done.stderr


def test_an_unknown_instruction_set_is_a_reason_and_no_silent_change():
    done = run_with(MGD_KERNELS_ISA="mmx")
    assert "'mmx'" in done.stdout and "baseline" in done.stdout, done.stderr


def test_a_missing_extension_is_a_reason(monkeypatch):
    cpu._load.cache_clear()
    monkeypatch.setitem(sys.modules, "mgd_kernels._core", None)
    monkeypatch.delattr("mgd_kernels._core", raising=False)
    try:
        reason = cpu.unavailable()
        assert reason is not None and "_core" in reason and "pip install" in reason
    finally:
        cpu._load.cache_clear()


def test_instruction_sets_share_no_code():
    """A unit compiled for AVX-512 must not lend the linker an inline function that a plain unit could pick."""
    root = Path(__file__).parents[3]
    objects = sorted(root.glob("build/*/CMakeFiles/mgd_*.dir/csrc/optim/cpu_kernels.cpp.o"))
    if not objects:
        pytest.skip("no build folder: installed from a wheel")
    for path in objects:
        isa = path.parents[2].name.removeprefix("mgd_").removesuffix(".dir")
        listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        defined = [line.split(maxsplit=2) for line in listing.splitlines() if line[:1] == "0"]
        shared = [name for _, kind, name in defined if kind not in "tbrd"]
        assert shared == [f"mgd::{isa}::kernels()"]
