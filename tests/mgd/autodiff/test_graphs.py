"""Graphs without mutation: the same values, or a second trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from mgd.autodiff.graphs import _changes, clean, without_mutation
from mgd_kernels.functional import linear_cross_entropy


def dropped(x, y):
    return F.dropout(x, 0.5) * y


def dropped_crosswise(x, y):
    """A mask is drawn in the order of memory, here not that of the dimensions."""
    wide = torch.cat([x * y] * 8, 1).t()
    return F.dropout(wide, 0.5) * wide


def masked(x, y):
    return (x * y).masked_fill_(x > 1.5, 0.0)


def masked_and_dropped(x, y):
    """What changes a view is left; what comes after it is not."""
    masked = torch.cat([x * y] * 8, 1)
    masked[0].mul_(2.0)
    masked = masked.masked_fill_(masked > 1.5, 0.0).t()
    return F.dropout(masked, 0.5) * masked


def with_noise(x, y):
    return torch.zeros_like(torch.cat([x * y] * 8, 1).t()).normal_()


def scaled(x, y):
    a = x * y
    before = a + 1
    a.mul_(3.0)
    a.add_(y)
    return before, a + before


def through_a_view(x, y):
    a = x * y
    b = a.view(-1)
    a.mul_(2.0)
    return b + 1


def of_an_input(x, y):
    return x.mul_(2.0) + y


def of_another_dtype(x, y):
    return (x.float() * 2).add_(y)


@pytest.mark.parametrize("function, replaced", [
    (dropped, True), (dropped_crosswise, True), (masked, True), (scaled, True), (masked_and_dropped, False),
    (with_noise, False), (through_a_view, False), (of_an_input, False), (of_another_dtype, False),
])  # fmt: skip
def test_a_mutation_becomes_a_result_of_its_own(function, replaced):
    x, y = torch.linspace(1, 2, 6, dtype=torch.float64).view(2, 3), torch.ones(2, 3, dtype=torch.float64)
    module = make_fx(function, tracing_mode="fake")(x, y)
    assert any(map(_changes, module.graph.nodes))
    assert without_mutation(module) == replaced
    module.graph.lint()
    results = []
    for f in (module, function):
        torch.manual_seed(0)
        results.append(f(x.clone(), y))
    for got, expected in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        assert torch.equal(got, expected)
    assert any(map(_changes, module.graph.nodes)) != replaced


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_without_logits_computes_the_gradients_that_are_read(reduction):
    g = torch.Generator().manual_seed(0)
    target, tensors = torch.arange(6) % 4, [torch.randn(n, 3, generator=g) for n in (6, 4)]

    def gradients(count):
        def function(*tensors):
            x = [t.detach().requires_grad_() for t in tensors]
            loss = linear_cross_entropy(*x, target, reduction=reduction).sum()
            return tuple(torch.autograd.grad(loss, x, create_graph=True)[:count])

        return function

    for count in (1, 2):
        module = clean(make_fx(gradients(count))(*tensors))
        asked = [
            arg
            for node in module.graph.nodes
            if str(node.target).startswith("mgd_kernels")
            for arg, of in zip(node.args, node.target._schema.arguments, strict=True)
            if of.name == "parameters"
        ]
        assert len(asked) == (2 if reduction == "mean" else 1) and set(asked) == {count == 2}
        assert all(map(torch.equal, module(*tensors), gradients(count)(*tensors)))


@pytest.mark.parametrize("joined", [True, False])
def test_losses_and_their_gradients_are_one_operator_where_weights_are_known_before(joined):
    g = torch.Generator().manual_seed(0)
    target, tensors = torch.arange(6) % 4, [torch.randn(*shape, generator=g) for shape in ((6, 3), (4, 3), (6,))]

    def function(h, w, weights):
        x = [t.detach().requires_grad_() for t in (h, w)]
        losses = linear_cross_entropy(*x, target, reduction="none")
        loss = (weights.sigmoid() * losses).sum() if joined else (losses * losses * weights).sum()
        first = torch.autograd.grad(loss, x, create_graph=True)
        return loss, *first, *torch.autograd.grad(first, x, (h, w))

    module = clean(make_fx(function)(*tensors))
    module.graph.lint()
    own = [str(node.target) for node in module.graph.nodes if "mgd_kernels" in str(node.target)]
    together, apart = ["with_gradients", "double_backward"], ["backward", "double_backward", "backward"]
    expected = [f"mgd_kernels.linear_cross_entropy_{kind}.default" for kind in (together if joined else apart)]
    assert own == expected if joined else own[1:] == expected
    for got, value in zip(module(*tensors), function(*tensors), strict=True):
        assert torch.equal(got, value)
