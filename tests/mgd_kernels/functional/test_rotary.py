"""Rotary embeddings: two operators that are each other's derivatives, any number of times."""

from __future__ import annotations

import pytest
import torch
from operator_cases import CASES, EPS, random_like, written_out_rotary
from torch.fx.experimental.proxy_tensor import make_fx

from mgd_kernels import functional
from mgd_kernels.errors import BadArgument

ops = torch.ops.mgd_kernels
every_case = pytest.mark.parametrize("name", [name for name in CASES if name.startswith("rotary")])


def derivatives(function, inputs, dtype, orders=3):
    """Of a non-linear function of the embedding: value and gradients up to this order."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    value, found = function(*inputs).sin().sum(), []
    for order in range(orders):
        grads = torch.autograd.grad(value, inputs, create_graph=True)
        found += grads
        weights = random_like(list(grads), order)
        value = sum(((g + g.square()) * w).sum() for g, w in zip(grads, weights, strict=True))
    return [x.detach() for x in found]


@every_case
def test_three_derivatives(name):
    inputs = CASES[name].inputs
    mine = derivatives(functional.rotary, inputs, torch.float32)
    exact = derivatives(written_out_rotary, inputs, torch.float64)
    for got, value in zip(mine, exact, strict=True):
        # Sums over batch and heads of up to three dozen rounded operations each.
        torch.testing.assert_close(got.double(), value, rtol=0, atol=100 * EPS * float(value.abs().max()))


def test_finite_differences():
    x, cos, sin = CASES["rotary-2x3x5x8"].inputs
    g, (u, v, w) = torch.randn_like(x), (torch.randn_like(t) for t in (x, cos, sin))
    inputs = [t.clone().requires_grad_() for t in (x, cos, sin)]
    grads = torch.autograd.grad(functional.rotary(*inputs), inputs, g)
    step = 1e-2  # rotary is a polynomial of degree 2, for which a central difference is exact
    ends = [functional.rotary(x + s * u, cos + s * v, sin + s * w).double() for s in (step, -step)]
    slope = (g * (ends[0] - ends[1])).sum() / (2 * step)
    found = sum((a.double() * b).sum() for a, b in zip(grads, (u, v, w), strict=True))
    torch.testing.assert_close(found, slope, rtol=1e-3, atol=1e-3)


@every_case
def test_heads_between_positions_and_other_layouts(name):
    x, cos, sin = CASES[name].inputs
    expected = functional.rotary(x, cos, sin)
    for spread in (x.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([x, x], -1)[..., 0]):
        assert torch.equal(functional.rotary(spread, cos, sin), expected)
    gy = torch.randn_like(x)
    sums = ops.rotary_sums(gy, x, cos.shape[0])
    again = ops.rotary_sums(gy.transpose(1, 2).contiguous().transpose(1, 2), x.expand(1, *x.shape)[0], cos.shape[0])
    assert all(map(torch.equal, sums, again))


def test_bits_do_not_depend_on_threads():
    g = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(*shape, generator=g) for shape in ((5, 7, 130, 24), (1, 1, 130, 24), (1, 1, 130, 24)))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(derivatives(functional.rotary, (x, cos, sin), torch.float32, 2))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_traced_to_one_node_a_call():
    def gradient(x, cos, sin):
        inputs = [t.detach().requires_grad_() for t in (x, cos, sin)]
        y = functional.rotary(*inputs)
        return torch.autograd.grad(y, inputs, torch.ones_like(y))

    inputs = CASES["rotary-2x3x5x8"].inputs
    traced = make_fx(gradient)(*inputs)
    names = [str(node.target) for node in traced.graph.nodes if "mgd_kernels" in str(node.target)]
    assert names == ["mgd_kernels.rotary.default"] * 2 + ["mgd_kernels.rotary_sums.default"]
    assert all(map(torch.equal, traced(*inputs), gradient(*inputs)))


def test_what_is_not_served_is_written_out():
    x, cos, sin = CASES["rotary-2x3x5x8"].inputs
    for arguments in ((x[0], cos[0], sin[0]), (x, cos.expand(2, 3, 5, 8), sin), (x[:0], cos, sin)):
        assert torch.equal(functional.rotary(*arguments), written_out_rotary(*arguments))


@pytest.mark.parametrize("cotangent", ["cos", "sin"])
def test_absent_cotangents(cotangent):
    x, cos, sin = (t.detach().requires_grad_() for t in CASES["rotary-2x3x5x8"].inputs)
    found = []
    for function in (functional.rotary, written_out_rotary):
        y = function(x, cos, sin)
        (g,) = torch.autograd.grad(y, cos if cotangent == "cos" else sin, y.detach(), create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


def test_operators_check_what_they_are_given():
    x, cos, sin = CASES["rotary-2x3x5x8"].inputs
    with pytest.raises(BadArgument, match="float32"):
        ops.rotary(x.double(), cos, sin, False)
    with pytest.raises(BadArgument, match=r"\[1, 1, 5, 8\]"):
        ops.rotary(x, cos[:, :, :4], sin, False)
    with pytest.raises(BadArgument, match="one shape"):
        ops.rotary_sums(x, x[:1], 1)


def test_opcheck():
    x, cos, sin = (t.detach().requires_grad_() for t in CASES["rotary-2x3x5x8"].inputs)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.rotary.default, (x, cos, sin, False), test_utils=utilities)
    torch.library.opcheck(ops.rotary_sums.default, (x, x.detach(), 1), test_utils=utilities)
