"""The task of the recipes on schedules and smoothness: small real images, a ResNet-9-style network, AdamW."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.errors import BadData
from mgd.function import TrainingFunction
from mgd.recipes.data import Images
from mgd.recipes.models.resnet import resnet9
from mgd.recipes.trainings import epochs, seeded

SIDE = 8  # the smallest side that resnet9 takes; larger images are averaged over 2×2 pixels down to it


@dataclass(frozen=True)
class Part:
    """Images float32 `[n, channels, height, width]` and labels `[n]`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def loss(self, model: nn.Module) -> Tensor:
        """Mean cross-entropy of the model as it is evaluated."""
        model.eval()
        return F.cross_entropy(model(self.images), self.labels)


@dataclass(frozen=True)
class Task:
    """Training images, held-out images for the objective, and test images that only judge."""

    name: str
    classes: int
    train: Part
    held_out: Part
    test: Part

    @classmethod
    def make(
        cls, train: Images, test: Images, images: int, held_out: int, tested: int, seed: int, device: str = "cpu"
    ) -> Task:
        """Random parts of these sizes, on a device; of a smaller set, a quarter of the training images is held out."""
        if len(train) < 400 or len(test) < 100:
            raise BadData(
                f"expected at least 400 training and 100 test images; {train.name} has {len(train)} and {len(test)}"
            )
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(train), generator=generator)
        held_out = min(held_out, len(train) // 4)
        own = train[order[held_out : held_out + images]], train[order[:held_out]]
        parts = [*own, test[torch.randperm(len(test), generator=generator)[:tested]]]
        pixels = [_shrunk(part.images.float()) for part in parts]
        mean, std = pixels[0].mean(), pixels[0].std()
        made = [
            Part(((x - mean) / std).to(device), part.labels.to(device)) for x, part in zip(pixels, parts, strict=True)
        ]
        return cls(train.name, len(train.classes), *made)

    @property
    def device(self) -> torch.device:
        return self.train.images.device

    def batches(self, size: int, steps: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`steps` batches (images, labels, indices) in a random order, epoch after epoch."""
        generator = torch.Generator().manual_seed(seed)
        order = epochs(len(self.train), size, steps, generator).to(self.device)
        return [(self.train.images[i], self.train.labels[i], i) for i in order]

    def network(self, seed: int, **options: Any) -> nn.Module:
        """A `resnet9` of these options, its initial weights drawn by the seed."""
        with seeded(seed):
            return resnet9(classes=self.classes, channels=self.train.images.shape[1], **options).to(self.device)

    def judge(self, function: TrainingFunction, z: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Train, and give the loss of every test image `[n]` and whether it was classified correctly, bool `[n]`."""
        state = function.train(z).model_state
        model = copy.deepcopy(function.model).eval()
        with torch.no_grad():  # by parts, for memory
            parts = self.test.images.split(1000)
            logits = torch.cat([torch.func.functional_call(model, state, (x,)) for x in parts]).cpu()
        labels = self.test.labels.cpu()
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels


def _shrunk(images: Tensor) -> Tensor:
    while min(images.shape[2:]) >= 2 * SIDE - 2 and min(images.shape[2:]) // 2 >= SIDE:
        images = F.avg_pool2d(images, 2)
    return images
