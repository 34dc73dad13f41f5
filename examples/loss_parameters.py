"""Learn parameters of the loss: an offset for each class, and the exponent of the focal loss (arXiv 1708.02002).

The digits 5 to 9 are ten times rarer in training than in use. With so many parameters a grid is out of reach. The known
remedy, offsets proportional to the logarithm of a class's frequency (arXiv 2007.07314), says what should come out; the
first metagradient is checked against finite differences of the whole training.

Run: python examples/loss_parameters.py (a few seconds)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mgd
from mgd_kernels import AdamW


def loss(model, batch, z):
    inputs, labels = batch
    log_p = F.log_softmax(model(inputs) + z["offsets"], 1).gather(1, labels[:, None])
    return -((1 - log_p.exp()) ** z["gamma"] * log_p).mean()


def main(epochs: int = 6, rounds: int = 8) -> dict[str, float]:
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images))
    images, labels = images[order].float() / 16, labels[order]
    rare = labels[:1000] >= 5
    used = torch.cat([torch.where(~rare)[0], torch.where(rare)[0][::10]])
    x, y, held, test = images[used], labels[used], slice(1000, 1300), slice(1300, None)

    f = mgd.TrainingFunction(
        nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)),
        loss,
        [(x[i], y[i]) for _ in range(epochs) for i in torch.randperm(len(x)).split(50)],
        optimizer=AdamW(lr=3e-3, eps_root=1e-8),
        objective=lambda model: F.cross_entropy(model(images[held]), labels[held]),
    )
    judge = f.replaced(objective=lambda model: F.cross_entropy(model(images[test]), labels[test]))
    z = {"offsets": torch.zeros(10), "gamma": torch.tensor(1.0)}
    checked = mgd.check(f, z, steps=(1e-3, 1e-5))
    print(checked)

    descent = mgd.MetaDescent(
        f, lambda variables: torch.optim.Adam(variables, lr=0.2), constraints={"gamma": mgd.Box(0.0, 5.0)}
    )
    found = descent.run(z, steps=rounds)
    before, after = judge.value(z).item(), judge.value(found.best).item()
    frequencies = torch.bincount(y).float().log()
    alike = torch.corrcoef(torch.stack([found.best["offsets"], frequencies]))[0, 1].item()
    print(f"learned: gamma {found.best['gamma'].item():.2f}, offsets that correlate {alike:.2f} with log frequencies")
    print(f"test loss {before:.4f} before, {after:.4f} after")
    return {"passed": checked.passed, "alike": alike, "before": before, "after": after}


if __name__ == "__main__":
    main()
