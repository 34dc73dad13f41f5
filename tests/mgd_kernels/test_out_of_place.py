"""Steps and VJPs of the C++ backend that write elsewhere than they read: the bits of the kernels in place.

The sums over hyperparameters, leaves that lie apart, and what is left out (None) are compared with flat buffers in
place, whose numbers `test_cpu.py` compares with the specification.
"""

from __future__ import annotations

import pytest
import torch
from kernel_problem import DTYPES, RULES, Problem, same_bits

import mgd_kernels.ops  # noqa: F401  # defines torch.ops.mgd_kernels
from mgd_kernels import dispatch
from mgd_kernels.arena import Segments
from mgd_kernels.backends import cpu
from mgd_kernels.errors import BadArgument
from mgd_kernels.integrations import flat
from mgd_kernels.rules import ADAM

all_rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
all_dtypes = pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES)
SIZES = [1, 16, 17, 4096, 20_011]  # around a register, a tile of a replay, a tile


def apart(tensors, offset=0):
    """Tensors like these, full of NaN, at an offset from aligned memory."""
    return [torch.full((t.numel() + offset,), torch.nan, dtype=t.dtype)[offset:] for t in tensors]


@all_rules
@all_dtypes
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_out_of_place_is_in_place_bit_by_bit(rule, dtype, grad_dtype, offset, threads):
    problem = Problem(rule, dtype, grad_dtype, n=70_003)
    arguments = (problem.grad, problem.hyper, problem.k, problem.segments)
    kept = [x.clone() for x in (*problem.state, *problem.adjoint)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        new = apart(problem.state, offset)
        cpu.step_(rule, problem.state[0], problem.state[1:], *arguments, problem.scale, out=new)
        assert same_bits(new, problem.step(cpu))

        wanted, sums = problem.vjp(cpu)
        for choice, columns in (("all", None), ("rates", 2), ("none", 0)):
            new, (u,) = apart(problem.adjoint, offset), apart([problem.state[0]], offset)
            found = cpu.vjp_(
                rule, problem.state[0], problem.state[1:], *arguments, problem.adjoint[0], problem.adjoint[1:], u,
                problem.scale, out=new, wanted=choice,
            )  # fmt: skip
            assert same_bits([*new, u], wanted)
            assert same_bits([found[:, :columns]], [sums[:, :columns]])
            assert columns is None or not found[:, columns:].any()
    finally:
        torch.set_num_threads(before)
    assert same_bits([*problem.state, *problem.adjoint], kept), "what is read must stay"


@all_rules
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_several_steps_out_of_place(rule, grad_dtype):
    problem = Problem(rule, grad_dtype=grad_dtype, n=5000)
    grads = [problem.grad, problem.grad.flip(0), problem.grad * 0.5]
    arguments = (grads, problem.hyper.repeat(3, 1, 1), problem.k, problem.segments, [0.3, 0.7, 1.0])
    new, state = apart(problem.state), [x.clone() for x in problem.state]
    cpu.replay_(rule, problem.state[0], problem.state[1:], *arguments, out=new)
    cpu.replay_(rule, state[0], state[1:], *arguments)
    assert same_bits(new, state)


# --- Leaves -------------------------------------------------------------------------------------------------------


class Leaves:
    """A problem in pieces: every other leaf without weight decay and, where asked, without parameters."""

    def __init__(self, rule, dtype=torch.float32, grad_dtype=None):
        self.rule, self.groups = rule, [i % 2 for i in range(len(SIZES))]
        self.problem = problem = Problem(rule, dtype, grad_dtype, n=sum(SIZES), groups=2)
        problem.hyper[:, rule.column("l2")] = 0
        problem.hyper[1, rule.column("weight_decay")] = 0
        cut = lambda x: [piece.clone() for piece in x.split(SIZES)]
        self.state, self.adjoint = [cut(x) for x in problem.state], [cut(x) for x in problem.adjoint]
        self.grads = cut(problem.grad)
        self.params = [None if group else leaf for group, leaf in zip(self.groups, self.state[0], strict=True)]

    def update(self, function):
        new = [apart(row) for row in self.state]
        function(
            self.rule, self.params, self.state[1:], self.grads, self.problem.hyper, self.problem.k, self.groups,
            new[0], new[1:],
        )  # fmt: skip
        return new

    def vjp(self, function, adjoint=None, wanted=None, **options):
        new, u = [apart(row) for row in self.state], apart(self.state[0])
        if wanted is not None:
            new = [row if i in wanted else [None] * len(SIZES) for i, row in enumerate(new)]
        adjoint = adjoint or self.adjoint
        sums = function(
            self.rule, self.params, self.state[1:], self.grads, self.problem.hyper, self.problem.k, self.groups,
            adjoint[0], adjoint[1:], new[0], new[1:], u, **options,
        )  # fmt: skip
        return new, u, sums


def on_flat(function):
    return lambda *arguments, **options: function(cpu, *arguments, **options)


@all_rules
@all_dtypes
def test_leaves_where_they_lie_are_flat_buffers_bit_by_bit(rule, dtype, grad_dtype):
    leaves = Leaves(rule, dtype, grad_dtype)
    for ours, theirs in zip(leaves.update(cpu.update), leaves.update(on_flat(flat.update)), strict=True):
        assert same_bits(ours, theirs)
    ours, u, sums = leaves.vjp(cpu.update_vjp)
    theirs, flat_u, flat_sums = leaves.vjp(on_flat(flat.update_vjp))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)  # but for the sign of zero without weight decay
    assert all(same_bits(a, b) for a, b in zip([*ours[1:], u], [*theirs[1:], flat_u], strict=True))
    torch.testing.assert_close(sums, flat_sums, rtol=1e-12, atol=1e-12)  # other tiles, another order of additions


@all_rules
def test_the_update_is_the_new_parameters_less_the_old(rule):
    leaves = Leaves(rule, torch.float64)
    update, *slots = leaves.update(cpu.update)
    for i, group in enumerate(leaves.groups):
        old = [row[i].clone() for row in leaves.state]
        hyper = leaves.problem.hyper[group : group + 1]
        cpu.step_(rule, old[0], old[1:], leaves.grads[i], hyper, leaves.problem.k, Segments.single(SIZES[i]))
        torch.testing.assert_close(update[i], old[0] - leaves.state[0][i], rtol=0, atol=1e-14)
        assert same_bits([row[i] for row in slots], old[1:])


@all_rules
@pytest.mark.parametrize("function", [cpu.update_vjp, on_flat(flat.update_vjp)], ids=["cpu", "flat"])
def test_what_is_missing_is_zero_and_what_nobody_wants_is_not_written(rule, function):
    leaves = Leaves(rule)
    zeros = [[torch.zeros_like(x) if i % 2 else x for i, x in enumerate(row)] for row in leaves.adjoint]
    missing = [[None if i % 2 else x for i, x in enumerate(row)] for row in leaves.adjoint]
    expected, expected_u, sums = leaves.vjp(function, zeros)
    for wanted in (range(3), [0], [len(leaves.state) - 1], []):
        new, u, found = leaves.vjp(function, missing, wanted)
        assert same_bits(u, expected_u) and torch.equal(found, sums)
        assert all(same_bits(new[i], expected[i]) for i in range(len(new)) if i in wanted)
    if function is cpu.update_vjp:
        new, u, found = leaves.vjp(function, missing, hyper_wanted=False)
        assert found is None and same_bits([*new[0], *u], [*expected[0], *expected_u])


def test_leaves_in_place_and_without_elements():
    leaves = Leaves(ADAM)
    expected = leaves.update(cpu.update)
    for row in (*leaves.state, leaves.grads, leaves.params):
        row.append(torch.empty(0))
    leaves.groups.append(0)
    update = apart(leaves.state[0])
    cpu.update(
        ADAM, leaves.params, leaves.state[1:], leaves.grads, leaves.problem.hyper, leaves.problem.k, leaves.groups,
        update, leaves.state[1:],
    )  # fmt: skip
    for ours, theirs in zip([update, *leaves.state[1:]], expected, strict=True):
        assert same_bits(ours[:-1], theirs)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a: a.grads.__setitem__(1, a.grads[1].double()), "torch.float32"),
        (lambda a: a.grads.__setitem__(2, a.grads[3]), r"\[17\]"),
        (lambda a: a.state[1].__setitem__(2, torch.ones(34)[::2]), "contiguous"),
        (lambda a: a.state[2].pop(), "leaves everywhere"),
        (lambda a: a.groups.__setitem__(0, 2), "group below 2"),
        (lambda a: a.groups.__setitem__(0, -1), "group below 2"),
        (lambda a: setattr(a.problem, "k", 0), "at least 1"),
        (lambda a: setattr(a.problem, "hyper", a.problem.hyper.float()), "float64"),
        (lambda a: a.state.pop(), "slots"),
    ],
)
def test_bad_leaves_are_refused(change, word):
    leaves = Leaves(ADAM)
    new = [apart(row) for row in leaves.state]
    change(leaves)
    with pytest.raises((BadArgument, ValueError), match=word):
        cpu.update(
            ADAM, leaves.params, leaves.state[1:], leaves.grads, leaves.problem.hyper, leaves.problem.k, leaves.groups,
            new[0], new[1:],
        )  # fmt: skip
    assert all(x.isnan().all() for row in new for x in row)


def test_leaves_that_are_written_lie_apart():
    leaves = Leaves(ADAM)
    new = [apart(row) for row in leaves.state]
    u = apart(leaves.state[0])

    def update(updates, slots):
        cpu.update(
            ADAM, leaves.params, leaves.state[1:], leaves.grads, leaves.problem.hyper, leaves.problem.k, leaves.groups,
            updates, slots,
        )  # fmt: skip

    def vjp(u, new):
        cpu.update_vjp(
            ADAM, leaves.params, leaves.state[1:], leaves.grads, leaves.problem.hyper, leaves.problem.k, leaves.groups,
            leaves.adjoint[0], leaves.adjoint[1:], new[0], new[1:], u,
        )  # fmt: skip

    for attempt in (
        lambda: update(leaves.grads, new[1:]),
        lambda: update(new[1], new[1:]),
        lambda: update(new[0], [leaves.state[2], new[2]]),  # in the place of the other slot
        lambda: vjp(new[1], new),
        lambda: vjp(leaves.adjoint[0], new),
        lambda: vjp(u, [leaves.state[0], *new[1:]]),
    ):
        with pytest.raises(BadArgument, match="apart"):
            attempt()
    before = [x._version for row in (*new, u) for x in row]
    update(new[0], new[1:])
    vjp(u, new)
    after = [x._version for row in (*new, u) for x in row]
    assert all(a < b for a, b in zip(before, after, strict=True))


# --- The operators ------------------------------------------------------------------------------------------------


def test_functional_operators_keep_what_lies_outside_the_segments():
    n, segments = 400_000, torch.tensor([[3, 150_000, 0], [150_010, 399_999, 0]])
    problem = Problem(ADAM, n=n)
    inputs = (*problem.state, problem.grad, problem.hyper, problem.k, segments)
    found = [torch.ops.mgd_kernels.adam_step(*inputs), torch.ops.mgd_kernels.adam_step_vjp(*inputs, *problem.adjoint)]
    with dispatch.use_backend("reference"):  # clones, and steps in place
        expected = [
            torch.ops.mgd_kernels.adam_step(*inputs),
            torch.ops.mgd_kernels.adam_step_vjp(*inputs, *problem.adjoint),
        ]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for outside in (slice(0, 3), slice(150_000, 150_010), slice(399_999, n)):
        assert same_bits([x[outside] for x in found[0]], [x[outside] for x in problem.state])
        assert same_bits([x[outside] for x in found[1][:3]], [x[outside] for x in problem.adjoint])
        assert (found[1][3][outside] == 0).all()
