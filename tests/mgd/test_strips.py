"""A training whose attention goes by strips: its metagradient, by autograd and captured, beside an unrolled graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import assert_exact, errors, supervised
from same_bits import same
from torch import nn

from mgd_kernels import functional
from mgd_kernels.functional import attention as whole
from mgd_kernels.functional.attention_strips import attention


class Attention(nn.Module):
    """Grouped queries, causal, and a bias that is trained."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.q, self.kv, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.bias = nn.Parameter(torch.randn(1, 4, 7, 7))

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, 2).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, 2, 2).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        o = o + F.scaled_dot_product_attention(q, k, v, self.bias, self.dropout, enable_gqa=True)
        return self.out(o.transpose(1, 2).flatten(2)).mean(1)


def case(dropout: float = 0.0):
    torch.manual_seed(0)
    return supervised(Attention(dropout), (7, 6), steps=4)


@pytest.fixture
def by_strips(monkeypatch):
    """Matrices of any size; the calls are counted."""
    calls = []
    monkeypatch.setattr(whole, "LARGE", 0)
    monkeypatch.setattr(whole, "attention", lambda *args: calls.append(args) or attention(*args))
    return calls


@pytest.mark.parametrize("trace", [False, True])
def test_metagradient(by_strips, trace):
    result = assert_exact(case(), trace=trace)
    assert by_strips and result.report.execution == ("captured" if trace else "eager")


@pytest.mark.parametrize("trace", [False, True])
def test_dropout(by_strips, monkeypatch, trace):
    """Beside an unrolled graph with the same masks, which torch's own function would draw otherwise."""
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", functional.scaled_dot_product_attention)
        expected = case(0.3).unrolled()
    result = case(0.3).metagradient(trace=trace)
    assert result.report.execution == ("captured" if trace else "eager")
    assert max(errors(result, expected).values()) < 1e-10
    assert max(errors(result, case().unrolled()).values()) > 1e-2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_capture_has_the_bits_of_autograd(by_strips, dropout):
    results = [case(dropout).to(torch.float32).metagradient(trace=trace) for trace in (False, True)]
    assert same(*results)
