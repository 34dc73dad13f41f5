"""The fused AdamW step with its VJP: bandwidth against plain passes over memory, and time against torch autograd.

32 M parameters, one thread pinned to one core. Ratios are of times measured in alternation in one run, the least of
the repetitions of each; they stand in the benchmark's extra_info. `mgd bench kernels` prints the same as a table.
"""

from __future__ import annotations

import pytest
import torch

from mgd.bench.kernel_cases import Problem, plain
from mgd.bench.timing import least, pinned
from mgd_kernels import _core
from mgd_kernels.backends import cpu

N = 32 << 20


@pytest.fixture(autouse=True)
def one_pinned_thread():
    with pinned(-1):
        yield


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("kernel", ["step", "vjp"])
def test_bandwidth_against_plain_passes(benchmark, kernel, isa):
    before = _core.isa()
    _core.use_isa(isa)
    problem = Problem("AdamW", cpu, N, logged=1)
    moves = plain(torch.zeros(N), torch.rand(N))
    try:
        run = getattr(problem, kernel)
        seconds, *others = least(7, run, *(move for move, _ in moves.values()))
        bandwidth = problem.bytes(kernel) * N / seconds
        passes = {name: size * N / other for (name, (_, size)), other in zip(moves.items(), others, strict=True)}
        copy = max(passes["copy"], passes["memcpy"])
        benchmark.extra_info.update(
            isa=isa,
            parameters=N,
            bytes_a_parameter=problem.bytes(kernel),
            gigabytes_a_second=bandwidth / 1e9,
            plain_gigabytes_a_second={name: value / 1e9 for name, value in passes.items()},
            ratio_to_copy=bandwidth / copy,
        )
        benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    finally:
        _core.use_isa(before)
    if kernel == "vjp" and isa == _core.isas()[-1]:
        assert benchmark.extra_info["ratio_to_copy"] >= 0.8


def test_vjp_against_autograd(benchmark):
    small = Problem("AdamW", cpu, 1000)
    wanted = small.autograd()
    out = small.vjp()
    for ours, theirs in zip([*small.adjoint, small.u, *out[0, :-1]], wanted, strict=True):
        # What is timed is the same mathematics: float32 rounding, of sums of a thousand terms at the end.
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=2e-4, atol=1e-5)
    problem = Problem("AdamW", cpu, N, logged=1)
    ours, theirs = least(3, problem.vjp, problem.autograd)
    benchmark.extra_info.update(parameters=N, seconds=ours, autograd_seconds=theirs, ratio=theirs / ours)
    benchmark.pedantic(problem.vjp, rounds=3, warmup_rounds=1)
    assert benchmark.extra_info["ratio"] >= 20


@pytest.mark.parametrize("steps", [1, 8])
def test_replay(benchmark, steps):
    """k logged steps in one pass: `4 * (6 + k)` bytes a parameter instead of `28 k`."""
    problem = Problem("AdamW", cpu, N // 4, logged=steps)

    def singly() -> None:
        for _ in range(steps):
            problem.step()

    ours, single = least(5, problem.replay, singly)
    benchmark.extra_info.update(parameters=N // 4, steps=steps, speedup_over_single_steps=single / ours)
    benchmark.pedantic(problem.replay, rounds=3, warmup_rounds=1)
