"""Metasmoothness against trainings whose dependence on a metaparameter is known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mgd
from mgd.errors import BadArgument
from mgd_kernels import SGD


class Points(nn.Module):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(2, dtype=torch.float64))


def one_step(gradient):
    """One SGD step of size 1 from 0: the trained parameters are `-gradient(a)` for the metaparameter a."""

    def loss(model, batch, z):
        return (model.at * gradient(z["a"])).sum()

    f = mgd.TrainingFunction(Points(), loss, [torch.zeros(1)], optimizer=SGD(lr=1.0), objective=lambda m: m.at.sum())
    return lambda a, h: mgd.metasmoothness(f, {"a": torch.tensor(a, dtype=torch.float64)}, {"a": torch.tensor(1.0)}, h)


def test_linear_training_is_smooth():
    assert one_step(lambda a: torch.stack([2 * a, -3 * a]))(0.5, 0.1) == pytest.approx(1.0)


def test_turning_parameters_vote_against_by_how_far_they_move():
    slowing = one_step(lambda a: torch.stack([a, 2 * a - 0.5 * a**2]))  # the second goes 0, 1.5, 2
    assert slowing(0.0, 1.0) == pytest.approx(1.0)
    turning = one_step(lambda a: torch.stack([a, 2.5 * a - a**2]))  # the first 0, 1, 2; the second 0, 1.5, 1
    assert turning(0.0, 1.0) == pytest.approx((2 - 1) / (2 + 1))


def test_bad_arguments():
    smoothness = one_step(lambda a: torch.stack([a, a]))
    with pytest.raises(BadArgument, match="h > 0"):
        smoothness(0.0, 0.0)
    with pytest.raises(BadArgument, match="no trained parameter moves"):
        one_step(lambda a: torch.stack([0 * a, 0 * a]))(0.0, 1.0)
