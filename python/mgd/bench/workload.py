"""What a workload of the benchmarks is: a training to differentiate, and how it is made of examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mgd import TrainingFunction
from mgd_kernels import Optimizer


@dataclass
class Workload:
    """A training to differentiate.

    losses: of a model and a batch, the loss of each example, `[B]`. indices: of a batch, its examples' places in the
    data weights, `[B]`. examples: length n of the data weights. held_out: the batch of the objective. note: what a
    reader of the results should know. options: further arguments of the training function.
    """

    name: str
    model: nn.Module
    batches: list[Any]
    losses: Callable[[nn.Module, Any], Tensor]
    indices: Callable[[Any], Tensor]
    held_out: Any
    optimizer: Optimizer
    examples: int
    note: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def loss(self, model: nn.Module, batch: Any, z: Any) -> Tensor:
        """The mean of the weighted losses of a batch."""
        return (z["data_weights"] * self.losses(model, batch)).mean()

    def objective(self, model: nn.Module) -> Tensor:
        """The loss on the held-out examples, of a model that is in training mode as before."""
        return self.losses(model, self.held_out).mean()

    def objectives(self, k: int) -> Callable[[nn.Module], Tensor]:
        """The losses `[k]` on k equal parts of the held-out examples; their mean is `objective`."""
        return lambda model: self.losses(model, self.held_out).view(k, -1).mean(1)

    def to(self, device: str | torch.device) -> Workload:
        """The workload with its model (moved in place) and its data on a device."""
        batches, held_out = tree_map(lambda tensor: tensor.to(device), (self.batches, self.held_out))
        return replace(self, model=self.model.to(device), batches=batches, held_out=held_out)

    def function(self, **options: Any) -> TrainingFunction:
        return TrainingFunction(
            self.model,
            self.loss,
            self.batches,
            optimizer=self.optimizer,
            objective=self.objective,
            per_example={"data_weights": self.indices},
            # In eval mode plain torch has no derivative through the running statistics of a batch norm.
            **{"objective_mode": "train"} | self.options | options,
        )

    def z(self) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        return {
            "lr": torch.full((len(self.batches),), self.optimizer.defaults["lr"], device=device),
            "weight_decay": torch.tensor(self.optimizer.defaults["weight_decay"], device=device),
            "data_weights": torch.ones(self.examples, device=device),
        }


def _losses(model: nn.Module, batch: Any) -> Tensor:
    """The losses `[B]`; tokens of one example are averaged."""
    x, y, _ = batch
    losses = F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="none")
    return losses.view(len(x), -1).mean(1)


def choices(examples: int, size: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """For every step, `size` random examples."""
    return [torch.randint(examples, (size,), generator=generator) for _ in range(steps)]


def build(
    name: str,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    size: int,
    steps: int,
    optimizer: Optimizer,
    generator: torch.Generator,
) -> Workload:
    """A workload of random batches of `size` examples; the first `size` examples stand for the held-out ones."""
    chosen = [torch.arange(size), *choices(len(inputs), size, steps, generator)]
    held_out, *batches = [(inputs[i], targets[i], i) for i in chosen]
    return Workload(name, model, batches, _losses, lambda batch: batch[2], held_out, optimizer, len(inputs))
