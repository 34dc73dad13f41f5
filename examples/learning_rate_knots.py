"""Descend on a learning-rate schedule: a training is one differentiable operation, its learning rates come from knots.

The descent sees held-out digits; test digits judge the first schedule and the best.

Run: python examples/learning_rate_knots.py (a few seconds)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mgd
from mgd_kernels import AdamW


def main(steps: int = 60, rounds: int = 10) -> dict[str, float]:
    torch.manual_seed(0)
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    order = torch.randperm(1000)
    batches = [(x[i], y[i]) for i in order.repeat(steps // 10 + 1)[: steps * 100].split(100)]

    f = mgd.TrainingFunction(
        nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)),
        loss=lambda model, batch, z: F.cross_entropy(model(batch[0]), batch[1]),
        batches=batches,
        optimizer=AdamW(eps_root=1e-8),
        objective=lambda model: F.cross_entropy(model(x[1000:1400]), y[1000:1400]),
    )
    test = f.replaced(objective=lambda model: F.cross_entropy(model(x[1400:]), y[1400:]))
    # Logarithms of the learning rate, evenly spaced over the training.
    knots = torch.full((5,), -7.0, requires_grad=True)
    outer = torch.optim.Adam([knots], lr=0.3)
    history = []
    for _ in range(rounds):
        rates = mgd.schedules.from_knots(knots, steps)
        value = f({"lr": rates})
        history.append((value.item(), rates.detach()))
        print(f"held-out loss {value.item():.4f}   knots {[f'{r:.4f}' for r in knots.detach().exp().tolist()]}")
        outer.zero_grad()
        value.backward()
        outer.step()
    best = min(history, key=lambda entry: entry[0])
    before, after = (test.value({"lr": rates}).item() for rates in (history[0][1], best[1]))
    print(f"test loss {before:.4f} with the first schedule, {after:.4f} with the best")
    return {"first": history[0][0], "best": best[0], "before": before, "after": after}


if __name__ == "__main__":
    main()
