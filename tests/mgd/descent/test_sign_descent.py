"""Descent by signs moves a share of the coordinates, which seed and step alone determine."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mgd
from mgd.errors import BadArgument


def moved(seed: int, step: int, share: float, gradients: list[Tensor | None]) -> list[Tensor]:
    xs = [torch.zeros(1000, requires_grad=True) for _ in gradients]
    optimizer = mgd.SignDescent(xs, lr=0.25, share=share, seed=seed)
    for _ in range(step + 1):
        before = [x.detach().clone() for x in xs]
        for x, g in zip(xs, gradients, strict=True):
            x.grad = g
        optimizer.step()
    return [x.detach() - b for x, b in zip(xs, before, strict=True)]


def test_signs_on_a_share_of_the_coordinates():
    g = torch.randn(1000, generator=torch.Generator().manual_seed(0)).index_fill(0, torch.arange(10), 0.0)
    (everywhere,) = moved(0, 0, 1.0, [g])
    assert torch.equal(everywhere, -0.25 * g.sign())
    (part,) = moved(0, 0, 0.3, [g])
    chosen = part != 0
    assert torch.equal(part[chosen], everywhere[chosen])
    assert 230 < int(chosen.sum()) < 370  # 297 expected, standard deviation 14


def test_masks_are_a_function_of_seed_and_step_and_not_of_other_gradients():
    g = torch.ones(1000)
    (first,), (again,), (later,), (other,) = (moved(*key, 0.5, [g]) for key in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert torch.equal(first, again)
    for differs in (later, other):
        assert 400 < int((differs != first).sum()) < 600  # unrelated masks differ in half of the places
    assert torch.equal(moved(0, 0, 0.5, [g, g])[1], moved(0, 0, 0.5, [None, g])[1])


def test_whole_numbers_stay_whole_numbers():
    x = torch.tensor([3.0, 0.0, 7.0], requires_grad=True)
    optimizer = mgd.SignDescent([x], lr=1)
    x.grad = torch.tensor([0.2, -1e-9, 5.0])
    optimizer.step()
    assert x.tolist() == [2.0, 1.0, 6.0]


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": math.nan}, {"lr": 1.0, "share": 0.0}, {"lr": 1.0, "share": 1.5}])
def test_sign_descent_refuses_what_moves_nothing(bad):
    with pytest.raises(BadArgument, match="expected a"):
        mgd.SignDescent([torch.zeros(1)], **bad)
