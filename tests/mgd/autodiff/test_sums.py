"""Sums in a traced graph: the same bits, less memory, nothing overwritten that is read again."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mgd.autodiff.graphs import clean
from mgd.autodiff.sums import add_in_place

aten = torch.ops.aten


def graphs(function, *inputs):
    """The function's graph before and after; the first output stands for the loss."""
    return make_fx(function)(*inputs), add_in_place(make_fx(function)(*inputs))


def count(graph, *targets) -> int:
    return sum(node.target in targets for node in graph.graph.nodes)


def check(function, *inputs, sums_left: int):
    before, after = graphs(function, *inputs)
    copies = [x.clone() for x in inputs]
    for _ in range(2):  # a second run would see what the first had overwritten
        for got, value in zip(after(*inputs), before(*inputs), strict=True):
            assert torch.equal(got, value)
    assert all(map(torch.equal, inputs, copies))
    assert count(after, aten.add.Tensor) == sums_left
    return after


@pytest.fixture
def matrices():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, generator=g, dtype=torch.float64) for _ in range(4)]


def test_products_take_the_sum(matrices):
    def function(a, b, c, d):
        batch = lambda x: x.view(2, 2, 4)
        products = (a @ c).view(2, 8) + (b @ d).view(2, 8) + (b @ a).view(2, 8)
        return a.sum(), a @ b + c @ d, products, batch(a) @ batch(b).mT + batch(c) @ batch(d).mT

    check(function, *matrices, sums_left=0)


def test_what_is_read_again_is_not_overwritten(matrices):
    def function(a, b, c, d):
        p, q = a @ b, c @ d
        return a.sum(), p + q, p.relu(), q.relu(), a + p

    check(function, *matrices, sums_left=2)


def test_inputs_are_not_overwritten(matrices):
    def function(a, b, c, d):
        return a.sum(), a + b, d.view(2, 8) + (b @ c).view(2, 8), a + b @ c

    after = check(function, *matrices, sums_left=1)
    assert count(after, aten.add_.Tensor) == 2  # into the products


def test_sums_take_the_memory_of_a_summand_that_nobody_else_reads(matrices):
    def function(a, b, c, d):
        image = lambda x: x.view(1, 1, 4, 4)
        products = torch.conv2d(image(a), image(b)[:, :, :1, :1]) + torch.conv2d(image(c), image(d)[:, :, :1, :1])
        return a.sum(), products, a * b + c * d, a * b + c.view(1, 4, 4)

    after = check(function, *matrices, sums_left=1)  # the last one is larger than its fresh summand
    assert count(after, aten.add_.Tensor) == 2


def test_sums_keep_their_layout(matrices):
    """A view that comes later would not fit another one."""
    check(lambda a, b, c, d: (a.sum(), (a.T + b * c).T.view(16)), *matrices, sums_left=1)


def test_sums_with_zeros_go(matrices):
    def function(a, b, c, d):
        return a.sum(), torch.zeros_like(a) + b, c * 1 + torch.zeros(4, 4, dtype=a.dtype), d + torch.zeros(1, 4, 4)

    cleaned = clean(make_fx(function)(*matrices))
    assert count(cleaned, aten.add.Tensor) == 1  # the last one is larger than the other summand
    for got, value in zip(cleaned(*matrices), function(*matrices), strict=True):
        assert torch.equal(got, value)
