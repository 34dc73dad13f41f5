"""Can a defender see the poison? How far the pixels moved, and checks that rank the training images by suspicion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd.recipes.poison.training import Training
from mgd.recipes.ranking import auc


def psnr(changed: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image `[n, ...]` in decibels, for pixels in [0, 1]; infinite where equal."""
    return -10 * (changed - original).double().square().flatten(1).mean(1).log10()


def harm(training: Training, images: Tensor, seeds: Sequence[int]) -> Tensor:
    """`[n]`: how the objective (a loss on clean images) of a training on `images` rises with the weight of each, the
    mean over seeds. One metagradient per seed."""
    total = torch.zeros(len(images), device=images.device)
    for seed in seeds:
        total += training.at(seed).metagradient(training.z(images)).grads["data_weights"]
    return total / len(seeds)


def final_loss(training: Training, images: Tensor, seeds: Sequence[int]) -> Tensor:
    """`[n]`: the loss of each training image under the model trained on all of them, the mean over seeds."""
    total = torch.zeros(len(images), device=images.device)
    for seed in seeds:
        logits = training.logits(training.train(seed, images), images)
        total += F.cross_entropy(logits, training.labels, reduction="none")
    return total / len(seeds)


def nearest_distance(images: Tensor, labels: Tensor) -> Tensor:
    """`[n]`: Euclidean distance, in pixels' units, to the nearest other training image of the same label."""
    flat = images.flatten(1)
    found = torch.full((len(flat),), torch.inf, device=flat.device)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        distances = torch.cdist(flat[members], flat[members])
        found[members] = distances.fill_diagonal_(torch.inf).amin(1)
    return found


CHECKS = ("metagradient", "training loss", "distance")


@dataclass(frozen=True)
class Detection:
    """One check of one training set. suspicion: `[n]`, the larger the more suspicious. found: the share of the poisoned
    images among as many of the most suspicious. repaired: test accuracies, one a seed, of models trained without the
    most suspicious `dropped` images."""

    check: str
    suspicion: Tensor
    auc: float
    found: float
    dropped: int
    repaired: list[float]

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "suspicion"}


def examine(
    training: Training,
    images: Tensor,
    poisoned: Tensor,
    judge: Callable[[Tensor], list[float]],
    *,
    seeds: Sequence[int],
    dropped: int,
) -> list[Detection]:
    """Every check of CHECKS on a training set whose images `poisoned` are poisoned.

    training: its objective is a loss on clean images of the defender's own. judge: from weights `[n]` of the training
    images to the test accuracies of models trained so.
    """
    scores = {
        "metagradient": harm(training, images, seeds),
        "training loss": final_loss(training, images, seeds),
        "distance": nearest_distance(images, training.labels),
    }
    mask = torch.zeros(len(images), dtype=torch.bool).index_fill(0, poisoned.cpu(), True)
    found = []
    for check in CHECKS:
        suspicion = scores[check].cpu()
        order = suspicion.argsort(descending=True)
        first = float(mask[order[: len(poisoned)]].double().mean())
        repaired = judge(torch.ones(len(images)).index_fill(0, order[:dropped], 0.0).to(images.device))
        found.append(Detection(check, suspicion, auc(suspicion, mask), first, dropped, repaired))
    return found
