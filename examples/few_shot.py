"""Learn initial weights from which five steps fit a new task (MAML, arXiv 1703.03400, with exact gradients).

A task is a sine of some amplitude and phase, of which ten points are known. The metaparameters are all initial weights;
each meta-step averages the metagradients of a few tasks. New tasks judge.

Run: python examples/few_shot.py (a few seconds)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

import mgd
from mgd_kernels import SGD

STEPS = 5


def task(f: mgd.TrainingFunction, generator: torch.Generator) -> mgd.TrainingFunction:
    """Training on ten points of a sine, judged on others."""
    amplitude, phase = 0.1 + 4.9 * torch.rand((), generator=generator), math.pi * torch.rand((), generator=generator)
    x = 10 * torch.rand(60, 1, generator=generator) - 5
    y = amplitude * torch.sin(x + phase)
    return f.replaced(batches=[(x[:10], y[:10])] * STEPS, objective=lambda model: F.mse_loss(model(x[10:]), y[10:]))


def main(rounds: int = 30, tasks: int = 4) -> dict[str, float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    f = mgd.TrainingFunction(
        model,
        lambda model, batch, z: F.mse_loss(model(batch[0]), batch[1]),
        [(torch.zeros(1, 1), torch.zeros(1, 1))] * STEPS,
        optimizer=SGD(lr=0.02),
        objective=lambda model: model(torch.zeros(1, 1)).mean(),
    )

    def loss_on_new_tasks(init, count=20):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            return mgd.mean_over((task(f, generator) for _ in range(count)), {"init": init}).item()

    init = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    before = loss_on_new_tasks(init)
    outer, generator = torch.optim.Adam(init.values(), lr=0.03), torch.Generator().manual_seed(0)
    for _ in range(rounds):
        outer.zero_grad()
        mgd.mean_over((task(f, generator) for _ in range(tasks)), {"init": init}).backward()
        outer.step()
    after = loss_on_new_tasks(init)
    print(f"squared error on 20 new tasks, after {STEPS} steps each:")
    print(f"{before:.3f} from random initial weights, {after:.3f} from learned ones")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
