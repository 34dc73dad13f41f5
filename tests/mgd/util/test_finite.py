"""Whether tensors are finite, by their sum where that says so."""

import pytest
import torch

from mgd.util.finite import all_finite


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_one_wrong_entry_is_seen(wrong):
    x = torch.randn(100)
    assert all_finite(x)
    x[50] = wrong
    assert not all_finite(x)


def test_infinities_that_cancel_are_seen():
    assert not all_finite(torch.tensor([float("inf"), -float("inf")]))


def test_a_sum_that_overflows_is_no_infinity():
    assert all_finite(torch.full((4,), 3e38)) and all_finite(torch.full((2,), 6e4, dtype=torch.float16))


def test_tensors_of_a_graph_and_empty_ones():
    assert all_finite(torch.ones(2, requires_grad=True) * 2) and all_finite(torch.empty(0))
