"""An optimizer of your own: written as a torch function, it has metagradients at once.

The rule is Lion (arXiv 2302.06675) with a smooth sign. Its learning rate, both betas and the width of the sign are
metaparameters. Their metagradient is checked against finite differences, then a descent tunes all four.

Run: python examples/own_optimizer.py (a few seconds)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mgd
from mgd_kernels import UpdateRule


def smooth_lion(param, slots, grad, hyper, step):
    blend = hyper["beta1"] * slots["average"] + (1 - hyper["beta1"]) * grad
    average = hyper["beta2"] * slots["average"] + (1 - hyper["beta2"]) * grad
    return param - hyper["lr"] * torch.tanh(blend / hyper["width"]), {"average": average}


def main(steps: int = 40, rounds: int = 8) -> dict[str, float]:
    torch.manual_seed(0)
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    order = torch.randperm(1000)
    f = mgd.TrainingFunction(
        nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10)),
        loss=lambda model, batch, z: F.cross_entropy(model(batch[0]), batch[1]),
        batches=[(x[i], y[i]) for i in order.repeat(steps // 10 + 1)[: steps * 100].split(100)],
        optimizer=UpdateRule(
            smooth_lion,
            slots=("average",),
            defaults={"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "width": 1e-3},
            elementwise=True,
        ),
        objective=lambda model: F.cross_entropy(model(x[1000:1400]), y[1000:1400]),
    )
    judge = f.replaced(objective=lambda model: F.cross_entropy(model(x[1400:]), y[1400:]))

    def decoded(v):  # every variable is free, and of the same scale
        return {
            "lr": v["log_lr"].exp(),
            "width": v["log_width"].exp(),
            "beta1": torch.sigmoid(v["logit_beta1"]),
            "beta2": torch.sigmoid(v["logit_beta2"]),
        }

    start = {
        "log_lr": torch.tensor(1e-3).log(),
        "log_width": torch.tensor(1e-3).log(),
        "logit_beta1": torch.tensor(0.9).logit(),
        "logit_beta2": torch.tensor(0.99).logit(),
    }
    checked = mgd.check(f, decoded(start), steps=(1e-3, 1e-5))
    print(checked)
    descent = mgd.MetaDescent(lambda v, _: (f, decoded(v)), lambda variables: torch.optim.Adam(variables, lr=0.3))
    found = descent.run(start, steps=rounds)
    learned = ", ".join(f"{name} {value.item():.3g}" for name, value in decoded(found.best).items())
    before, after = judge.value(decoded(start)).item(), judge.value(decoded(found.best)).item()
    print(f"held-out loss {found.values[0]:.4f} to {min(found.values):.4f}, with {learned}")
    print(f"test loss {before:.4f} before, {after:.4f} after")
    return {"passed": checked.passed, "before": before, "after": after}


if __name__ == "__main__":
    main()
