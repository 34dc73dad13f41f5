"""Operators of a graph that move to where their results are read."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from mgd.autodiff.order import compute_late


def traced(function, *inputs) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


def names(module: fx.GraphModule) -> list[str]:
    return [
        node.target._schema.name.removeprefix("aten::") for node in module.graph.nodes if node.op == "call_function"
    ]


def test_a_product_larger_than_its_factors_is_computed_where_it_is_read():
    def function(x):
        column, row = x.sin(), x.cos()
        outer = torch.mm(column.view(-1, 1), row.view(1, -1))
        other = (column * row).exp()  # reads the factors later than that
        return outer + other

    x = torch.randn(64)
    module = traced(function, x)
    before = names(module)
    assert before.index("mm") < before.index("exp")
    compute_late(module)
    after = names(module)
    assert after.index("mm") > after.index("exp") and sorted(after) == sorted(before)
    module.graph.lint()
    assert torch.equal(module(x), function(x))


def test_what_would_hold_more_than_it_saves_stays_where_it_is():
    def function(x):
        small = torch.mm(x.sin(), x.cos()).sum(0)
        return x.exp().tanh() * small

    moved = names(compute_late(traced(function, torch.randn(8, 8))))
    assert moved.index("sum") < moved.index("exp")


def test_random_numbers_are_drawn_in_their_order():
    def function(x):
        first = torch.rand(64, 64)
        second = torch.rand(64)
        return first * (second + x.exp())

    x = torch.randn(64)
    module = compute_late(traced(function, x))
    torch.manual_seed(0)
    expected = function(x)
    torch.manual_seed(0)
    assert torch.equal(module(x), expected)


def test_chains_move_together_and_keep_their_bits():
    def function(x, y):
        a = torch.mm(x, y)
        b = torch.mm(a, a)
        c = (x.t() @ x).sum() + (y @ y.t()).sum()
        return b + c, a * c

    x, y = torch.randn(32, 4), torch.randn(4, 32)
    module = compute_late(traced(function, x, y))
    module.graph.lint()
    before = names(traced(function, x, y))
    assert names(module) != before and sorted(names(module)) == sorted(before)
    assert all(map(torch.equal, module(x, y), function(x, y)))
