"""Descend on a learning-rate schedule: a training is one differentiable operation, its learning rates come from knots.

Run: python examples/learning_rate_knots.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mgd
from mgd_kernels import AdamW


def main(steps: int = 60, rounds: int = 10) -> list[float]:
    torch.manual_seed(0)
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    order = torch.randperm(1000)
    batches = [(x[i], y[i]) for i in order.repeat(steps // 10 + 1)[: steps * 100].split(100)]

    f = mgd.TrainingFunction(
        model,
        loss=lambda model, batch, z: F.cross_entropy(model(batch[0]), batch[1]),
        batches=batches,
        optimizer=AdamW(eps_root=1e-8),
        objective=lambda model: F.cross_entropy(model(x[1000:]), y[1000:]),
    )
    # Logarithms of the learning rate, evenly spaced over the training.
    knots = torch.full((5,), -7.0, requires_grad=True)
    outer = torch.optim.Adam([knots], lr=0.3)
    history = []
    for _ in range(rounds):
        rates = F.interpolate(knots[None, None], size=steps, mode="linear", align_corners=True)[0, 0].exp()
        value = f({"lr": rates})
        outer.zero_grad()
        value.backward()
        outer.step()
        history.append(value.item())
        print(
            f"held-out loss {value.item():.4f}   learning rates {[f'{r:.4f}' for r in knots.detach().exp().tolist()]}"
        )
    return history


if __name__ == "__main__":
    main()
