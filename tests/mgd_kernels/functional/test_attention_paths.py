"""Attention that is told the same thing in two ways gives the same bits: models choose one by the values of a mask, and
the other in a graph, where values are not known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgd_kernels.functional import attention as whole
from mgd_kernels.functional import attention_strips as strips
from mgd_kernels.functional import scaled_dot_product_attention

LENGTHS, HEADS = [5, 16, 31, 77], 12


@pytest.fixture(params=["whole", "strips"], autouse=True)
def path(request, monkeypatch):
    if request.param == "strips":
        monkeypatch.setattr(strips, "_ROWS", 16)
        monkeypatch.setattr(whole, "LARGE", 0)


def problem(length: int, heads: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(length)
    return [torch.randn(2, h, length, 24, generator=g).requires_grad_() for h in (HEADS, heads, heads)]


def repeated(x: Tensor) -> Tensor:
    return x[:, :, None].expand(-1, -1, HEADS // x.shape[1], -1, -1).reshape(2, HEADS, *x.shape[2:])


def derivatives(function, inputs: list[Tensor]) -> list[Tensor]:
    o = function(*inputs)
    first = torch.autograd.grad((o * o.detach().cos()).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum((x * x.detach().sin()).sum() for x in first), inputs)
    return [x.detach() for x in (o, *first, *second)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_mask_that_hides_the_future_is_causal(length, kind):
    seen = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, length, length)
    mask = seen if kind is torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    inputs = problem(length, HEADS)
    plain = derivatives(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), inputs)
    assert same(plain, derivatives(lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask), inputs))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_mask_that_hides_nothing_is_none(length):
    mask, inputs = torch.ones(2, 1, length, length, dtype=torch.bool), problem(length, HEADS)
    plain = derivatives(lambda q, k, v: scaled_dot_product_attention(q, k, v), inputs)
    assert same(plain, derivatives(lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask), inputs))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_grouped_queries_are_those_of_repeated_keys(length, heads, causal):
    inputs, options = problem(length, heads), {"is_causal": causal}
    grouped = derivatives(lambda *x: scaled_dot_product_attention(*x, enable_gqa=True, **options), inputs)
    each = derivatives(lambda q, k, v: scaled_dot_product_attention(q, repeated(k), repeated(v), **options), inputs)
    assert same(grouped, each)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    torchs = derivatives(
        lambda *x: torch.nn.functional.scaled_dot_product_attention(*x, enable_gqa=True, **options), exact
    )
    # Of a norm: the second derivatives of both are in directions that differ by rounding.
    assert all(float((x - y).norm() / y.norm()) < 1e-5 for x, y in zip(grouped, torchs, strict=True))


@pytest.mark.parametrize("column", [0, 3, 15, 19])
@pytest.mark.parametrize("kind", ["logit", "mask", "only one seen"])
def test_nan_is_not_taken_for_hidden(kind, column):
    q, k, v = (x.detach().clone() for x in problem(20, HEADS))
    mask = torch.zeros(2, 1, 20, 20)
    if kind == "only one seen":
        mask.fill_(-torch.inf)[..., column] = 0
    if kind == "mask":
        mask[..., column] = torch.nan
    else:
        k[:, :, column] = torch.nan
    assert scaled_dot_product_attention(q, k, v, attn_mask=mask).isnan().all()
