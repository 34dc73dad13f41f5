"""The torch.library operators: schemas, values, derivatives, and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mgd_kernels import ops
from mgd_kernels.backends import reference
from mgd_kernels.errors import BadArgument
from mgd_kernels.rules import ADAM, SGD_MOMENTUM, SGD_NESTEROV, SGD_PLAIN, Rule

pytestmark = pytest.mark.filterwarnings("ignore:mgd_kernels runs on the slow reference backend:RuntimeWarning")

N = 9
SEGMENTS = torch.tensor([[0, 3, 1], [4, 9, 0]])  # element 3 belongs to nobody
VALUES = {"adam": [0.01, 0.1, 0.02, 0.8, 0.95, 1e-3, 1e-2], "sgd": [0.01, 0.1, 0.02, 0.8, 0.3]}
RULES = {"adam": ADAM, "plain": SGD_PLAIN, "momentum": SGD_MOMENTUM, "nesterov": SGD_NESTEROV}


class Case:
    """Random inputs of one rule, and its operators under one calling convention."""

    def __init__(self, name: str, k: int, dtype=torch.float64, grad_dtype=None, requires_grad=False):
        self.rule: Rule = RULES[name]
        self.k = k
        generator = torch.Generator().manual_seed(len(name) + k)

        def random(dtype=dtype, positive=False):
            x = torch.randn(N, generator=generator, dtype=torch.float64)
            return ((x.abs() + 0.1) if positive else x).to(dtype).requires_grad_(requires_grad)

        self.params = random()
        self.slots = [random(positive=slot == "exp_avg_sq") for slot in self.rule.slots]
        self.grad = random(grad_dtype or dtype)
        values = torch.tensor(VALUES[self.rule.name], dtype=torch.float64)
        self.hyper = torch.stack([values, 0.9 * values]).requires_grad_(requires_grad)
        self.adjoints = [random() for _ in range(1 + len(self.slots))]

    def inputs(self) -> list[Tensor]:
        return [self.params, *self.slots, self.grad, self.hyper]

    def arguments(self) -> tuple:
        """Those of the step."""
        if self.rule.name == "adam":
            return (self.params, *self.slots, self.grad, self.hyper, self.k, SEGMENTS)
        return (self.params, self.slots, self.grad, self.hyper, self.k, SEGMENTS, self.rule.nesterov)

    def adjoint_arguments(self) -> tuple:
        return tuple(self.adjoints) if self.rule.name == "adam" else (self.adjoints,)

    def step(self, params, *rest) -> tuple[Tensor, ...]:
        """The functional step of `inputs()`."""
        *slots, grad, hyper = rest
        if self.rule.name == "adam":
            return ops.adam_step(params, *slots, grad, hyper, self.k, SEGMENTS)
        return tuple(ops.sgd_step(params, slots, grad, hyper, self.k, SEGMENTS, self.rule.nesterov))

    def operator(self, suffix: str):
        return getattr(ops, ("adam" if self.rule.name == "adam" else "sgd") + suffix)


def expected_step(case: Case) -> list[Tensor]:
    """The specification in float64, by the plain functions of the reference."""
    old = [tensor.detach().double() for tensor in (case.params, *case.slots)]
    new = [tensor.clone() for tensor in old]
    for start, stop, group in SEGMENTS.tolist():
        p, *slots = (tensor[start:stop] for tensor in old)
        grad = case.grad.detach().double()[start:stop]
        found = reference.step(case.rule, p, slots, grad, case.hyper[group].tolist(), case.k)
        for whole, part in zip(new, found, strict=True):
            whole[start:stop] = part
    return new


def expected_vjp(case: Case) -> list[Tensor]:
    """Autograd through the plain functions of the reference, in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in case.inputs()]
    total = torch.zeros((), dtype=torch.float64)
    for start, stop, group in SEGMENTS.tolist():
        *state, grad = (tensor[start:stop] for tensor in leaves[:-1])
        new = reference.step(case.rule, state[0], state[1:], grad, leaves[-1][group].unbind(), case.k)
        for out, adjoint in zip(new, case.adjoints, strict=True):
            total = total + (out * adjoint.detach().double()[start:stop]).sum()
    *adjoints, u, dhyper = torch.autograd.grad(total, leaves, materialize_grads=True)
    for adjoint, given in zip(adjoints, case.adjoints, strict=True):
        adjoint[3] = given.detach()[3]  # outside every segment the step is the identity
    return [*adjoints, u, dhyper]


everything = [(name, k) for name in RULES for k in (1, 3)]


@pytest.mark.parametrize("name, k", everything)
@pytest.mark.parametrize("suffix", ["_step", "_step_", "_step_vjp", "_step_vjp_"])
def test_opcheck(name, k, suffix):
    case = Case(name, k, requires_grad=not suffix.endswith("_"))
    arguments = case.arguments()
    if "vjp" in suffix:
        arguments += case.adjoint_arguments()
    if suffix == "_step_vjp_":
        arguments += (torch.zeros(N, dtype=torch.float64),)
    torch.library.opcheck(case.operator(suffix), arguments)


@pytest.mark.parametrize("name, k", everything)
def test_step_equals_the_specification(name, k):
    case = Case(name, k)
    expected = expected_step(case)
    for found, value in zip(case.step(*case.inputs()), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-13, atol=1e-15)
    before = [tensor.clone() for tensor in case.inputs()]
    assert case.operator("_step_")(*case.arguments()) is None
    for found, value in zip((case.params, *case.slots), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-13, atol=1e-15)
    assert not torch.equal(case.params, before[0])
    assert torch.equal(case.grad, before[-2])


@pytest.mark.parametrize("name, k", everything)
def test_vjp_equals_autograd_through_the_specification(name, k):
    case = Case(name, k)
    expected = expected_vjp(case)
    found = case.operator("_step_vjp")(*case.arguments(), *case.adjoint_arguments())
    for got, value in zip(found, expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-13)
    u = torch.zeros(N, dtype=torch.float64)
    dhyper = case.operator("_step_vjp_")(*case.arguments(), *case.adjoint_arguments(), u)
    for got, value in zip([*case.adjoints, u, dhyper], expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name, k", everything)
def test_first_and_second_derivatives(name, k):
    case = Case(name, k, requires_grad=True)
    assert torch.autograd.gradcheck(case.step, case.inputs())
    assert torch.autograd.gradgradcheck(case.step, case.inputs())


def test_partial_requires_grad_and_unused_outputs():
    case = Case("adam", 2)
    case.hyper.requires_grad_()
    case.adjoints = [torch.ones(N, dtype=torch.float64), *map(torch.zeros_like, case.adjoints[1:])]
    case.step(*case.inputs())[0].sum().backward()
    torch.testing.assert_close(case.hyper.grad, expected_vjp(case)[-1], rtol=1e-11, atol=1e-13)
    assert case.params.grad is None


def test_one_tensor_in_two_places():
    """Both moments start out as one and the same zero tensor: each place must get its own derivatives."""
    case = Case("adam", 1, requires_grad=True)

    def twice_differentiated(shared):
        new = ops.adam_step(case.params, shared, shared, case.grad, case.hyper, 1, SEGMENTS)
        (first,) = torch.autograd.grad(sum((x * x).sum() for x in new), shared, create_graph=True)
        return first

    assert torch.autograd.gradcheck(twice_differentiated, [case.slots[1]])


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients(grad_dtype):
    """Cotangents come back in each input's own dtype; the values are those of float32 arithmetic."""
    case = Case("adam", 3, torch.float32, grad_dtype, requires_grad=True)
    expected = expected_vjp(case)
    new = case.step(*case.inputs())
    total = sum((out * adjoint.detach()).sum() for out, adjoint in zip(new, case.adjoints, strict=True))
    found = torch.autograd.grad(total, case.inputs())
    for got, value, leaf in zip(found, expected, case.inputs(), strict=True):
        assert got.dtype == leaf.dtype
        # u is rounded to the gradient's dtype; float32 sums of a dozen rounded terms stay within 16 roundings.
        eps = torch.finfo(got.dtype).eps if got is found[-2] else 16 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(got.double(), value, rtol=eps, atol=eps)


@pytest.mark.parametrize("name", ["adam", "nesterov"])
def test_compile_without_graph_breaks_and_without_recompiling_for_values(name):
    case = Case(name, 3, requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")

    def gradients(step, hyper):
        leaves = [*case.inputs()[:-1], hyper.detach().requires_grad_()]
        return torch.autograd.grad(sum((x * x).sum() for x in step(*leaves)), leaves)

    compiled = torch.compile(case.step, backend=counter, fullgraph=True)
    for factor in (1.0, 0.5, 0.25):
        expected = gradients(case.step, factor * case.hyper)
        for got, value in zip(gradients(compiled, factor * case.hyper), expected, strict=True):
            assert torch.equal(got, value)
    assert counter.frame_count == 1


def test_compile_in_place_with_a_step_count_that_changes():
    """A changing k costs one recompilation, which makes it symbolic, and none after."""
    counter = CompileCounterWithBackend("aot_eager")
    case, eager = Case("adam", 1), Case("adam", 1)

    def function(params, m, v, grad, hyper, k):
        ops.adam_step_(params, m, v, 2 * grad, hyper, k, SEGMENTS)
        return params * 1

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for k in (2, 3, 4, 5):
        got = compiled(*case.inputs(), k)
        assert torch.equal(got, function(*eager.inputs(), k))
        for mine, theirs in zip(case.slots, eager.slots, strict=True):
            assert torch.equal(mine, theirs)
    assert counter.frame_count <= 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor's own imports
def test_inductor():
    """No arithmetic beside the operators: what is tested is that inductor calls them, not its C++ compiler."""
    case = Case("momentum", 3, torch.float32)

    def function(params, buffer, grad, hyper):
        new = ops.sgd_step(params, [buffer], grad, hyper, 3, SEGMENTS, False)
        ops.sgd_step_(*new[:1], new[1:], grad, hyper, 4, SEGMENTS, False)
        return new

    got = torch.compile(function, fullgraph=True)(*case.inputs())
    for mine, theirs in zip(got, function(*case.inputs()), strict=True):
        assert torch.equal(mine, theirs)


def test_errors_say_what_was_expected():
    case = Case("adam", 1)
    params, m, v, grad, hyper, k, segments = case.arguments()
    with pytest.raises(BadArgument, match=r"hyper float64 \[groups, 7\]"):
        ops.adam_step(params, m, v, grad, hyper.float(), k, segments)
    with pytest.raises(BadArgument, match=r"hyper float64 \[groups, 7\]"):
        ops.adam_step(params, m, v, grad, hyper[:, :5], k, segments)
    with pytest.raises(BadArgument, match="k=0"):
        ops.adam_step(params, m, v, grad, hyper, 0, segments)
    with pytest.raises(BadArgument, match=r"segments int64 \[R, 3\]"):
        ops.adam_step(params, m, v, grad, hyper, k, segments.int())
    with pytest.raises(BadArgument, match="one dtype"):
        ops.adam_step(params, m.float(), v, grad, hyper, k, segments)
    with pytest.raises(BadArgument, match=r"got 0 slots with nesterov=True"):
        ops.sgd_step(params, [], grad, hyper[:, :5], k, segments, True)
