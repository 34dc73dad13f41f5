"""What the Triton kernels compile to, read off the generated code without a GPU.

The backend's own functions run with a driver that compiles and never launches, so what is read here is what a GPU of
that architecture would get: registers and spills (ptxas and the AMDGPU assembler), the width of every access to
global memory, and the bytes that cross it for each parameter. `python -m mgd_kernels.aot` prints the table as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mgd_kernels.arena import Segments
from mgd_kernels.errors import BackendUnavailable, BadArgument
from mgd_kernels.rules import ADAM, SGD_MOMENTUM, SGD_NESTEROV, SGD_PLAIN, Rule

RULES = {"adam": ADAM, "sgd": SGD_PLAIN, "momentum": SGD_MOMENTUM, "nesterov": SGD_NESTEROV}
PASSES = ("step", "vjp", "replay")
GRADIENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Triton's name of the backend, architecture, threads of a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Machine:
    """target: its architecture. bandwidth: of its memory in bytes/s, as published by its maker."""

    target: str
    bandwidth: float


MACHINES = {
    "A100 SXM 80GB": Machine("sm_80", 2.039e12),
    "H100 SXM": Machine("sm_90", 3.35e12),
    "H200 SXM": Machine("sm_90", 4.8e12),
    "MI300X": Machine("gfx942", 5.3e12),
}
PREDICTED_PARAMETERS = 32 * 2**20


# --- Compiling without a GPU -------------------------------------------------------------------------------------


class _CompileOnly:
    """Stands in for Triton's driver: it names an architecture and has no device behind it."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return f"compile only: {self.target}"  # a key of the kernels' caches that no device has

    def get_current_stream(self, device=None):
        return 0


@contextlib.contextmanager
def compile_only(target: str) -> Iterator[list[Any]]:
    """Within the block every Triton launch compiles for `target` and does nothing else; yields the kernels launched.

    For processes that launch nothing in earnest meanwhile, and in which TRITON_INTERPRET is not set.
    """
    if target not in TARGETS:
        raise BadArgument(f"expected a target among {list(TARGETS)}; got {target!r}")
    try:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        raise BackendUnavailable(f"expected triton; got {error}: pip install 'mgd-kernels[triton]'") from error
    launched: list[Any] = []
    run = JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return launched[-1]

    before = driver._active
    driver.set_active(_CompileOnly(GPUTarget(*TARGETS[target])))
    JITFunction.run = compile_instead
    try:
        yield launched
    finally:
        JITFunction.run = run
        driver._active = before


def launch(
    pass_: str,
    rule: Rule,
    gradient: torch.dtype,
    n: int = 1 << 22,
    hyper: Sequence[float] | None = None,
    k: int = 3,
    steps: int = 10,
    segments: Segments | None = None,
    low: torch.dtype | None = None,
    grad_scale: float = 1.0,
) -> None:
    """Call the backend's step, VJP or replay on tensors without contents, for `compile_only` to see."""
    from mgd_kernels.backends import triton

    segments = segments or Segments.single(n)

    def empty(dtype=torch.float32):
        return torch.empty(n, dtype=dtype, device="meta")

    slots = [empty() for _ in rule.slots]
    table = torch.tensor([hyper or [0.1] * len(rule.hyper)], dtype=torch.float64).repeat(segments.groups, 1)
    copy = None if low is None else empty(low)
    if pass_ == "step":
        triton.step_(rule, empty(), slots, empty(gradient), table, k, segments, grad_scale, copy)
    elif pass_ == "vjp":
        adjoints = [empty() for _ in rule.slots]
        triton.vjp_(
            rule, empty(), slots, empty(gradient), table, k, segments, empty(), adjoints, empty(gradient), grad_scale
        )
    else:
        grads = torch.empty(steps, n, dtype=gradient, device="meta")
        tables = table.expand(steps, -1, -1)
        triton.replay_(rule, empty(), slots, grads, tables, k, segments, [grad_scale] * steps, copy)


@cache
def compiled(target: str, pass_: str, rule: str, gradient: str = "fp32"):
    """The main kernel of one pass, as Triton compiled it."""
    name = "vjp_kernel" if pass_ == "vjp" else "replay_kernel"
    with compile_only(target) as launched:
        launch(pass_, RULES[rule], GRADIENTS[gradient])
    return next(kernel for kernel in launched if kernel.metadata.name == name)


# --- Reading generated code --------------------------------------------------------------------------------------

_PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[a-z0-9_:]+?)*?(?:\.v(\d+))?\.[bfus](\d+)\b")
_AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(dwordx?(\d)?|short|ushort|byte|ubyte|b\d+)\b")
_PTX_LABEL, _PTX_BRANCH = re.compile(r"^\s*(\$\w+):"), re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)")
_AMD_LABEL, _AMD_BRANCH = re.compile(r"^\s*(\.LBB\w+):"), re.compile(r"\bs_c?branch\w*\s+(\.LBB\w+)")


@dataclass(frozen=True)
class Accesses:
    """The accesses to global memory of one thread: `(load or store, bytes, inside a loop) -> instructions`."""

    counts: Counter[tuple[str, int, bool]]

    def bytes(self, in_loop: bool, least: int) -> int:
        """Bytes of all accesses at least `least` bytes wide, inside loops or outside them."""
        return sum(n * width for (_, width, loop), n in self.counts.items() if loop == in_loop and width >= least)

    def widths(self) -> list[int]:
        return sorted({width for _, width, _ in self.counts}, reverse=True)


def accesses(kernel) -> Accesses:
    """Read the accesses to global memory off PTX or AMDGPU assembly."""
    amd = "amdgcn" in kernel.asm
    lines = kernel.asm["amdgcn" if amd else "ptx"].splitlines()
    label, branch = (_AMD_LABEL, _AMD_BRANCH) if amd else (_PTX_LABEL, _PTX_BRANCH)
    labels = {m[1]: i for i, line in enumerate(lines) if (m := label.match(line))}
    loops = [
        range(labels[m[1]], i)
        for i, line in enumerate(lines)
        if (m := branch.search(line)) and labels.get(m[1], len(lines)) < i
    ]
    counts: Counter[tuple[str, int, bool]] = Counter()
    for i, line in enumerate(lines):
        in_loop = any(i in loop for loop in loops)
        if amd and (m := _AMD_ACCESS.search(line)):
            width = 4 * int(m[3] or 1) if m[2].startswith("dword") else {"short": 2, "ushort": 2}.get(m[2], 1)
            counts["ld" if m[1] == "load" else "st", width, in_loop] += 1
        elif not amd and (m := _PTX_ACCESS.search(line)):
            counts[m[1], int(m[2] or 1) * int(m[3]) // 8, in_loop] += 1
    return Accesses(counts)


def bytes_per_parameter(kernel, pass_: str) -> tuple[float, float]:
    """`(once, each step)`: the bytes of global memory per parameter, `each step` of a replay.

    Parameters are read and written by vector accesses of 8 bytes and more; scalars of the coefficient and tile
    tables, a few hundred bytes per tile, are left out.
    """
    from mgd_kernels.backends import triton_kernels

    traffic = accesses(kernel)
    block = triton_kernels.VJP_BLOCK if pass_ == "vjp" else triton_kernels.BLOCK
    share = kernel.metadata.num_warps * kernel.metadata.target.warp_size / block
    outside, inside = traffic.bytes(False, 8) * share, traffic.bytes(True, 8) * share
    if pass_ == "vjp":  # outside its loop lie only the float64 coefficients and sums
        return inside, 0.0
    return (outside - inside, inside) if pass_ == "replay" else (outside, 0.0)


@dataclass(frozen=True)
class Resources:
    """registers: of a thread. spills: instructions that spill one, or registers spilled on AMD. occupancy: resident
    warps as a share of what a multiprocessor holds, as the registers allow. widest: access to global memory, bytes.
    scalar_spills: those of AMD's scalar registers, which go to vector registers and never to memory."""

    registers: int
    spills: int
    occupancy: float
    widest: int
    scalar_spills: int = 0


def resources(kernel) -> Resources:
    """Registers and spills off the final machine code."""
    widest = accesses(kernel).widths()[0]
    if "amdgcn" in kernel.asm:
        asm = kernel.asm["amdgcn"]

        def number(key: str) -> int:
            return int(re.search(rf"{key}:?\s*(\d+)", asm)[1])  # type: ignore[index]

        scalar = number(r"\.sgpr_spill_count")
        spills = number(r"\.vgpr_spill_count") + scalar
        return Resources(number(r"\.vgpr_count"), spills, number("; Occupancy") / 8, widest, scalar)
    usage, sass = _nvidia("cuobjdump", "-res-usage", kernel), _nvidia("nvdisasm", "-c", kernel)
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    # 65,536 registers per multiprocessor, allotted to warps in units of 8 per thread; 64 warps at most.
    warps = kernel.metadata.num_warps
    blocks = min(64 // warps, 65536 // (-(-registers // 8) * 8 * 32 * warps))
    return Resources(registers, spills, blocks * warps / 64, widest)


def _nvidia(tool: str, option: str, kernel) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([path, option, file.name], check=True, capture_output=True, text=True).stdout


# --- The table ---------------------------------------------------------------------------------------------------


def row(target: str, pass_: str, rule: str, gradient: str, steps: int = 10) -> dict[str, Any]:
    """One line of `static_table`."""
    kernel = compiled(target, pass_, rule, gradient)
    used = resources(kernel)
    once, each = bytes_per_parameter(kernel, pass_)
    total = once + steps * each
    return {
        "kernel": f"{rule} {pass_}" + (f" of {steps} steps" if pass_ == "replay" else ""),
        "rule": rule,
        "pass": pass_,
        "gradient": gradient,
        "target": target,
        "registers": used.registers,
        "spills": used.spills,
        "bytes_per_parameter": total,
        "bytes_per_parameter_and_step": each if pass_ == "replay" else None,
        "vector_bytes": used.widest,
        "occupancy": used.occupancy,
        "parameters": PREDICTED_PARAMETERS,
        "predicted_ms": {
            name: 1e3 * total * PREDICTED_PARAMETERS / machine.bandwidth
            for name, machine in MACHINES.items()
            if machine.target == target
        },
        "basis": "prediction: bytes at the published bandwidth, not a measurement",
    }


def static_table(
    targets: Sequence[str] = tuple(TARGETS),
    passes: Sequence[str] = PASSES,
    rules: Sequence[str] = ("adam", "momentum"),
    gradients: Sequence[str] = ("fp32", "bf16"),
) -> list[dict[str, Any]]:
    """One row for each kernel and target: registers, spills, bytes per parameter, and times predicted from these.

    Compiles in a process of its own, since compiling without a GPU and launching, or interpreting, do not mix.
    Raises BackendUnavailable where triton is missing.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [",".join(choice) for choice in (targets, passes, rules, gradients)]
    process = subprocess.run(
        [sys.executable, "-m", "mgd_kernels.aot", *arguments], env=environment, capture_output=True, text=True
    )
    if process.returncode:
        raise BackendUnavailable(f"expected the Triton kernels to compile ahead of time; got:\n{process.stderr}")
    return json.loads(process.stdout)


def main(arguments: Sequence[str]) -> None:
    """Print the table of the product of four lists: targets, passes, rules, gradients."""
    everything = [list(TARGETS), list(PASSES), ["adam", "momentum"], ["fp32", "bf16"]]
    targets, passes, rules, gradients = [argument.split(",") for argument in arguments] or everything
    rows = [
        row(target, pass_, rule, gradient)
        for target in targets
        for rule in rules
        for pass_ in passes
        for gradient in gradients
    ]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
