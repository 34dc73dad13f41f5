"""Descent on the pixels of a few training images, and the controls it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mgd.descent.constraints import Box
from mgd.descent.descent import Descent, MetaDescent
from mgd.descent.sign_descent import SignDescent
from mgd.errors import BadArgument
from mgd.recipes.poison.training import Training


def chosen(n: int, share: float, seed: int) -> Tensor:
    """Indices of round(share · n) of n images, at random. Raises BadArgument where that is none, or more than there
    are."""
    count = round(share * n)
    if not 1 <= count <= n:
        raise BadArgument(f"expected a share of the {n} images that is 1 to {n} of them; {share:g} is {count}")
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def with_pixels(images: Tensor, poisoned: Tensor, pixels: Tensor) -> Tensor:
    """The training images with those of the indices `poisoned` replaced; differentiable."""
    return images.index_put((poisoned,), pixels)


def descend(
    training: Training,
    poisoned: Tensor,
    *,
    steps: int,
    step_size: float,
    seeds: int,
    low: float = 0.0,
    high: float = 1.0,
    observe: Callable[..., None] | None = None,
    progress: bool = False,
) -> Descent:
    """Metagradient descent on the pixels of the images `poisoned`, which goes down the objective of `training`.

    Signed steps in the box [low, high]. Each meta-step trains from the start and in the order of the next of `seeds`
    seeds, so that the pixels do not fit one training alone. The variables are {"pixels": [k, channels, height, width]}.

    Raises BadArgument for an empty range; NonFiniteState where the training on the images as they are diverges. A
    training that diverges later is in the `notes` of the result, and the descent continues with smaller steps.
    """
    if not low <= high:
        raise BadArgument(f"expected a range of pixels with low <= high; got {low} and {high}")
    if seeds < 1 or steps < 1:
        raise BadArgument(f"expected at least one seed and one meta-step; got {seeds} and {steps}")

    def problem(variables: Mapping[str, Tensor], meta_step: int) -> Any:
        images = with_pixels(training.images, poisoned, variables["pixels"])
        return training.at(meta_step % seeds), training.z(images)

    descent = MetaDescent(
        problem,
        lambda variables: SignDescent(variables, lr=step_size),
        constraints={"pixels": Box(low, high)},
    )
    return descent.run({"pixels": training.images[poisoned]}, steps, observe=observe, progress=progress)


def controls(images: Tensor, labels: Tensor, poisoned: Tensor, pixels: Tensor, seed: int) -> dict[str, Tensor]:
    """Training sets whose poisoned images are uniform noise, images of other classes, or `pixels` in an order that does
    not know the labels."""
    generator = torch.Generator().manual_seed(seed)
    strangers = []
    for label in labels[poisoned].tolist():
        others = (labels != label).nonzero()[:, 0]
        strangers.append(int(others[torch.randint(len(others), (1,), generator=generator)]))
    shuffled = pixels[torch.randperm(len(poisoned), generator=generator)]
    return {
        "noise": with_pixels(images, poisoned, torch.rand(pixels.shape, generator=generator).to(pixels)),
        "other classes' images": with_pixels(images, poisoned, images[strangers]),
        "the poison, labels shuffled": with_pixels(images, poisoned, shuffled),
    }
