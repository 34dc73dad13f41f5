"""The trainings that a schedule is sought for: alike but for chance, and any number of them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.function import TrainingFunction
from mgd.recipes.small_images import Task
from mgd.recipes.trainings import seeded
from mgd_kernels import SGD

#: From a number to a training, and what its z holds beside the learning rates.
Numbered = Callable[[int], tuple[TrainingFunction, dict[str, Any]]]


class Trainings:
    """A perceptron with two hidden layers, trained by SGD on the images of a task; a `Numbered`.

    Trainings of other numbers have other initial weights, see the images in another order, and have other wrong labels.
    Which steps have wrong labels is the same in all: `noisy`, bool `[steps]`, half of them. All share one captured
    graph.

    wrong: the share of the labels of those steps that are drawn at random. start: the rate where z names none.
    """

    def __init__(self, task: Task, steps: int, batch: int, width: int, wrong: float, start: float, seed: int):
        self.task, self.steps, self.batch, self.width, self.wrong, self.seed = task, steps, batch, width, wrong, seed
        order = torch.randperm(steps, generator=torch.Generator().manual_seed(seed))
        self.noisy = torch.zeros(steps, dtype=torch.bool).index_fill(0, order[: steps // 2], wrong > 0)
        self._first = TrainingFunction(
            self._network(seed),
            lambda model, batch, z: F.cross_entropy(model(batch[0]), batch[1]),
            self._batches(seed),
            optimizer=SGD(lr=start),
            objective=task.held_out.loss,
        )

    def __call__(self, number: int) -> tuple[TrainingFunction, dict[str, Any]]:
        seed = self.seed + 100_003 * number
        initial = {name: p.detach() for name, p in self._network(seed).named_parameters()}
        return self._first.replaced(batches=self._batches(seed)), {"init": initial}

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self._first.model.parameters())

    def _network(self, seed: int) -> nn.Module:
        inputs = prod(self.task.train.images.shape[1:])
        with seeded(seed):
            layers = [nn.Linear(inputs, self.width), nn.GELU(), nn.Linear(self.width, self.width), nn.GELU()]
            return nn.Sequential(nn.Flatten(), *layers, nn.Linear(self.width, self.task.classes)).to(self.task.device)

    def _batches(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for t, (images, labels, _) in enumerate(self.task.batches(self.batch, self.steps, seed)):
            if self.noisy[t]:
                drawn = torch.randint(self.task.classes, labels.shape, generator=generator).to(labels.device)
                replaced = torch.rand(labels.shape, generator=generator) < self.wrong
                labels = torch.where(replaced.to(labels.device), drawn, labels)
            batches.append((images, labels))
        return batches
