"""The fused AdamW step with its VJP: bandwidth against a plain copy, and time against torch autograd.

32 M parameters, one thread pinned to one core (`make bench`). Ratios are of times measured in alternation in one run,
the least of the repetitions of each; they stand in the benchmark's extra_info. Bytes a parameter in float32: the step
reads p, m, v, g and writes p, m, v (28); the VJP reads those four and three adjoints, and writes the adjoints and u
(44).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch

from mgd_kernels import _core
from mgd_kernels.arena import Segments
from mgd_kernels.backends import cpu, reference
from mgd_kernels.rules import ADAM

N = 32 << 20
HYPER = [1e-3, 0.01, 0.0, 0.9, 0.999, 1e-8, 1e-8]


@pytest.fixture(autouse=True)
def one_pinned_thread():
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(cores)})
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


class Adamw:
    """One training state with its gradient and adjoints, every tensor random."""

    def __init__(self, n: int = N):
        self.state, self.adjoint = ([torch.rand(n) for _ in range(3)] for _ in range(2))
        self.grad, self.u = torch.rand(n), torch.zeros(n)
        self.hyper = torch.tensor([HYPER], dtype=torch.float64)
        self.segments = Segments.single(n)

    def step(self) -> None:
        p, *slots = self.state
        cpu.step_(ADAM, p, slots, self.grad, self.hyper, 10, self.segments)

    def vjp(self) -> torch.Tensor:
        p, *slots = self.state
        a, *adjoint = self.adjoint
        return cpu.vjp_(ADAM, p, slots, self.grad, self.hyper, 10, self.segments, a, adjoint, self.u)

    def autograd(self) -> tuple[torch.Tensor, ...]:
        """The same cotangents through torch: those of the state, the gradient and every hyperparameter."""
        inputs = [x.detach().requires_grad_() for x in (*self.state, self.grad)]
        hyper = [x.clone().requires_grad_() for x in self.hyper[0]]
        new = reference.step(ADAM, inputs[0], inputs[1:3], inputs[3], hyper, 10)
        return torch.autograd.grad(new, [*inputs, *hyper], self.adjoint)


def copy_loop(to: torch.Tensor, source: torch.Tensor) -> Callable[[], object]:
    return lambda: to.copy_(source)


def memcpy(to: torch.Tensor, source: torch.Tensor) -> Callable[[], object]:
    import ctypes

    function = ctypes.CDLL(None).memcpy
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p
    return lambda: function(to.data_ptr(), source.data_ptr(), to.nbytes)


def alternate(rounds: int, *functions: Callable[[], object]) -> list[float]:
    """The least time of each, in seconds, all of them run in turn."""
    least = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            least[i] = min(least[i], time.perf_counter() - start)
    return least


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize(("kernel", "bytes_each"), [("step", 28), ("vjp", 44)])
def test_bandwidth_against_a_copy(benchmark, kernel, bytes_each, isa):
    before = _core.isa()
    _core.use_isa(isa)
    problem = Adamw()
    source, to = torch.rand(N), torch.zeros(N)
    try:
        run = getattr(problem, kernel)
        ours, loop, block = alternate(7, run, copy_loop(to, source), memcpy(to, source))
        copy = 8 * N / min(loop, block)  # read + written
        benchmark.extra_info.update(
            isa=isa,
            parameters=N,
            bytes_a_parameter=bytes_each,
            gigabytes_a_second=bytes_each * N / ours / 1e9,
            copy_gigabytes_a_second=copy / 1e9,
            ratio=bytes_each * N / ours / copy,
        )
        benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    finally:
        _core.use_isa(before)
    if kernel == "vjp" and isa == _core.isas()[-1]:
        assert benchmark.extra_info["ratio"] >= 0.8


def test_vjp_against_autograd(benchmark):
    small = Adamw(1000)
    wanted = small.autograd()
    out = small.vjp()
    for ours, theirs in zip([*small.adjoint, small.u, *out[0, :-1]], wanted, strict=True):
        # What is timed is the same mathematics: float32 rounding, of sums of a thousand terms at the end.
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=2e-4, atol=1e-5)
    problem = Adamw()
    ours, theirs = alternate(3, problem.vjp, problem.autograd)
    benchmark.extra_info.update(parameters=N, seconds=ours, autograd_seconds=theirs, ratio=theirs / ours)
    benchmark.pedantic(problem.vjp, rounds=3, warmup_rounds=1)
    assert benchmark.extra_info["ratio"] >= 20


@pytest.mark.parametrize("steps", [1, 8])
def test_replay(benchmark, steps):
    """k logged steps in one pass: `4 * (6 + k)` bytes a parameter instead of `28 k`."""
    problem = Adamw(N // 4)
    p, *slots = problem.state
    grads = [torch.rand(N // 4) for _ in range(steps)]
    hypers = problem.hyper.expand(steps, 1, -1).contiguous()

    def replay() -> None:
        cpu.replay_(ADAM, p, slots, grads, hypers, 1, problem.segments, [1.0] * steps)

    def singly() -> None:
        for i, grad in enumerate(grads):
            cpu.step_(ADAM, p, slots, grad, problem.hyper, 1 + i, problem.segments)

    ours, single = alternate(5, replay, singly)
    benchmark.extra_info.update(parameters=N // 4, steps=steps, speedup_over_single_steps=single / ours)
    benchmark.pedantic(replay, rounds=3, warmup_rounds=1)
