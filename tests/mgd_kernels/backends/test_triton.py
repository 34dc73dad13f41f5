"""The Triton backend: its numerics (on a GPU, else in Triton's interpreter), and what its kernels compile to."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mgd_kernels import aot
from mgd_kernels.backends import triton
from mgd_kernels.errors import BackendUnavailable, BadArgument

NUMERICS = [str(Path(__file__).with_name(name)) for name in ("triton_numerics.py", "triton_copies.py")]
SUITE = ("sm_90",)  # compiled in the ordinary suite; the other targets in `make bench`
all_targets = pytest.mark.parametrize(
    "target", [pytest.param(t, marks=[] if t in SUITE else pytest.mark.slow) for t in aot.TARGETS]
)


def run(*arguments: str, **environment: str) -> str:
    """Run Python in a process of its own, for which alone `environment` holds: the interpreter patches Triton."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, *arguments], env=inherited | environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-8000:]
    return process.stdout


# --- Numerics ----------------------------------------------------------------------------------------------------


def test_numerics():
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *NUMERICS, **environment)
    assert " passed" in output and "failed" not in output and "skipped" not in output, output


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_without_a_gpu_it_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in triton.unavailable()
    x = torch.zeros(4)
    assert "expected tensors on a GPU; got cpu" in triton.unsupported(aot.ADAM, x, x)


def test_the_driver_is_asked_once_for_the_options_of_a_launch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from triton.runtime import driver

    asked: list[int] = []

    class Driver:
        def get_current_target(self):
            asked.append(1)
            return types.SimpleNamespace(backend="hip")

    monkeypatch.setattr(driver, "_active", Driver())
    found = [triton._options(512, "nesterov") for _ in range(3)]
    assert found[0] == found[2] and found[0]["num_warps"] == 2 and len(asked) == 1


# --- Generated code ----------------------------------------------------------------------------------------------


@functools.cache
def table(target: str) -> dict[tuple[str, str, str], dict]:
    rows = aot.static_table([target], rules=("adam", "nesterov"))
    return {(row["rule"], row["pass"], row["gradient"]): row for row in rows}


# Tensors of n elements that a pass must read and write, and how many of them are of the gradient's dtype.
FLOOR = {
    ("adam", "step"): (7, 1),  # reads p m v g, writes p m v
    ("adam", "vjp"): (11, 2),  # reads p m v g and three adjoints, writes three adjoints and u
    ("nesterov", "step"): (5, 1),  # as SGD with momentum: one slot
    ("nesterov", "vjp"): (8, 2),
}


@all_targets
@pytest.mark.parametrize("rule, pass_", list(FLOOR))
@pytest.mark.parametrize("gradient, size", [("fp32", 4), ("bf16", 2)])
def test_bytes_per_parameter_are_the_floor(target, rule, pass_, gradient, size):
    tensors, of_gradient = FLOOR[rule, pass_]
    row = table(target)[rule, pass_, gradient]
    assert row["bytes_per_parameter"] == 4 * (tensors - of_gradient) + size * of_gradient
    if (rule, gradient) == ("adam", "fp32"):
        assert row["bytes_per_parameter"] == {"step": 28, "vjp": 44}[pass_]


@all_targets
@pytest.mark.parametrize("rule, state", [("adam", 6), ("nesterov", 4)])
@pytest.mark.parametrize("gradient, size", [("fp32", 4), ("bf16", 2)])
def test_replay_reads_and_writes_the_state_once(target, rule, state, gradient, size):
    row = table(target)[rule, "replay", gradient]
    assert row["bytes_per_parameter_and_step"] == size
    assert row["bytes_per_parameter"] == 4 * state + 10 * size


@all_targets
def test_no_spills_and_128_bit_accesses(target):
    rows = table(target).values()
    assert len(rows) == 12
    for row in rows:
        assert row["spills"] == 0, row
        assert row["vector_bytes"] == 16, row
        # A quarter of the warps, each with a 16-byte load of seven tensors on its way, covers the latency of memory.
        assert row["registers"] <= 128 and row["occupancy"] >= 0.25, row


def test_predictions_follow_from_bytes_and_bandwidth():
    row = table("sm_90")["adam", "vjp", "fp32"]
    assert row["predicted_ms"]["H100 SXM"] == pytest.approx(1e3 * 44 * 2**25 / 3.35e12)
    assert set(row["predicted_ms"]) == {"H100 SXM", "H200 SXM"}
    assert "prediction" in row["basis"]


RECOMPILATION = """
import torch
from mgd_kernels import aot

for pass_ in aot.PASSES:
    for rule in ("adam", "nesterov"):
        with aot.compile_only("sm_90") as launched:
            for hyper, k, steps, scale in ((None, 1, 2, 1.0), ([0.0] * 7, 2, 16, 0.5), ([1.0] * 7, 16, 17, 3.0)):
                hyper = hyper and hyper[: len(aot.RULES[rule].hyper)]
                aot.launch(pass_, aot.RULES[rule], torch.float32, hyper=hyper, k=k, steps=steps, grad_scale=scale)
            aot.launch(pass_, aot.RULES[rule], torch.float32, n=1 << 21, k=10**12)
        kernels = {}
        for kernel in launched:
            kernels.setdefault(kernel.metadata.name, set()).add(kernel.metadata.hash)
        print(pass_, rule, sorted((name, len(hashes)) for name, hashes in kernels.items()))
"""


def test_values_never_compile_anything():
    """Hyperparameters, the number of steps and gradient scales are data. The step number has one 32-bit and one
    64-bit form; the VJP one form for small and one for large buffers."""
    lines = run("-c", RECOMPILATION).splitlines()
    assert len(lines) == 6
    for line in lines:
        assert "('coefficients_kernel', 2)" in line
        assert ("('vjp_kernel', 2)" if line.startswith("vjp") else "('replay_kernel', 1)") in line


CODE = """
import re, torch
from mgd_kernels import aot
from mgd_kernels.arena import Segments

ragged = Segments(torch.tensor([[0, 1001, 1], [1008, 5000, 0]]), 2)
for pass_ in aot.PASSES:
    with aot.compile_only("sm_90") as launched:
        aot.launch(pass_, aot.ADAM, torch.bfloat16)
        aot.launch(pass_, aot.ADAM, torch.float32, n=5000, segments=ragged, low=torch.bfloat16)
    plain, body, ends = [kernel for kernel in launched if kernel.metadata.name in ("vjp_kernel", "replay_kernel")]
    ptx = plain.asm["ptx"]
    assert not re.search(r"fma\\.|mad\\.f|\\.ftz|\\.approx|div\\.full", ptx), "arithmetic is IEEE and not contracted"
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx
    assert pass_ != "vjp" or "cvt.rn.bf16" in ptx, "16-bit results are rounded to nearest"
    assert plain.metadata.shared <= 64, "no data goes through shared memory but the last stage of the sums"
    for kernel in launched:
        offsets = re.findall(r"tt\\.addptr .* : tensor<.*>, tensor<\\d+x(i\\d+)>", kernel.asm["ttir"])
        assert set(offsets) <= {"i64"}, (kernel.metadata.name, offsets)
    assert aot.accesses(body).widths()[0] == 16, "all but the ends of ragged segments is vectorised"
    assert aot.resources(body).spills == aot.resources(ends).spills == 0
print("checked")
"""


def test_generated_code_is_ieee_with_64_bit_offsets_and_a_vector_path_for_ragged_layouts():
    assert run("-c", CODE).strip() == "checked"


def test_errors():
    with pytest.raises(BadArgument, match="sm_80"), aot.compile_only("sm_20"):
        pass
    with pytest.raises(BackendUnavailable, match="KeyError"):
        aot.static_table(rules=("unknown",))
