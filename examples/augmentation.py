"""Learn how far to turn training images.

The training digits are upright; held-out and test digits are turned by up to 30 degrees either way. The strength of the
augmentation is one number, the largest angle, and the metagradient goes through the turned pixels.

Run: python examples/augmentation.py (a few seconds)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mgd
from mgd_kernels import AdamW


def turned(images: Tensor, angles: Tensor) -> Tensor:
    """Images `[n, 64]`, each turned by its angle in radians."""
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    maps = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    images = images.view(-1, 1, 8, 8)
    grid = F.affine_grid(maps, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).flatten(1)


def main(n: int = 600, epochs: int = 6, rounds: int = 8) -> dict[str, float]:
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images))
    images, labels = images[order].float() / 16, labels[order]
    tilted = turned(images, math.radians(30) * (2 * torch.rand(len(images)) - 1))
    held, test = slice(n, n + 400), slice(n + 400, None)

    def loss(model, batch, z):
        inputs, targets, draws = batch  # draws: uniform in [-1, 1], the same whenever the batch is read
        return F.cross_entropy(model(turned(inputs, z["angle"] * draws)), targets)

    f = mgd.TrainingFunction(
        nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)),
        loss,
        [
            (images[i], labels[i], 2 * torch.rand(len(i)) - 1)
            for _ in range(epochs)
            for i in torch.randperm(n).split(50)
        ],
        optimizer=AdamW(lr=3e-3, eps_root=1e-8),
        objective=lambda model: F.cross_entropy(model(tilted[held]), labels[held]),
    )
    judge = f.replaced(objective=lambda model: F.cross_entropy(model(tilted[test]), labels[test]))
    start = {"angle": torch.tensor(math.radians(5))}
    descent = mgd.MetaDescent(
        f, lambda variables: torch.optim.Adam(variables, lr=0.15), constraints={"angle": mgd.Box(0.0, math.pi)}
    )
    found = descent.run(start, steps=rounds)
    degrees = math.degrees(found.best["angle"].item())
    before, after = judge.value(start).item(), judge.value(found.best).item()
    print(f"held-out loss {found.values[0]:.4f} at 5 degrees, {min(found.values):.4f} at {degrees:.0f} degrees")
    print(f"test loss {before:.4f} before, {after:.4f} after")
    return {"degrees": degrees, "before": before, "after": after}


if __name__ == "__main__":
    main()
