"""The JVP kernels of the C++ backend against the float64 specification (`kernel_problem.py` measures errors).

That they are the transpose of the VJP and the limit of differences is tested in `test_jvp.py`.
"""

from __future__ import annotations

import pytest
import torch
from cpu_cases import all_dtypes, all_rules, restore  # noqa: F401
from kernel_problem import Directions, assert_close_to_float64, same_bits

from mgd_kernels import _core
from mgd_kernels.arena import Segments
from mgd_kernels.backends import cpu, reference
from mgd_kernels.errors import BadArgument
from mgd_kernels.rules import ADAM


@all_rules
@all_dtypes
@pytest.mark.parametrize("k", [1, 2, 1000])
def test_matches_the_specification(rule, dtype, grad_dtype, k):
    problem = Directions(rule, dtype, grad_dtype, k=k)
    ours, torchs, exact = (
        problem.jvp(b, d)[0] for b, d in ((cpu, None), (reference, None), (reference, torch.float64))
    )
    count = len(problem.state)
    for at in range(0, len(ours), count):
        part = slice(at, at + count)
        assert_close_to_float64(ours[part], torchs[part], exact[part], dtype)


@all_rules
@all_dtypes
def test_the_state_makes_the_very_step(rule, dtype, grad_dtype):
    problem = Directions(rule, dtype, grad_dtype, n=20011)
    tangents, state = problem.jvp(cpu)
    assert same_bits(state, problem.state), "the state changed without being asked to"
    with_step, state = problem.jvp(cpu, advance=True)
    assert same_bits(state, problem.step(cpu)) and same_bits(with_step, tangents)


@all_rules
def test_bits_depend_on_neither_instruction_set_nor_threads_nor_other_directions(rule):
    problem = Directions(rule, n=5 * 16384 + 77, directions=3, groups=2)
    problem.segments = Segments(torch.tensor([(0, 9, 1), (11, 40003, 0), (40003, problem.n, 1)]), 2)
    wanted, state = problem.jvp(cpu, advance=True)
    assert all(torch.equal(x[9:11], y[9:11]) for x, y in zip(state, problem.state, strict=True)), "outside the segments"
    for isa in _core.isas():
        _core.use_isa(isa)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            tangents, after = problem.jvp(cpu, advance=True)
            assert same_bits(tangents, wanted) and same_bits(after, state), (isa, threads)
    alone = Directions(rule, n=problem.n, directions=3, groups=2)
    alone.segments = problem.segments
    alone.tangents, alone.moved = [problem.tangents[1]], [problem.moved[1]]
    alone.hyper_tangents = problem.hyper_tangents[1:2]
    count = len(problem.state)
    assert same_bits(alone.jvp(cpu)[0], wanted[count : 2 * count])


@all_rules
def test_every_length(rule):
    """Each length computes what it would as part of a longer tensor, bit by bit, and touches nothing beyond its end."""
    whole = Directions(rule, directions=1)
    wanted, after = whole.jvp(cpu, advance=True)
    for n in (*range(70), 2047, 2048, 2049, 2063, 2064, 2065):
        state, tangent = [x.clone() for x in whole.state], [x.clone() for x in whole.tangents[0]]
        cpu.jvp_(
            rule, state[0][:n], [x[:n] for x in state[1:]], whole.grad[:n], whole.hyper, whole.k, Segments.single(n),
            [[x[:n] for x in tangent]], [whole.moved[0][:n]], whole.hyper_tangents, whole.scale, True,
        )  # fmt: skip
        assert same_bits([x[:n] for x in (*tangent, *state)], [x[:n] for x in (*wanted, *after)]), n
        kept = [x[n:] for x in (*whole.tangents[0], *whole.state)]
        assert same_bits([x[n:] for x in (*tangent, *state)], kept), n


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_exact_zeros(eps):
    """Where D = 0 divides: the element does not move, and neither does its tangent through the quotient."""
    problem = Directions(ADAM, n=2048)
    problem.hyper[0, 5:], problem.hyper[0, 2], problem.hyper_tangents[:, 0, 2] = eps, 0.0, 0.0
    for x in (problem.state[1], problem.state[2], problem.grad):
        x[:512] = 0.0
    ours, torchs, exact = (
        problem.jvp(b, d)[0] for b, d in ((cpu, None), (reference, None), (reference, torch.float64))
    )
    for at in (0, 3):
        assert_close_to_float64(ours[at : at + 3], torchs[at : at + 3], exact[at : at + 3], torch.float32)


def test_refusals():
    problem = Directions(ADAM, n=64)
    arguments = [ADAM, problem.state[0], problem.state[1:], problem.grad, problem.hyper, problem.k, problem.segments]
    kept = [x.clone() for x in (*problem.state, *problem.tangents[0])]
    for tangents, moved, hypers, part in (
        (problem.tangents, problem.moved[:1], problem.hyper_tangents, "one per direction"),
        (problem.tangents, problem.moved, problem.hyper_tangents[:1], "hyperparameters"),
        ([problem.state, problem.tangents[1]], problem.moved, problem.hyper_tangents, "apart"),
        ([problem.tangents[0]] * 2, problem.moved, problem.hyper_tangents, "apart"),
        ([x[:2] for x in problem.tangents], problem.moved, problem.hyper_tangents, "tangents of slots"),
        (problem.tangents, [x.double() for x in problem.moved], problem.hyper_tangents, "contiguous, torch.float32"),
    ):
        with pytest.raises(BadArgument, match=part):
            cpu.jvp_(*arguments, tangents, moved, hypers)
    with pytest.raises(BadArgument, match="step number"):
        cpu.jvp_(*arguments[:5], 0, problem.segments, problem.tangents, problem.moved, problem.hyper_tangents)
    assert same_bits(kept, [*problem.state, *problem.tangents[0]])
