"""A training whose images are metaparameters: what poisoning perturbs, and what a check for poison trains again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.errors import BadArgument, BadData
from mgd.function import TrainingFunction
from mgd.recipes.models.resnet import resnet9
from mgd.recipes.trainings import epochs, seeded
from mgd_kernels import AdamW

LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05
EPS_ROOT = 1e-6  # smooths AdamW where gradients vanish


class Standardised(nn.Module):
    """Pixels shifted and scaled by two constants, which belong to the model: poison does not move them."""

    def __init__(self, mean: float, deviation: float):
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


def mlp(channels: int, side: int, classes: int, width: int = 128) -> nn.Sequential:
    """Two hidden layers with GELU."""
    first, second = nn.Linear(channels * side * side, width), nn.Linear(width, width)
    return nn.Sequential(nn.Flatten(), first, nn.GELU(), second, nn.GELU(), nn.Linear(width, classes))


def cnn(channels: int, side: int, classes: int, width: int = 16) -> nn.Sequential:
    """Three convolutions with GroupNorm and GELU, of stride 2 down to some 4 pixels a side, and a linear layer: all
    smooth."""
    layers: list[nn.Module] = []
    for i, o in ((channels, width), (width, 2 * width), (2 * width, 2 * width)):
        stride = 2 if side > 4 else 1
        layers += [nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(o // 8, o), nn.GELU()]
        side = -(-side // stride)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * width * side * side, classes))


NETWORKS: dict[str, Callable[[int, int, int], nn.Sequential]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet9": lambda channels, side, classes: resnet9("group", 8, classes, channels),
}


def schedule(steps: int, peak: float = LEARNING_RATE) -> Tensor:
    """Up over the first tenth, then linearly down to nearly 0. float32 `[steps]`."""
    t = torch.arange(steps, dtype=torch.float64)
    return (peak * torch.minimum((t + 1) / max(1.0, 0.1 * steps), (steps - t) / (0.9 * steps))).float()


class Visits(Sequence[tuple[Tensor, Tensor]]):
    """The batches of a training, labels and indices: epochs in an order that a seed gives, and that can be changed."""

    def __init__(self, labels: Tensor, batch: int, steps: int):
        self.labels, self.batch, self.steps = labels, batch, steps
        self.shuffle(0)

    def shuffle(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.order = epochs(len(self.labels), self.batch, self.steps, generator).to(self.labels.device)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: Any) -> Any:
        return self.labels[self.order[step]], self.order[step]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[step] for step in range(self.steps))


def wrong_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean probability that is not the label's: a loss between 0 and 1, a smooth form of the error rate."""
    return 1 - logits.softmax(1).gather(1, labels[:, None]).mean()


class Training:
    """Training a network on images `[n, channels, height, width]` in [0, 1] with labels int64 `[n]`, as a function of
    the images and of a weight for each.

    objective: of the trained model. network: a key of NETWORKS. constants: mean and deviation of the pixels, by default
    those of `images`. The network's start and the order of the data are functions of a seed, which `at` sets; one
    TrainingFunction serves all seeds, so that it is traced once.

    Raises BadData for data on which nothing can be learned, BadArgument for an unknown network.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: int,
        objective: Callable[[nn.Module], Tensor],
        *,
        network: str = "mlp",
        steps: int = 200,
        batch: int = 50,
        constants: tuple[float, float] | None = None,
    ):
        check_data(images, labels, classes)
        if network not in NETWORKS:
            raise BadArgument(f"expected a network of {list(NETWORKS)}; got {network!r}")
        if not (steps >= 1 and 1 <= batch <= len(images)):
            raise BadArgument(f"expected steps >= 1 and a batch of 1 to {len(images)} images; got {steps} and {batch}")
        self.images, self.labels, self.classes, self.network = images, labels, classes, network
        self.constants = constants or (float(images.mean()), float(images.std()))
        self.visits = Visits(labels, batch, steps)
        self.rate = schedule(steps)
        self.function = TrainingFunction(
            self.initial(0),
            _loss,
            self.visits,
            optimizer=AdamW(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, eps_root=EPS_ROOT),
            objective=objective,
            per_example={"images": lambda batch: batch[1], "data_weights": lambda batch: batch[1]},
        )

    def initial(self, seed: int) -> nn.Module:
        """The network as a seed starts it."""
        with seeded(seed):
            channels, side = self.images.shape[1:3]
            network = NETWORKS[self.network](channels, side, self.classes)
        return nn.Sequential(Standardised(*self.constants), network).to(self.images.device)

    def at(self, seed: int) -> TrainingFunction:
        """The training with the start and the order of a seed."""
        self.visits.shuffle(seed)
        self.function.model.load_state_dict(self.initial(seed).state_dict())
        return self.function

    def z(self, images: Tensor | None = None, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Metaparameters: these images, or the training's own; these weights, or ones."""
        return {
            "images": self.images if images is None else images,
            "data_weights": torch.ones(len(self.images), device=self.images.device) if weights is None else weights,
            "lr": self.rate,
        }

    def train(self, seed: int, images: Tensor | None = None, weights: Tensor | None = None) -> dict[str, Tensor]:
        """The trained model's state."""
        return self.at(seed).train(self.z(images, weights)).model_state

    @torch.no_grad()
    def logits(self, state: Mapping[str, Tensor], images: Tensor) -> Tensor:
        parts = [torch.func.functional_call(self.function.model, dict(state), (x,)) for x in images.split(500)]
        return torch.cat(parts)

    def accuracy(self, state: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> float:
        return float((self.logits(state, images).argmax(1) == labels).double().mean())


def _loss(model: nn.Module, batch: Any, z: Any) -> Tensor:
    labels, _ = batch
    return (z["data_weights"] * F.cross_entropy(model(z["images"]), labels, reduction="none")).mean()


def check_data(images: Tensor, labels: Tensor, classes: int, name: str = "training") -> None:
    """Raise BadData unless these are images in [0, 1] with labels of at least two of the classes."""
    if images.ndim != 4 or labels.shape != images.shape[:1] or len(images) == 0:
        raise BadData(
            f"expected {name} images [n, channels, height, width] and labels [n], n >= 1; got {list(images.shape)} and "
            f"{list(labels.shape)}"
        )
    if not bool(torch.isfinite(images).all()) or float(images.min()) < 0 or float(images.max()) > 1:
        raise BadData(f"expected the pixels of the {name} images in [0, 1]; got some outside")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise BadData(f"expected {name} labels in 0..{classes - 1}; got {low}..{high}")
    if low == high:
        raise BadData(f"expected {name} images of at least two classes; all {len(labels)} are of class {low}")
