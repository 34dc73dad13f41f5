"""Settings `images` and `mlp`: a ResNet-9-style network, or one of two hidden layers, on small images (Fashion-MNIST at
14×14, or digits at 8×8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.errors import BadArgument
from mgd.recipes.attribute.task import Task, Training
from mgd.recipes.data import Images
from mgd.recipes.models.residual import dropouts
from mgd.recipes.models.resnet import resnet9
from mgd.recipes.trainings import seeded

TEST = 2000
HIDDEN = 48
SMOOTH = {"norm": "group", "pool": "average", "activation": nn.SiLU, "scale": 0.5}
ROUGH = {"norm": "none", "pool": "max", "activation": nn.ReLU}


def images_task(
    train: Images,
    test: Images,
    training: Training,
    queries: int,
    seed: int,
    *,
    rough: bool = False,
    dense: bool = False,
    dropout: float = 0.0,
) -> Task:
    """rough: the choices that make a training hard to differentiate: ReLU, max pooling, no norm. dense: two hidden
    layers in place of convolutions. dropout: its rate."""
    if len(train) < training.examples or len(test) < queries:
        raise BadArgument(
            f"expected at least {training.examples} training and {queries} test images; {train.name} has {len(train)} "
            f"and {len(test)}"
        )
    generator = torch.Generator().manual_seed(seed)
    train = train[torch.randperm(len(train), generator=generator)[: training.examples]]
    order = torch.randperm(len(test), generator=generator)
    query, rest = test[order[:queries]], test[order[queries : queries + TEST]]
    with seeded(seed):
        options = ROUGH if rough else SMOOTH
        channels = train.images.shape[1]
        if dense:
            model: nn.Module = _dense(_pixels(train[torch.tensor([0])]).numel(), len(train.classes), dropout)
        else:
            model = resnet9(width=8, classes=len(train.classes), channels=channels, dropout=dropout, **options)  # type: ignore[arg-type]
    words, name = train.classes, "images, dense" if dense else "images, trained roughly" if rough else "images"
    return Task(
        name=f"{name}, dropout {dropout:g}" if dropout else name,
        data=train.name,
        model=model,
        training=training,
        x=_pixels(train),
        y=train.labels,
        query_x=_pixels(query),
        query_y=query.labels,
        test_x=_pixels(rest),
        test_y=rest.labels,
        labels=[words[i] for i in train.labels.tolist()],
        query_labels=[words[i] for i in query.labels.tolist()],
        pictures=train.images,
        query_pictures=query.images,
        seed=seed,
        dropout=dropout,
    )


def _dense(pixels: int, classes: int, dropout: float) -> nn.Module:
    """dropout: behind both hidden layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (pixels, HIDDEN):
        layers += [nn.Linear(inputs, HIDDEN), nn.SiLU(), *dropouts(dropout)]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, classes))


def _pixels(images: Images) -> Tensor:
    """Float images of at most 16×16 pixels. Every set is scaled by constants, so that no image depends on another."""
    x = (images.images.float() / 255 - 0.3) / 0.35
    return F.avg_pool2d(x, 2) if x.shape[-1] > 16 else x
