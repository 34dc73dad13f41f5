"""Find wrong labels: one metagradient with respect to the weight of every training example.

A tenth of the training digits carry a wrong label. The examples whose weight would raise the loss on held-out digits
are left out, and the training is repeated. Test digits, which nothing else sees, judge.

Run: python examples/noisy_labels.py (a few seconds)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mgd
from mgd_kernels import AdamW


def main(n: int = 600, epochs: int = 10) -> dict[str, float]:
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images))
    images, labels = images[order].float() / 16, labels[order]
    x, y, x_held, y_held = images[:n], labels[:n].clone(), images[n : n + 300], labels[n : n + 300]
    x_test, y_test = images[n + 300 :], labels[n + 300 :]
    wrong = torch.zeros(n, dtype=torch.bool).index_fill(0, torch.randperm(n)[: n // 10], True)
    y[wrong] = (y[wrong] + torch.randint(1, 10, (int(wrong.sum()),))) % 10

    def loss(model, batch, z):
        inputs, targets, index = batch
        return (z["weights"][index] * F.cross_entropy(model(inputs), targets, reduction="none")).mean()

    f = mgd.TrainingFunction(
        nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)),
        loss,
        [(x[i], y[i], i) for _ in range(epochs) for i in torch.randperm(n).split(50)],
        optimizer=AdamW(lr=3e-3, eps_root=1e-8),
        objective=lambda model: F.cross_entropy(model(x_held), y_held),
    )

    def accuracy(weights):
        trained = f.train({"weights": weights}).model_state
        return (torch.func.functional_call(f.model, trained, (x_test,)).argmax(1) == y_test).float().mean().item()

    harm = f.metagradient({"weights": torch.ones(n)}).grads["weights"]
    worst = harm.topk(int(wrong.sum())).indices
    found = wrong[worst].float().mean().item()
    before, after = accuracy(torch.ones(n)), accuracy(torch.ones(n).index_fill(0, worst, 0.0))
    print(f"{found:.0%} of the {len(worst)} most harmful examples have a wrong label (chance: 10%)")
    print(f"test accuracy {before:.3f} with all examples, {after:.3f} without these")
    return {"found": found, "before": before, "after": after}


if __name__ == "__main__":
    main()
