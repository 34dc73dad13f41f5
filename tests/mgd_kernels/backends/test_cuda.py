"""The CUDA kernels: their numbers on the CPU, through an emulation of the grid, and their code through nvcc.

`cuda_on_cpu/` runs the threads of a block as fibers, so that partition, tails, reductions and the Python side are
tested where no GPU is. What a GPU alone can show (streams, graphs, timing) is in the tests marked by `on_gpu`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from kernel_problem import (
    DTYPES,
    RULES,
    Directions,
    Problem,
    assert_close_to_float64,
    assert_sums_close,
    everything,
    same_bits,
)

from mgd_kernels.arena import Segments
from mgd_kernels.backends import cpu, cuda, reference
from mgd_kernels.errors import BadArgument, KernelError
from mgd_kernels.rules import ADAM, SGD_PLAIN

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "csrc/optim/cuda.cu"
ARCHITECTURES = (80, 90, 100)
on_gpu = pytest.mark.skipif(cuda.unavailable() is not None, reason=f"no CUDA here: {cuda.unavailable()}")
all_rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def code_of(path: Path) -> str:
    """A source file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)


# --- numbers, on the CPU ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulation with")
    path = tmp_path_factory.mktemp("emulation") / "libmgd_cuda.so"
    command = ["g++", "-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    include = ["-I", str(Path(__file__).parent / "cuda_on_cpu"), "-I", str(ROOT / "csrc")]
    done = subprocess.run([*command, *include, "-o", str(path), str(SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cuda._open(path)


@pytest.fixture
def emulated(library, monkeypatch):
    """The backend's Python side over the emulation, for tensors on the CPU."""

    @contextmanager
    def no_stream(device):
        yield 0

    monkeypatch.setattr(cuda, "_load", lambda: (library, None))
    monkeypatch.setattr(cuda, "_DEVICE", "cpu")
    monkeypatch.setattr(cuda, "_stream", no_stream)
    return cuda


@all_rules
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=[f"{a}-{b}".replace("torch.", "") for a, b in DTYPES])
@pytest.mark.parametrize("k", [1, 10])
def test_elements_are_those_of_the_cpu_bit_by_bit(rule, dtype, grad_dtype, k, emulated, monkeypatch):
    """One header, no contraction: the same bits. The sums differ in order only: the measure of the specification."""
    problem = Problem(rule, dtype, grad_dtype, n=5003, k=k)
    assert same_bits(problem.step(emulated), problem.step(cpu))
    ours, cpus = problem.vjp(emulated), problem.vjp(cpu)
    assert same_bits(ours[0], cpus[0])
    exact, torchs = problem.vjp(reference, torch.float64), problem.vjp(reference)
    assert_close_to_float64(ours[0], torchs[0], exact[0], dtype)
    assert_sums_close(ours[1], torchs[1], exact[1], problem.terms(monkeypatch), dtype)


@all_rules
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=[f"{a}-{b}".replace("torch.", "") for a, b in DTYPES])
@pytest.mark.parametrize("k", [1, 10])
def test_tangents_are_those_of_the_cpu_bit_by_bit(rule, dtype, grad_dtype, k, emulated):
    problem = Directions(rule, dtype, grad_dtype, n=5003, k=k, groups=2)
    problem.segments = Segments(torch.tensor([(0, 9, 1), (11, 4501, 0), (4501, 5003, 1)]), 2)
    for advance in (False, True):
        (ours, state), (cpus, cpu_state) = (problem.jvp(x, advance=advance) for x in (emulated, cpu))
        assert same_bits(ours, cpus) and same_bits(state, cpu_state)


@all_rules
def test_tails_and_unaligned_views(rule, emulated):
    """Lengths around the vector width, the block and the tile; each computes its part of the whole and no more."""
    whole = Problem(rule, n=4200)
    step, (tensors, _) = whole.step(cpu), whole.vjp(cpu)
    for n in (0, 1, 2, 3, 4, 5, 7, 1023, 1024, 1025, 4095, 4096, 4097, 4199):
        for shift in (0, 1) if n < 1100 else (n % 2,):
            problem = Problem(rule, n=4200)
            take = slice(shift, shift + n)
            part = Problem(rule, n=4200)
            part.segments, part.n = Segments.single(n), n
            for name in ("state", "adjoint"):
                setattr(part, name, [x[take] for x in getattr(problem, name)])
            part.grad = problem.grad[take]
            u = torch.full((4200,), 7.0)
            p, *slots = part.state
            a, *adjoint = part.adjoint
            out = emulated.vjp_(
                rule, p, slots, part.grad, part.hyper, part.k, part.segments, a, adjoint, u[take], part.scale
            )
            emulated.step_(rule, p, slots, part.grad, part.hyper, part.k, part.segments, part.scale)
            for x, want, before in zip(
                [*problem.state, *problem.adjoint, u],
                [*step, *tensors],
                [*whole.state, *whole.adjoint, torch.full_like(u, 7.0)],
                strict=True,
            ):
                assert torch.equal(x[take], want[take]), (n, shift)
                assert torch.equal(x[:shift], before[:shift]) and torch.equal(x[shift + n :], before[shift + n :])
            if n == 0:
                assert (out == 0).all()


@all_rules
def test_groups_with_odd_boundaries(rule, emulated):
    rows = [(0, 1, 0), (1, 33, 2), (40, 40, 1), (47, 5001, 1), (5001, 5002, 0), (5005, 14999, 2)]
    problem = Problem(rule, n=15000, groups=4)
    problem.segments = Segments(torch.tensor(rows), 4)
    ours, cpus = everything(problem, emulated), everything(problem, cpu)
    assert same_bits(ours[:-2], cpus[:-2])
    # Sums of thousands of terms, which the CPU rounds to float32.
    assert ((ours[-2] - cpus[-2]).abs() <= 1e-6 * cpus[-2].abs().amax(0)).all()
    assert (ours[-2][3] == 0).all(), "a group without elements has no cotangent"
    assert torch.equal(ours[-1].isnan(), cpus[-1].isnan())


@all_rules
def test_replay_is_single_steps_bit_by_bit(rule, emulated):
    """More steps than one launch takes."""
    n, steps = 301, 35
    problem = Problem(rule, n=n, groups=2)
    problem.segments = Segments(torch.tensor([(0, 101, 1), (101, n, 0)]), 2)
    random = torch.Generator().manual_seed(3)
    grads = [torch.randn(n, generator=random).bfloat16() for _ in range(steps)]
    scales = [0.5 + 0.1 * i for i in range(steps)]
    hypers = torch.stack([problem.hyper * (1 - 0.01 * i) for i in range(steps)])
    one, many = [x.clone() for x in problem.state], [x.clone() for x in problem.state]
    for i in range(steps):
        cpu.step_(rule, one[0], one[1:], grads[i], hypers[i], 1 + i, problem.segments, scales[i])
    emulated.replay_(rule, many[0], many[1:], grads, hypers, 1, problem.segments, scales)
    assert same_bits(one, many)


def test_k_hyper_and_scale_are_read_at_launch(emulated):
    """Tensors on the device are handed to the kernels as they are, so that a graph can be replayed with new values."""
    problem = Problem(ADAM, n=300, k=4)
    k, scale = torch.tensor(4), torch.tensor(problem.scale, dtype=torch.float64)
    state = [x.clone() for x in problem.state]
    assert cuda._on(k.device, k, torch.int64, (), "k").data_ptr() == k.data_ptr()
    assert cuda._on(k.device, scale, torch.float64, (), "scale").data_ptr() == scale.data_ptr()
    emulated.step_(ADAM, state[0], state[1:], problem.grad, problem.hyper, k, problem.segments, scale)
    assert same_bits(state, problem.step(cpu))


def test_dot(emulated):
    random = torch.Generator().manual_seed(1)
    for n in (0, 1, 5, 4096, 9001):
        for a, b in [*DTYPES, (torch.bfloat16, torch.float16), (torch.float16, torch.float64)]:
            x, y = torch.randn(n + 1, generator=random).to(a)[1:], torch.randn(n, generator=random).to(b)
            terms = x.double() * y.double()
            assert (emulated.dot(x, y) - terms.sum()).abs() <= 1e-15 * terms.abs().sum(), (n, a, b)


def test_every_half_converts_exactly(emulated):
    for half in (torch.float16, torch.bfloat16):
        grad = torch.arange(-(2**15), 2**15, 7, dtype=torch.int16).view(half)
        p = torch.zeros(grad.numel())
        hyper = torch.tensor([[-1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
        emulated.step_(SGD_PLAIN, p, [], grad, hyper, 1, Segments.single(grad.numel()))
        torch.testing.assert_close(p, grad.float(), rtol=0, atol=0, equal_nan=True)


def test_bad_arguments_are_refused(emulated):
    good = {
        "rule": ADAM,
        "params": torch.zeros(10),
        "slots": [torch.zeros(10), torch.zeros(10)],
        "grad": torch.zeros(10),
        "hyper": torch.tensor([[0.1, 0, 0, 0.9, 0.9, 1, 1]], dtype=torch.float64),
        "k": 1,
        "segments": Segments.single(10),
    }
    emulated.step_(**good)
    for change in (
        {"grad": torch.zeros(9)},
        {"grad": torch.zeros(10).double()},
        {"slots": [torch.zeros(10)]},
        {"slots": [torch.zeros(10), torch.zeros(20)[::2]]},
        {"hyper": torch.zeros(2, 7).double()},
        {"segments": Segments.single(11)},
        {"segments": Segments(torch.tensor([[0, 5, 1]]), 1)},
        {"segments": Segments(torch.tensor([[0, 5, 0], [4, 6, 0]]), 1)},
        {"params": torch.zeros(2, 5), "grad": torch.zeros(2, 5)},
    ):
        with pytest.raises(BadArgument):
            emulated.step_(**(good | change))


def test_a_launch_error_is_raised(emulated, library, monkeypatch):
    monkeypatch.setitem(cuda.DTYPES, torch.float32, 17)
    with pytest.raises(KernelError, match="CUDA error 1"):
        Problem(ADAM, n=10).step(emulated)


# --- code ---------------------------------------------------------------------------------------------------------


def test_the_headers_alone_hold_the_mathematics():
    """The CPU and the CUDA unit include the same rules; neither names a hyperparameter nor takes a root or a power."""
    words = r"\b(sqrt\w*|root|pow\w*|exp\w*|fma\w*|lr|beta\d?|eps\w*|decay|l2|momentum|dampening|inverse_c\d)\b"
    for name in ("cuda.cu", "cpu_kernels.cpp"):
        code = code_of(ROOT / "csrc/optim" / name)
        assert {"optim/adam.h", "optim/sgd.h"} <= set(re.findall(r'#include "([^"]+)"', code))
        assert not re.findall(words, code), name
        assert {"R::step", "R::vjp", "R::jvp"} <= set(re.findall(r"R::\w+", code))
    for name in ("adam.h", "sgd.h"):
        code = code_of(ROOT / "csrc/optim" / name)
        assert re.findall(words, code) and not re.findall(r"threadIdx|_mm\d|__CUDACC__", code)


def test_unavailable_says_what_to_do():
    reason = cuda.unavailable()
    if reason is None:
        pytest.skip("CUDA is available here")
    assert "MGD_CUDA" in reason or "GPU" in reason


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """What ptxas says and the PTX of every kernel."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here: the CUDA kernels are not compiled")
    folder = tmp_path_factory.mktemp("cuda")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [nvcc, "-std=c++17", "-O3", "--fmad=false", "--threads=0", "-Xptxas=-v", "-Xcompiler=-fPIC,-Wall"]
    include = ["-I", str(ROOT / "csrc")]
    done = subprocess.run(
        [*command, *targets, *include, "-fatbin", "-o", str(folder / "all.fatbin"), str(SOURCE)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ptx = subprocess.run(
        [nvcc, "-std=c++17", "-O3", "--fmad=false", "-arch=compute_80", *include, "-ptx", "-o", "-", str(SOURCE)],
        capture_output=True,
        text=True,
    )
    assert ptx.returncode == 0, ptx.stderr
    return done.stdout + done.stderr, ptx.stdout


KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<sm>\d+)a?'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.S,
)


def test_no_kernel_spills(compiled, record_property):
    kernels = [found.groupdict() for found in KERNEL.finditer(compiled[0])]
    assert {int(kernel["sm"]) for kernel in kernels} == set(ARCHITECTURES)
    for sm in ARCHITECTURES:
        names = [kernel["name"] for kernel in kernels if int(kernel["sm"]) == sm]
        assert sum("vjp_kernel" in name for name in names) == 18, "3 rules, 2 dtypes, 3 gradient dtypes"
        assert sum("replay_kernel" in name for name in names) == 18
        assert sum("jvp_kernel" in name for name in names) == 18
    for kernel in kernels:
        record_property(f"{kernel['name']} sm_{kernel['sm']} registers", int(kernel["registers"]))
        assert (kernel["stack"], kernel["stores"], kernel["loads"]) == ("0", "0", "0"), kernel
        most = 172 if "jvp_kernelIN3mgd4AdamEd" in kernel["name"] else 168  # a JVP in float64, on sm_100
        assert int(kernel["registers"]) <= most, "one block of 256 threads must fit beside another half of one"
    adamw = [k for k in kernels if re.search(r"vjp_kernelI?.*4AdamEff", k["name"])]
    assert adamw and all(int(kernel["registers"]) <= 128 for kernel in adamw), "two blocks of 256 threads"


@pytest.mark.parametrize(("kernel", "loads", "stores"), [("replay", 4, 3), ("vjp", 7, 4)])
def test_adamw_moves_the_fewest_bytes_in_128_bit_accesses(compiled, kernel, loads, stores):
    """In float32, 28 bytes a parameter for the step and 44 for the VJP, four parameters to an access."""
    bodies = re.findall(r"\.entry (\S+)\((.*?)\n}", compiled[1], re.S)
    (body,) = [text for name, text in bodies if re.search(rf"{kernel}_kernel.*4AdamEff", name)]
    assert len(re.findall(r"ld\.global\.v4\.[fbu]32", body)) == loads
    assert len(re.findall(r"st\.global\.(?:cs\.)?v4\.[fbu]32", body)) == stores
    assert "fma." not in body, "contracted: not the bits of the CPU"


# --- on a GPU -----------------------------------------------------------------------------------------------------


def to_gpu(problem: Problem) -> Problem:
    problem.state = [x.cuda() for x in problem.state]
    problem.adjoint = [x.cuda() for x in problem.adjoint]
    problem.grad, problem.hyper = problem.grad.cuda(), problem.hyper.cuda()
    return problem


@on_gpu
@all_rules
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_gpu_agrees_with_the_cpu(rule, grad_dtype):
    host = Problem(rule, grad_dtype=grad_dtype, n=1_000_003)
    wanted = everything(host, cpu)
    device = to_gpu(Problem(rule, grad_dtype=grad_dtype, n=1_000_003))
    p, *slots = (x.clone() for x in device.state)
    a, *adjoint = (x.clone() for x in device.adjoint)
    u = torch.empty_like(p)
    args = (device.hyper, device.k, device.segments)
    runs = []
    for _ in range(2):
        p, *slots = (x.clone() for x in device.state)
        a, *adjoint = (x.clone() for x in device.adjoint)
        out = cuda.vjp_(rule, p, slots, device.grad, *args, a, adjoint, u, device.scale)
        cuda.step_(rule, p, slots, device.grad, *args, device.scale)
        dot = cuda.dot(device.grad, device.adjoint[0])
        runs.append([x.cpu() for x in (p, *slots, a, *adjoint, u, out, dot)])
    assert same_bits(*runs), "two runs differ"
    for ours, want in zip(runs[0][:-2], wanted[:-2], strict=True):
        # One ulp of a coefficient: the device's pow need not round as the host's does.
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6)
    for ours, want in zip(runs[0][-2:], wanted[-2:], strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6 * want.abs().max().item())


@on_gpu
def test_a_captured_graph_follows_new_values():
    problem = to_gpu(Problem(ADAM, n=10007, k=1))
    k = torch.ones((), dtype=torch.int64, device="cuda")
    scale = torch.full((), problem.scale, dtype=torch.float64, device="cuda")
    p, *slots = (x.clone() for x in problem.state)
    problem.step_on = lambda: cuda.step_(ADAM, p, slots, problem.grad, problem.hyper, k, problem.segments, scale)
    problem.step_on()  # loads the kernels and the segment table
    for x, start in zip((p, *slots), problem.state, strict=True):
        x.copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.step_on()
    expected = [x.clone() for x in problem.state]
    for step in (1, 2, 3):
        k.fill_(step)
        problem.hyper[0, 0] = 0.1 * step
        graph.replay()
        cuda.step_(
            ADAM, expected[0], expected[1:], problem.grad, problem.hyper.cpu(), step, problem.segments, problem.scale
        )
        assert all(torch.equal(x, y) for x, y in zip((p, *slots), expected, strict=True))
