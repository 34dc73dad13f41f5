"""The workloads of every benchmark: float32, metaparameters lr [T], weight decay, data weights [n].

Data is random: the time of dense training does not depend on it, and a benchmark must run anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mgd import TrainingFunction
from mgd.recipes.models.gpt import GPT
from mgd.recipes.models.resnet import resnet9
from mgd_kernels import SGD, AdamW, Optimizer


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


def adamw() -> AdamW:
    return AdamW(lr=1e-3, eps_root=1e-8, weight_decay=0.01)


def mlp(steps: int = 64, seed: int = 0) -> Workload:
    """(a) 784-512-512-10 with GELU, batch 128, AdamW."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10))
    x, y = torch.randn(2048, 784, generator=g), torch.randint(10, (2048,), generator=g)
    return build("mlp", model, x, y, 128, steps, adamw(), g)


def convnet(norm: str = "group", steps: int = 32, width: int = 16, seed: int = 0) -> Workload:
    """(b) ResNet-9-style network for 32x32x3 images, batch 64, SGD with momentum."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(1024, 3, 32, 32, generator=g), torch.randint(10, (1024,), generator=g)
    optimizer = SGD(lr=0.05, momentum=0.9, weight_decay=5e-4)
    return build(f"convnet-{norm}", resnet9(norm, width), x, y, 64, steps, optimizer, g)


def gpt(steps: int = 32, seed: int = 0) -> Workload:
    """(c) GPT, 4 layers, width 128, 4 heads, sequence 64, batch 16, vocabulary 256, AdamW."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, (512, 65), generator=g)
    return build("gpt", GPT(), tokens[:, :-1], tokens[:, 1:].contiguous(), 16, steps, adamw(), g)


def lora(steps: int = 24, seed: int = 0) -> Workload:
    """(d) LoRA of a sentence encoder: see `mgd.bench.workloads_lora`."""
    from mgd.bench.workloads_lora import lora

    return lora(steps, seed)


def small(steps: int = 64, seed: int = 0) -> Workload:
    """64-128-128-10 with GELU, batch 32, AdamW: steps of a millisecond, for long trainings."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    x, y = torch.randn(1024, 64, generator=g), torch.randint(10, (1024,), generator=g)
    return build("small", model, x, y, 32, steps, adamw(), g)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "mlp": mlp,
    "convnet-group": partial(convnet, "group"),
    "convnet-batch": partial(convnet, "batch"),
    "gpt": gpt,
    "lora": lora,
    "small": small,
}
