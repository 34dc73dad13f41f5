"""The C++ backend against the float64 specification; `kernel_problem.py` says how errors are measured."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import all_dtypes, all_rules, restore  # noqa: F401
from kernel_problem import (
    Problem,
    assert_close_to_float64,
    assert_sums_close,
    same_bits,
)
from torch import Tensor

from mgd_kernels.arena import Segments
from mgd_kernels.backends import cpu, reference
from mgd_kernels.rules import ADAM, SGD_PLAIN

# --- accuracy ---------------------------------------------------------------------------------------------------


@all_rules
@all_dtypes
@pytest.mark.parametrize("k", [1, 2, 10, 1000])
def test_matches_the_specification(rule, dtype, grad_dtype, k, monkeypatch):
    problem = Problem(rule, dtype, grad_dtype, k=k)
    assert_close_to_float64(problem.step(cpu), problem.step(reference), problem.step(reference, torch.float64), dtype)
    ours, torchs, exact = problem.vjp(cpu), problem.vjp(reference), problem.vjp(reference, torch.float64)
    assert_close_to_float64(ours[0], torchs[0], exact[0], dtype)
    assert_sums_close(ours[1], torchs[1], exact[1], problem.terms(monkeypatch), dtype)


@all_rules
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("k", [1, 10])
def test_exact_zeros(rule, k, eps, monkeypatch):
    """Zeros in parameters, gradients, states and adjoints, alone and together, also where D = 0 divides."""
    problem = Problem(rule, n=2048, k=k)
    if rule is ADAM:
        problem.hyper[0, 5:] = eps
        problem.hyper[0, 2] = 0.0  # no L2 term: a zero gradient stays one
    for bit, x in enumerate([*problem.state, problem.grad, *problem.adjoint]):
        x[torch.arange(2048) >> bit & 1 == 1] = 0.0
    problem.state[-1][:256] = problem.grad[:256] = 0.0  # whole rows
    if rule is ADAM:
        # Where v' = 0 and m' is not, S = 0 and n is m' / eps: keep to the rule's own domain, m = 0 where v = 0.
        problem.state[1][problem.state[2] == 0] = 0.0
    state = problem.step(cpu)
    assert_close_to_float64(state, problem.step(reference), problem.step(reference, torch.float64), torch.float32)
    ours, torchs, exact = problem.vjp(cpu), problem.vjp(reference), problem.vjp(reference, torch.float64)
    assert_close_to_float64(ours[0], torchs[0], exact[0], torch.float32)
    assert_sums_close(ours[1], torchs[1], exact[1], problem.terms(monkeypatch), torch.float32)
    if rule is ADAM and eps == 0:
        idle = (problem.state[2] == 0) & (problem.grad == 0)
        decay = 1 - problem.hyper[0, 0] * problem.hyper[0, 1]
        assert idle.sum() > 256, "the case under test does not occur"
        assert torch.equal(state[0][idle], problem.state[0][idle] * decay.float()), "0/0 is 0"


@all_rules
def test_all_zero_tensors_stay_zero(rule):
    problem = Problem(rule)
    for x in [*problem.state, problem.grad, *problem.adjoint]:
        x.zero_()
    problem.hyper[0, 5:] = 0.0
    assert all((x == 0).all() for x in problem.step(cpu))
    tensors, out = problem.vjp(cpu)
    assert all((x == 0).all() for x in tensors) and (out == 0).all()


def test_beta_close_to_one_keeps_its_digits():
    """1 - beta in float32 is off by 1.7e-4 at 0.9999; the kernel forms it in double."""
    problem = Problem(ADAM, k=3)
    problem.hyper[0, 3:5] = torch.tensor([0.9999, 0.99999], dtype=torch.float64)
    problem.hyper[0, 2] = 0.0
    for state in problem.state[1:]:
        state.zero_()  # so that the new moments are (1 - beta) g and (1 - beta) g^2 alone
    moments, exact_moments = problem.step(cpu)[1:], problem.step(reference, torch.float64)[1:]
    for ours, exact in zip(moments, exact_moments, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0.0)


@all_rules
@pytest.mark.parametrize("k", [1, 7])
def test_vjp_is_that_of_autograd(rule, k):
    """Through the differentiable float64 step, hyperparameters and the scale of the gradient included."""
    problem = Problem(rule, torch.float64, n=301, k=k)
    state = [x.clone().requires_grad_() for x in problem.state]
    grad, scale = (
        problem.grad.clone().requires_grad_(),
        torch.tensor(problem.scale, dtype=torch.float64, requires_grad=True),
    )
    hyper = [x.clone().requires_grad_() for x in problem.hyper[0]]
    new = reference.step(rule, state[0], state[1:], grad * scale, hyper, k)
    wanted = torch.autograd.grad(
        sum((x * a).sum() for x, a in zip(new, problem.adjoint, strict=True)),
        [*state, grad, *hyper, scale], materialize_grads=True, allow_unused=True,
    )  # fmt: skip
    tensors, out = problem.vjp(cpu)
    for ours, want in zip([*tensors, *out[0]], wanted, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-12)


# --- every length, alignment and layout ---------------------------------------------------------------------------


@all_rules
@all_dtypes
def test_every_length(rule, dtype, grad_dtype, monkeypatch):
    """Each length computes what it would as part of a longer tensor, bit by bit, and touches nothing beyond its end.

    Sums are compared with the running sum of the specification's terms. All lengths for the plain float32 cases,
    every 23rd and those around the registers' and blocks' widths for the others.
    """
    whole = Problem(rule, dtype, grad_dtype)
    step, (tensors, _) = whole.step(cpu), whole.vjp(cpu)
    terms = whole.terms(monkeypatch)
    running = torch.nn.functional.pad(terms.cumsum(1), (1, 0))
    size = torch.nn.functional.pad(terms.square().cumsum(1), (1, 0)).sqrt()
    lengths = range(2101)
    if (dtype, grad_dtype) != (torch.float32, torch.float32):
        lengths = sorted({*range(0, 70), *range(0, 2101, 23), 1023, 1024, 1025, 2047, 2048, 2049, 2100})
    tolerance = 40 * torch.finfo(dtype).eps  # of the terms' own rounding, in the measure of assert_sums_close
    h, k, rows = whole.hyper, whole.k, whole.segments
    for n in lengths:
        rows = Segments.single(n)
        new = [x.clone() for x in whole.state]
        cpu.step_(rule, new[0][:n], [x[:n] for x in new[1:]], whole.grad[:n], h, k, rows, whole.scale)
        adjoint = [x.clone() for x in whole.adjoint]
        u = torch.full_like(new[0], 7.0)
        out = cpu.vjp_(
            rule, whole.state[0][:n], [x[:n] for x in whole.state[1:]], whole.grad[:n], h, k, rows,
            adjoint[0][:n], [x[:n] for x in adjoint[1:]], u[:n], whole.scale,
        )  # fmt: skip
        assert same_bits([x[:n] for x in (*new, *adjoint, u)], [x[:n] for x in (*step, *tensors)]), n
        assert same_bits([x[n:] for x in (*new, *adjoint)], [x[n:] for x in (*whole.state, *whole.adjoint)]), n
        assert (u[n:] == 7).all()
        assert ((out[0] - running[:, n]).abs() <= tolerance * size[:, n] + 1e-300).all(), n


@all_rules
@all_dtypes
def test_unaligned_views(rule, dtype, grad_dtype):
    """Every tensor at an address of its own, misaligned by one element or more: same bits, neighbours untouched."""
    problem = Problem(rule, dtype, grad_dtype, n=1061)
    step, (tensors, out) = problem.step(cpu), problem.vjp(cpu)

    def at(x: Tensor, offset: int) -> Tensor:
        room = torch.full((x.numel() + 64,), 5.0, dtype=x.dtype)
        room[offset : offset + x.numel()] = x
        return room[offset : offset + x.numel()]

    def neighbours(x: Tensor) -> Tensor:
        room = x._base
        return torch.cat([room[: x.storage_offset()], room[x.storage_offset() + x.numel() :]])

    for shift in (1, 3, 7, 16):
        state = [at(x, shift + i) for i, x in enumerate(problem.state)]
        adjoint = [at(x, 2 * shift + i) for i, x in enumerate(problem.adjoint)]
        grad, u = at(problem.grad, shift + 5), at(torch.zeros_like(problem.state[0]), shift)
        args = (problem.hyper, problem.k, problem.segments)
        got = cpu.vjp_(
            rule, state[0], state[1:], grad, *args, adjoint[0], adjoint[1:], u, problem.scale
        )  # fmt: skip
        cpu.step_(rule, state[0], state[1:], grad, *args, problem.scale)
        assert same_bits([*state, *adjoint, u, got], [*step, *tensors, out])
        assert all((neighbours(x) == 5).all() for x in (*state, *adjoint, grad, u))


@all_rules
def test_groups_with_odd_boundaries(rule):
    """Several groups, one of them in two stretches and one empty, boundaries at odd places, gaps left alone."""
    n = 70001
    rows = [(0, 1, 0), (1, 33, 2), (40, 40, 1), (47, 20001, 1), (20001, 20002, 0), (20005, n - 1, 2)]
    problem = Problem(rule, n=n, groups=4)
    problem.segments = Segments(torch.tensor(rows), 4)
    exact_step, (exact, exact_out) = problem.step(reference, torch.float64), problem.vjp(reference, torch.float64)
    step, (tensors, out) = problem.step(cpu), problem.vjp(cpu)
    assert_close_to_float64(step, problem.step(reference), exact_step, torch.float32)
    torch_tensors, _ = problem.vjp(reference)
    inside = torch.zeros(n, dtype=torch.bool)
    for start, stop, _ in rows:
        inside[start:stop] = True
    assert_close_to_float64(
        [x[inside] for x in tensors], [x[inside] for x in torch_tensors], [x[inside] for x in exact], torch.float32
    )
    assert all(torch.equal(x[~inside], y[~inside]) for x, y in zip(step, problem.state, strict=True))
    assert all(torch.equal(x[~inside], y[~inside]) for x, y in zip(tensors, problem.adjoint, strict=False))
    assert tensors[-1][~inside].isnan().all(), "u was written outside the segments"
    # A group's sum is that of its stretches: relative to the largest of its column, float32 rounding of 50,000 terms.
    assert ((out - exact_out).abs() <= 1e-5 * exact_out.abs().amax(0)).all()
    assert (out[3] == 0).all(), "a group without elements has no cotangent"


def test_offsets_beyond_32_bits():
    """Only the last elements are in a segment: the untouched rest of the address space costs no memory."""
    n, tail = 2**31 + 1000, 101
    try:
        p, g = torch.empty(n), torch.empty(n, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space for a tensor of 2^31 elements: {error}")
    p[-tail:], g[-tail:] = 1.0, 2.0
    hyper = torch.tensor([[0.25, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    cpu.step_(SGD_PLAIN, p, [], g, hyper, 1, Segments(torch.tensor([[n - tail, n, 0]]), 1))
    assert (p[-tail:] == 0.5).all()
