"""A gradient penalty inside the loss, through norms: its metagradient has third derivatives, of which torch's are wrong
for LayerNorm, BatchNorm and InstanceNorm. Beside finite differences of whole trainings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mgd
from mgd_kernels import SGD

NORMS = {
    "layer": lambda: nn.LayerNorm([6, 5], elementwise_affine=False),
    "layer with weights": lambda: nn.LayerNorm([6, 5]),
    "batch": lambda: nn.BatchNorm1d(6),
    "batch without weights": lambda: nn.BatchNorm1d(6, affine=False),
    "instance": lambda: nn.InstanceNorm1d(6, affine=True),
    "group": lambda: nn.GroupNorm(2, 6),
    "group without weights": lambda: nn.GroupNorm(2, 6, affine=False),
}


def penalised(model, batch, z):
    x = batch[0].clone().requires_grad_()
    out = model(x)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return (out - batch[1]).square().mean() + z["penalty"] * g.square().sum()


@pytest.mark.parametrize("name", NORMS)
def test_beside_finite_differences(name):
    torch.manual_seed(0)
    x, y = torch.randn(3, 4, 2, 5, dtype=torch.float64), torch.randn(3, 4, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Conv1d(2, 6, 1), NORMS[name](), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)).double()
    f = mgd.TrainingFunction(
        model, penalised, list(zip(x, y, strict=True)), optimizer=SGD(lr=0.05),
        objective=lambda m: (m(x[0]) - y[0]).square().mean(),
    )  # fmt: skip
    at, h = torch.tensor(0.1, dtype=torch.float64), 1e-5
    value = lambda penalty: f.value({"penalty": penalty})
    difference = (value(at + h) - value(at - h)) / (2 * h)
    gradient = f.metagradient({"penalty": at}).grads["penalty"]
    assert abs(float(gradient)) > 1e-3
    torch.testing.assert_close(gradient, torch.as_tensor(difference, dtype=torch.float64), rtol=1e-6, atol=1e-8)
