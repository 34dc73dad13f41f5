"""Metaparameters that pass through a frozen part of a model, whose formulas are written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mgd
from mgd_kernels import SGD


class Norm(nn.Module):
    """RMSNorm as Llama has it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize("trace", [False, None, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_through_a_frozen_norm(trace, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), Norm(16), nn.GELU("tanh"), nn.Linear(16, 3)).to(dtype)
    model[:3].requires_grad_(False)
    x, y = torch.randn(12, 8, dtype=dtype), torch.randint(3, (12,))
    f = mgd.TrainingFunction(
        model,
        lambda model, batch, z: F.cross_entropy(model(z["pixels"]), batch[0]),
        [(y,)] * 5,
        optimizer=SGD(lr=0.3),
        objective=lambda model: F.cross_entropy(model(x), y),
        trace=trace,
    )
    gradient = f.metagradient({"pixels": x}).grads["pixels"]
    direction, h = torch.randn(x.shape, dtype=dtype), 1e-5
    if dtype is torch.float64:
        ahead, behind = (f.value({"pixels": x + s * h * direction}) for s in (1, -1))
        torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-10)


def test_a_loss_of_metaparameters_alone_is_refused():
    model = nn.Linear(2, 1)
    f = mgd.TrainingFunction(
        model, lambda m, b, z: z["x"].sum(), [(0,)], optimizer=SGD(lr=0.1), objective=lambda m: m.weight.sum()
    )
    with pytest.raises(mgd.errors.BadLoss, match="does not depend on the parameters"):
        f.metagradient({"x": torch.ones(2)})
