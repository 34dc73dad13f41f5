"""Formulas that models write out: which are replaced by a fused operator, which keeps their derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import mgd
from mgd.step.overrides import FunctionOverrides
from mgd_kernels import SGD


def llama_norm(x, w, eps=1e-2):
    variance = x.to(x.dtype).pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + eps)).to(x.dtype)


def gemma_norm(x, w):
    return x * (x.square().mean((-1,), True) + 1e-2).rsqrt() * (1.0 + w)


def product_norm(x, w):
    return (1e-2 + torch.mean(x * x, dim=[-1], keepdim=True)).rsqrt() * x * w


def new_gelu(x, w=None):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def other_gelu(x, w=None):
    return (1 + ((0.044715 * x**3 + x) * 0.7978845608).tanh()) * (x * 0.5)


def rotated(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def llama_rotary(x, w):
    """x and w make heads and angles, as a model's projections and positions do."""
    q, angles = heads_and_angles(x, w)
    return q * angles.cos() + rotated(q) * angles.sin()


def other_rotary(x, w):
    q, angles = heads_and_angles(x, w)
    return rotated(q) * angles.sin() + angles.cos() * q


def heads_and_angles(x, w):
    rows = torch.cat((x, -2 * x), -1).flatten(0, -2)
    q = torch.stack((rows, 3 - rows), 1)[None].transpose(1, 2)
    return q, torch.outer(torch.arange(len(rows), dtype=x.dtype), torch.cat((w, w)))[None, None]


FORMULAS = {
    f.__name__: f for f in (llama_norm, gemma_norm, product_norm, new_gelu, other_gelu, llama_rotary, other_rotary)
}
every_formula = pytest.mark.parametrize("name", FORMULAS)


def point(dtype=torch.float32, shape=(2, 3, 17)) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=g), torch.randn(shape[-1:], generator=g)]
    return [x.to(dtype).requires_grad_() for x in tensors]


def is_fused(y: Tensor) -> bool:
    fused = ("rms_norm_functionBackward", "activation_with_slope_functionBackward", "rotary_functionBackward")
    return type(y.grad_fn).__name__ in fused


def derivatives(function, x, w, overrides) -> list[Tensor]:
    """Value, gradients, and second and third derivatives along fixed directions."""
    with overrides:
        value = function(x, w)
    found, seed = [value], torch.linspace(-1, 2, value.numel(), dtype=x.dtype).view_as(value)
    for _ in range(3):
        grads = torch.autograd.grad(found[-1], [x, w], seed, create_graph=True, allow_unused=True)
        found.append(sum((g * (1 + p.detach())).sum() for g, p in zip(grads, (x, w), strict=True) if g is not None))
        seed = None
    return [x.detach() for x in (*found, *(g for g in grads if g is not None))]


@every_formula
@pytest.mark.parametrize("shape", [(2, 3, 17), (1, 1), (70, 40)])
def test_a_formula_is_fused_and_keeps_its_derivatives(name, shape):
    function = FORMULAS[name]
    x, w = point(shape=shape)
    with FunctionOverrides():
        assert is_fused(function(x, w))
    mine = derivatives(function, x, w, FunctionOverrides())
    exact = derivatives(function, *point(torch.float64, shape), FunctionOverrides(plain=True))
    for got, value in zip(mine, exact, strict=True):
        # A few dozen rounded operations and sums, relative to their largest terms.
        torch.testing.assert_close(got.double(), value, rtol=0, atol=2e-5 * max(1.0, float(value.abs().max())))


@every_formula
def test_a_formula_in_float64_is_as_it_is_written(name):
    function, (x, w) = FORMULAS[name], point(torch.float64)
    with FunctionOverrides():
        y = function(x, w)
    assert not is_fused(y) and torch.equal(y, function(x, w))


@every_formula
def test_a_formula_on_other_layouts_and_on_nothing(name):
    function, (x, w) = FORMULAS[name], point()
    spread = torch.stack([x, x], -1)[..., 0]
    empty = torch.empty(0, 17, requires_grad=True)
    with FunctionOverrides():
        assert torch.equal(function(spread, w), function(x, w))
        assert torch.equal(function(empty, w), function(empty.double(), w.double()).float())


def detached(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).detach() + 1e-2))


def constant(x, w):
    with torch.no_grad():
        square = x.pow(2)
    return w * (x * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-2))


def changed_part(x, w):
    variance = x.pow(2).mean(-1, keepdim=True)
    variance *= 2
    return w * (x * torch.rsqrt(variance + 1e-2))


def of_another(x, w):
    y = 2 * x
    return w * (y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2))


def over_rows(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-2))


def weighted_by_rows(x, w):
    return x[..., :1] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2))


def other_constant(x, w):
    return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * x**3)))


def rotary_of_two(x, w):
    q, angles = heads_and_angles(x, w)
    return q * angles.cos() + rotated(q + 0) * angles.sin()


def turned_backwards(x, w):
    q, angles = heads_and_angles(x, w)
    half = q.shape[-1] // 2
    return q * angles.cos() + torch.cat((q[..., half:], -q[..., :half]), dim=-1) * angles.sin()


def halves_of_two(x, w):
    y = x + 0
    return 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    "function",
    [
        detached,
        constant,
        changed_part,
        of_another,
        over_rows,
        weighted_by_rows,
        other_constant,
        halves_of_two,
        rotary_of_two,
        turned_backwards,
    ],
)
def test_what_only_resembles_a_formula_is_as_it_is_written(function):
    x, w = point()
    with FunctionOverrides():
        y = function(x, w)
    assert not is_fused(y)
    gy = torch.randn_like(y)
    for got, value in zip(torch.autograd.grad(y, x, gy), torch.autograd.grad(function(x, w), x, gy), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)


def test_a_part_that_has_other_readers():
    def function(x, w):
        normalised = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)
        return w * normalised + normalised.square()

    mine = derivatives(function, *point(), FunctionOverrides())
    for got, value in zip(mine, derivatives(function, *point(torch.float64), FunctionOverrides(True)), strict=True):
        torch.testing.assert_close(got.double(), value, rtol=0, atol=2e-5 * max(1.0, float(value.abs().max())))


class Norm(nn.Module):
    """look: what is done with the inside of the norm, once its result is there."""

    def __init__(self, look=lambda normalised, result: result):
        super().__init__()
        self.first, self.weight, self.look = nn.Linear(5, 6), nn.Parameter(torch.linspace(0.5, 2, 6)), look

    def forward(self, x):
        x = new_gelu(self.first(x))
        normalised = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)
        return self.look(normalised, self.weight * normalised)


def doubled(normalised, result):
    normalised.register_hook(lambda g: 2 * g)
    return result


def seen_by_grad_fn(normalised, result):
    normalised.grad_fn.register_hook(lambda inputs, outputs: tuple(None if g is None else 2 * g for g in inputs))
    return result


def inner_gradient(normalised, result):
    (g,) = torch.autograd.grad(result.square().sum(), normalised, create_graph=True)
    return result + g


def metagradient(model: nn.Module, **options):
    g = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    batches = [torch.randn(4, 5, generator=g).to(dtype) for _ in range(3)]
    f = mgd.TrainingFunction(
        model,
        lambda model, batch, z: (z["w"] * model(batch).cos()).mean(),
        batches,
        optimizer=SGD(lr=0.3),
        objective=lambda model: model(batches[0]).square().mean(),
        **options,
    )
    return f.metagradient({"w": torch.linspace(0.5, 1.5, 6, dtype=dtype)})


@pytest.mark.parametrize("look", [doubled, seen_by_grad_fn, inner_gradient])
def test_a_loss_that_looks_into_a_formula(look):
    """The gradient of a part is that of the formula as it is written."""
    torch.manual_seed(0)
    model = Norm(look)
    found = metagradient(model, trace=False).grads["w"]
    exact = metagradient(model.double(), trace=False).grads["w"]
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)


def test_a_captured_formula_is_one_operator_and_has_the_bits_of_the_eager_one(monkeypatch):
    from mgd.autodiff import joint

    graphs = []
    part = joint.part
    monkeypatch.setattr(joint, "part", lambda *args: graphs.append(part(*args)) or graphs[-1])
    torch.manual_seed(0)
    model = Norm()
    eager, captured = metagradient(model, trace=False), metagradient(model, trace=True)
    assert captured.report.execution.startswith("captured")
    assert torch.equal(eager.value, captured.value)
    names = [str(node.target) for node in graphs[1].graph.nodes if node.op == "call_function"]  # loss and gradient
    assert any("mgd_kernels.rms_norm" in name for name in names)
    assert not any(name.startswith(("aten.pow", "aten.rsqrt", "aten.tanh")) for name in names)
    exact = metagradient(model.double(), trace=False)
    torch.testing.assert_close(captured.grads["w"].double(), exact.grads["w"], rtol=1e-4, atol=1e-7)


def test_a_part_whose_factor_changes_afterwards():
    q, cos = torch.randn(2, 3, 4, 6, requires_grad=True), torch.rand(1, 1, 4, 6)
    expected = q * cos + rotated(q) * cos
    with FunctionOverrides():
        straight = q * cos
        cos += 1
        y = straight + rotated(q) * (cos - 1)
    assert not is_fused(y)
    torch.testing.assert_close(y, expected)


def test_functions_are_called_as_torch_allows():
    x = point()[0]
    with FunctionOverrides():
        torch.mul(input=x, other=2)
        torch.mean(input=x, dim=-1)
        torch.pow(2, x)
        torch.tanh(input=x)
        with torch.no_grad():
            torch.rsqrt(x.square().mean(-1, True), out=torch.empty(2, 3, 1))
