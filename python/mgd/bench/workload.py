"""What a workload of the benchmarks is: a training to differentiate, and how it is made of examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mgd import TrainingFunction
from mgd_kernels import Optimizer


@dataclass
class Workload:
    """A training to differentiate. examples: length n of the data weights, which `batch[2]` indexes. held_out: inputs
    and targets of the objective. note: what a reader of the results should know."""

    name: str
    model: nn.Module
    batches: list[Any]
    loss: Callable[..., Tensor]
    held_out: tuple[Tensor, Tensor]
    optimizer: Optimizer
    examples: int
    note: str = ""

    def objective(self, model: nn.Module) -> Tensor:
        """The loss on the held-out examples."""
        inputs, targets = self.held_out
        return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

    def objectives(self, k: int) -> Callable[[nn.Module], Tensor]:
        """The losses `[k]` on k equal parts of the held-out examples; their mean is `objective`."""
        inputs, targets = self.held_out

        def losses(model: nn.Module) -> Tensor:
            each = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), reduction="none")
            return each.view(k, -1).mean(1)

        return losses

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
            per_example={"data_weights": lambda batch: batch[2]},
            **options,
        )

    def z(self) -> dict[str, Tensor]:
        device = self.held_out[0].device
        return {
            "lr": torch.full((len(self.batches),), self.optimizer.defaults["lr"], device=device),
            "weight_decay": torch.tensor(self.optimizer.defaults["weight_decay"], device=device),
            "data_weights": torch.ones(self.examples, device=device),
        }


def _weighted(model: nn.Module, batch: Any, z: Any) -> Tensor:
    """The mean of the weighted per-example losses; tokens of one example are averaged."""
    x, y, _ = batch
    losses = F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="none")
    return (z["data_weights"] * losses.view(len(x), -1).mean(1)).mean()


def _batches(inputs: Tensor, targets: Tensor, size: int, steps: int, generator: torch.Generator) -> list[Any]:
    index = [torch.randint(len(inputs), (size,), generator=generator) for _ in range(steps)]
    return [(inputs[i], targets[i], i) for i in index]


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
    batches = _batches(inputs, targets, size, steps, generator)
    return Workload(name, model, batches, _weighted, (inputs[:size], targets[:size]), optimizer, len(inputs))
