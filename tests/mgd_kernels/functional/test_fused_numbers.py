"""Operators with fused second derivatives against torch in float64, on ordinary and on extreme inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operator_cases import (
    CASES,
    EPS,
    SAMPLES,
    Case,
    check_against_float64,
    derivatives,
    every_case,
    plain_norm,
    random_like,
    tensors,
    torchs_batch_norm,
)

from mgd_kernels import _core, functional


@every_case
def test_values_gradients_and_second_derivatives(name):
    check_against_float64(CASES[name])


@pytest.mark.parametrize("isa", [isa for isa in _core.isas() if isa != _core.isa()])
def test_every_instruction_set(isa):
    default = _core.isa()
    try:
        _core.use_isa(isa)
        for case in CASES.values():
            check_against_float64(case)
    finally:
        _core.use_isa(default)


# --- Extreme inputs -----------------------------------------------------------------------------------------------

EXTREMES = [0.0, -0.0, 1e-40, -1e-30, 1e-8, 0.62, 0.63, -5.5, 8.0, -13.0, 20.0, -40.0, 100.0, -1e4, 1e10, -1e30]


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])
def test_activations_in_the_tails(name):
    """Exact to 4e-7 of 1 + |value| where float64 is finite (torch's gelu_tanh overflows beyond 1e12), and never NaN."""
    case = CASES[name + "-1"]
    x = torch.tensor(EXTREMES)
    mine = derivatives(case.ours, [x])
    exact = derivatives(case.theirs, [x], torch.float64)
    for got, value in zip(mine, exact, strict=True):
        assert got.isfinite().all()
        inside = value.isfinite()
        assert inside.sum() >= 13
        torch.testing.assert_close(got[inside].double(), value[inside], rtol=1e-6, atol=4e-7)


def test_gelu_is_accurate_to_units_in_the_last_place_in_the_left_tail():
    """x Phi(x) has a relative error of a few roundings where 1 + erf would have lost every digit."""
    x = torch.linspace(-12, 6, 20001)
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2  # torch's ndtr cancels
    relative = ((functional.gelu(x) - exact) / exact)[exact != 0].abs().max()
    assert relative <= 3 * EPS


def test_not_a_number_comes_through():
    x = torch.tensor([1.0, float("nan")] * 9)
    for function in (functional.gelu, functional.silu, functional.tanh, functional.sigmoid):
        assert torch.equal(function(x).isnan(), x.isnan())
    assert functional.softmax(x, 0).isnan().all()


def test_softmax_of_minus_infinity_and_large_logits():
    x = torch.tensor([[float("-inf"), 0.0, 1e4, 1e4 - 1], [float("-inf")] * 3 + [-3.0]])
    torch.testing.assert_close(functional.softmax(x, -1), F.softmax(x.double(), -1).float(), rtol=1e-6, atol=0)
    assert functional.softmax(torch.full((2, 40), float("-inf")), -1).isnan().all()
    check_against_float64(Case(*[lambda x, f=f: f(x, -1) for f in (functional.softmax, F.softmax)], [x], "softmax"))


def test_cross_entropy_of_large_logits_and_of_nothing():
    x, target = torch.tensor([[1e4, 0.0, 9998.0], [-1e4, -1e4, -9999.0]]), torch.tensor([0, 2])
    pair = [lambda x, f=f: f(x, target, reduction="none") for f in (functional.cross_entropy, F.cross_entropy)]
    check_against_float64(Case(*pair, [x], "cross_entropy"))
    ignored = torch.full((2,), -100)
    assert functional.cross_entropy(x, ignored).isnan() and F.cross_entropy(x, ignored).isnan()
    assert functional.cross_entropy(x, ignored, reduction="sum") == 0


@pytest.mark.parametrize("bad", [3, -1])
def test_target_out_of_bounds(bad):
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        functional.cross_entropy(torch.zeros(2, 3), torch.tensor([0, bad]))


@pytest.mark.parametrize("function", [functional.layer_norm, functional.group_norm])
def test_norms_of_data_far_from_zero(function):
    """A mean 1,000 times the deviation costs three digits in the input's own rounding, and no more."""
    x = 1000 + torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    argument = (64,) if function is functional.layer_norm else 4
    exact = getattr(F, function.__name__)(x.double(), argument)
    torch.testing.assert_close(function(x, argument).double(), exact, rtol=0, atol=1000 * EPS)


# --- Higher derivatives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SAMPLES, *(name for name in CASES if name.endswith("-plain"))])
def test_third_derivatives(name):
    """A gradient penalty inside a loss asks for them. Those of torch's LayerNorm and BatchNorm are wrong."""
    case = CASES[name]
    found = []
    for function, dtype in ((case.ours, torch.float32), (plain_norm(name) or case.theirs, torch.float64)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in case.inputs]
        values = tensors(function(*inputs))
        gy = [x.requires_grad_() for x in random_like(values, 1)]
        first = torch.autograd.grad(values, inputs, gy, create_graph=True)
        u = [x.requires_grad_() for x in random_like(list(first), 2)]
        second = torch.autograd.grad(first, [*inputs, *gy], u, create_graph=True, materialize_grads=True)
        live = [x for x in second if x.requires_grad]
        found.append(torch.autograd.grad(live, [*inputs, *gy, *u], random_like(live, 3), materialize_grads=True))
    for got, value in zip(*found, strict=True):
        # Three dozen roundings a result, of terms that are larger than it.
        torch.testing.assert_close(got.double(), value, rtol=0, atol=100 * EPS * max(1, float(value.abs().max())))


def test_absent_cotangents():
    """Only the bias's gradient is differentiated, only the mean is differentiated, a constant input: each alone."""
    x, w, b = (p.detach().requires_grad_() for p in CASES["batch_norm-4x8x5x5"].inputs)

    exact = [p.detach().double().requires_grad_() for p in (x, w, b)]

    def compare(derivative):
        mine = derivative(functional.batch_norm_with_statistics, x, w, b)
        for got, value in zip(mine, derivative(torchs_batch_norm, *exact), strict=True):
            torch.testing.assert_close(got.double(), value, rtol=0, atol=32 * EPS * float(value.abs().max()))

    def through_weights_only(f, x, w, b):
        y = f(x, w, b)[0]
        _, gw, _gb = torch.autograd.grad(y, [x, w, b], y.detach().square(), create_graph=True)
        return list(torch.autograd.grad(gw.square().sum(), x))

    compare(lambda f, x, w, b: list(torch.autograd.grad(f(x, w, b)[1].square().sum(), x)))
    compare(lambda f, x, w, b: list(torch.autograd.grad(f(x, w, b)[2].square().sum(), x)))
    compare(lambda f, x, w, b: list(torch.autograd.grad(f(x.detach(), w, b)[0].square().sum(), [w, b])))
    compare(through_weights_only)
