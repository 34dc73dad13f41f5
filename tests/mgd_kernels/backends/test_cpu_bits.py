"""The C++ backend computes the same bits, whatever the instruction set, the threads and the process."""

from __future__ import annotations

import threading

import pytest
import torch
from cpu_cases import all_dtypes, all_rules, every_isa, restore  # noqa: F401
from forked import run_python
from kernel_problem import (
    Problem,
    everything,
    same_bits,
)

from mgd_kernels import _core
from mgd_kernels.arena import Segments
from mgd_kernels.backends import cpu
from mgd_kernels.rules import ADAM, SGD_PLAIN


@all_rules
@all_dtypes
def test_bits_do_not_depend_on_instruction_set_threads_or_repetition(rule, dtype, grad_dtype):
    problem = Problem(rule, dtype, grad_dtype, n=5 * 16384 + 77)
    problem.segments = Segments(torch.tensor([(0, 9, 0), (11, 40003, 0), (40003, problem.n, 0)]), 1)
    wanted = everything(problem, cpu)
    for isa in _core.isas():
        _core.use_isa(isa)
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            for _ in range(2):
                assert same_bits(everything(problem, cpu), wanted), (isa, threads)


@every_isa
@all_rules
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_replay_is_single_steps_bit_by_bit(rule, grad_dtype, isa):
    _core.use_isa(isa)
    n, steps = 40009, 7
    problem = Problem(rule, grad_dtype=grad_dtype, n=n, groups=2)
    problem.segments = Segments(torch.tensor([(0, 20001, 1), (20001, n, 0)]), 2)
    random = torch.Generator().manual_seed(3)
    grads = [torch.randn(n, generator=random).to(grad_dtype) for _ in range(steps)]
    scales = [0.5 + 0.1 * i for i in range(steps)]
    hypers = torch.stack([problem.hyper * (1 - 0.01 * i) for i in range(steps)])
    for first in (1, 5):
        one, many = [x.clone() for x in problem.state], [x.clone() for x in problem.state]
        for i in range(steps):
            cpu.step_(rule, one[0], one[1:], grads[i], hypers[i], first + i, problem.segments, scales[i])
        cpu.replay_(rule, many[0], many[1:], grads, hypers, first, problem.segments, scales)
        assert same_bits(one, many)
        assert not torch.equal(one[0], problem.state[0])
    cpu.replay_(rule, many[0], many[1:], [], hypers[:0], 1, problem.segments, [])
    assert same_bits(one, many), "no gradients, no steps"


def test_callers_in_several_threads_get_the_same_bits():
    torch.set_num_threads(2)
    problems = [Problem(ADAM, n=90001, seed=seed) for seed in range(4)]
    wanted = [everything(problem, cpu) for problem in problems]
    wrong = []

    def work(problem, want):
        for _ in range(5):
            if not same_bits(everything(problem, cpu), want):
                wrong.append(problem)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(problems, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_workers_take_over_the_callers_floating_point_mode():
    """Flush-to-zero belongs to a thread: were workers to differ, results would depend on who computed them."""
    problem = Problem(SGD_PLAIN, n=8 * 16384)
    problem.state[0] *= 1e-38
    problem.grad *= 1e-40
    gradual = problem.step(cpu)
    torch.set_num_threads(4)
    assert same_bits(problem.step(cpu), gradual)  # starts the workers now: a new thread inherits the mode
    torch.set_num_threads(1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no flush-to-zero mode")
    try:
        flushed = problem.step(cpu)
        torch.set_num_threads(4)
        assert same_bits(problem.step(cpu), flushed)
    finally:
        torch.set_flush_denormal(False)
    assert not same_bits(flushed, gradual), "the mode makes no difference here: the test shows nothing"


def test_a_forked_child_computes():
    """Threads do not survive a fork; the child starts its own."""
    script = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
from mgd_kernels.backends import cpu
torch.set_num_threads(2)
x = torch.arange(200_000).double()
before = cpu.dot(x, x)
child = os.fork()
if child == 0:
    os._exit(0 if cpu.dot(x, x) == before else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run_python(script)
    assert done.returncode == 0, done.stderr


@every_isa
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_16_bit_pattern_converts_exactly(half, dtype, isa):
    """Subnormals, infinities and NaN among them: the step p' = 0 + 1 * grad shows the converted gradient."""
    _core.use_isa(isa)
    grad = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(half)
    p = torch.zeros(2**16, dtype=dtype)
    hyper = torch.tensor([[-1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    cpu.step_(SGD_PLAIN, p, [], grad, hyper, 1, Segments.single(2**16))
    torch.testing.assert_close(p, grad.to(dtype), rtol=0, atol=0, equal_nan=True)


@every_isa
def test_dot(isa):
    _core.use_isa(isa)
    random = torch.Generator().manual_seed(1)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for n in (0, 1, 15, 16, 17, 1000, 16384, 40001):
        for a in dtypes:
            for b in dtypes:
                x = torch.randn(n + 1, generator=random).to(a)[1:]
                y = torch.randn(n + 1, generator=random).to(b)[1:]
                terms = x.double() * y.double()
                error = (cpu.dot(x, y) - terms.sum()).abs()
                assert cpu.dot(x, y).dtype == torch.float64
                assert error <= 1e-15 * terms.abs().sum(), (n, a, b)  # products of these are exact or one rounding
