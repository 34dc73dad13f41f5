"""Hyperparameters out of their range are refused where they are given."""

from __future__ import annotations

import math

import pytest
import torch

from mgd_kernels import SGD, Adam, AdamW, RMSprop
from mgd_kernels.errors import BadArgument


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: AdamW(betas=(1.5, 0.9)), "beta1"),
        (lambda: Adam(betas=(0.9, 1.0)), "beta2"),
        (lambda: Adam(betas=(0.9, -0.1)), "beta2"),
        (lambda: Adam(betas=(math.nan, 0.9)), "beta1"),
        (lambda: AdamW(eps=-1.0), "eps"),
        (lambda: AdamW(eps_root=-1e-9), "eps_root"),
        (lambda: AdamW(lr=math.nan), "lr"),
        (lambda: AdamW(lr=-1), "lr"),
        (lambda: SGD(lr=torch.tensor([0.1, -0.1])), "lr"),
        (lambda: SGD(lr=math.inf), "lr"),
        (lambda: SGD(lr=0.1, weight_decay=math.nan), "weight_decay"),
        (lambda: SGD(lr=0.1, momentum=-math.inf), "momentum"),
        (lambda: SGD(lr=0.1, momentum=0.9, dampening=math.nan), "dampening"),
        (lambda: AdamW(param_groups=[{"params": "*", "beta2": 2.0}]), "beta2 of parameter group 1"),
        (lambda: RMSprop(lr=math.nan), "lr"),
        (lambda: RMSprop(lr=math.inf), "lr"),
        (lambda: RMSprop(alpha=1.5), "alpha"),
        (lambda: RMSprop(eps=-1.0), "eps"),
        (lambda: RMSprop(eps_root=-1.0), "eps_root"),
        (lambda: RMSprop(param_groups=[{"params": "*", "alpha": 2.0}]), "alpha of parameter group 1"),
    ],
)
def test_nonsense_is_refused_at_construction(make, name):
    with pytest.raises(BadArgument, match=rf"expected .* for {name}; got "):
        make()


def test_what_has_a_meaning_is_taken():
    for lr in (0.0, 1e30):
        SGD(lr=lr, momentum=-2.0, dampening=3.0, weight_decay=-1.0)
    AdamW(betas=(0.0, 0.0), eps=0.0, weight_decay=-0.1)


def test_every_value_of_a_schedule_counts():
    with pytest.raises(BadArgument, match="nan"):
        AdamW().check_range("lr", torch.tensor([[0.1, 0.2], [0.1, math.nan]]))
    with pytest.raises(BadArgument, match=r"\[0, 1\) for the betas; got 1\.0"):
        AdamW().check_range("beta1", torch.tensor([0.9, 1.0]), "the betas")
