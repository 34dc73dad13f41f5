"""What a setting of the attribution recipe is: a training of a classifier, and queries whose losses are explained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.errors import BadArgument
from mgd.function import TrainingFunction
from mgd.recipes.trainings import epochs
from mgd_kernels import AdamW

WARM_UP = 0.25  # of the steps


@dataclass(frozen=True)
class Training:
    """How a setting trains. rate: the highest learning rate; it rises over the first quarter and falls by a cosine."""

    examples: int
    batch: int
    epochs: int
    rate: float
    eps_root: float
    weight_decay: float = 0.01

    @property
    def steps(self) -> int:
        return self.epochs * self.examples // self.batch

    def schedule(self) -> Tensor:
        """float64 `[steps]`."""
        t = torch.arange(self.steps, dtype=torch.float64)
        up, down = (t + 1) / (WARM_UP * self.steps + 1), 0.5 * (1 + torch.cos(torch.pi * t / self.steps))
        return self.rate * torch.minimum(up, down)


def example_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`[B]`: the cross-entropy of each example, the mean over its positions where it is a text to be continued."""
    losses = F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="none")
    return losses.view(len(y), -1).mean(1)


@dataclass
class Task:
    """A training and its queries.

    name, data: for the reader. x, y: inputs and targets of the training examples `[n, ...]`; query_x, query_y: of the
    queries `[k, ...]`; test_x, test_y: more of the same, for the accuracy. pictures, texts: of the training examples,
    query_pictures, query_texts: of the queries, one of the two kinds. labels, query_labels: a word for each. device:
    where all of it is computed. dropout: the rate of the model's. options: further arguments of the training function.
    """

    name: str
    data: str
    model: nn.Module
    training: Training
    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor
    test_x: Tensor
    test_y: Tensor
    labels: list[str]
    query_labels: list[str]
    pictures: Tensor | None = None
    query_pictures: Tensor | None = None
    texts: list[str] | None = None
    query_texts: list[str] | None = None
    seed: int = 0
    device: str = "cpu"
    dropout: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    function: TrainingFunction = field(init=False)
    z: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        n, training = len(self.x), self.training
        if training.batch > n or n != training.examples:
            raise BadArgument(f"expected {training.examples} examples in batches of {training.batch}; got {n} examples")
        generator = torch.Generator().manual_seed(self.seed + 1)
        order = epochs(n, training.batch, training.steps, generator).to(self.device)
        if any(p.device != torch.device(self.device) for p in self.model.parameters()):
            self.model = copy.deepcopy(self.model).to(self.device)
        for name in ("x", "y", "query_x", "query_y", "test_x", "test_y"):
            setattr(self, name, getattr(self, name).to(self.device))
        batches = [(self.x[i], self.y[i], i) for i in order]

        def loss(model: nn.Module, batch: Any, z: Mapping[str, Tensor]) -> Tensor:
            x, y, _ = batch
            return (z["data_weights"] * example_losses(model, x, y)).mean()

        self.function = TrainingFunction(
            self.model,
            loss,
            batches,
            optimizer=AdamW(lr=training.rate, eps_root=training.eps_root, weight_decay=training.weight_decay),
            objective=lambda model: example_losses(model, self.query_x, self.query_y),
            per_example={"data_weights": lambda batch: batch[2]},
            seed=self.seed,
            **self.options,
        )
        self.z = {"lr": training.schedule(), "data_weights": torch.ones(n, device=self.device)}

    def __len__(self) -> int:
        return len(self.x)

    @property
    def queries(self) -> int:
        return len(self.query_x)

    @property
    def trained_names(self) -> list[str]:
        """Of the parameters that training changes."""
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    def facts(self) -> dict[str, Any]:
        """What was trained, as values of JSON."""
        return {
            "setting": self.name,
            "data": self.data,
            "training": asdict(self.training) | {"steps": self.training.steps},
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "queries": self.queries,
        }

    def objectives(self, model: nn.Module, index: Tensor) -> Tensor:
        """The losses of some of the queries."""
        index = index.to(self.device)
        return example_losses(model, self.query_x[index], self.query_y[index])

    def query_losses(self, state: Mapping[str, Tensor]) -> Tensor:
        """float64 `[k]`: the queries' losses of a trained model, computed in float64, since their changes are small."""
        return self._evaluate(state, self.query_x, self.query_y)[0]

    def test(self, state: Mapping[str, Tensor]) -> tuple[float, float]:
        """Mean loss and accuracy (of positions, in texts) on the test examples."""
        losses, right = self._evaluate(state, self.test_x, self.test_y)
        return float(losses.mean()), right

    def _evaluate(self, state: Mapping[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, float]:
        exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        x = x.double() if x.is_floating_point() else x
        with torch.no_grad():
            logits = torch.func.functional_call(copy.deepcopy(self.model).double().eval(), exact, (x,))
        losses = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(len(y), -1).mean(1)
        return losses.cpu(), float((logits.argmax(-1) == y).double().mean())

    def with_weights(self, weights: Tensor, seed: int | None = None) -> Tensor:
        """float64 `[k]`: the queries' losses after a training with these weights of the examples, `[n]`. seed: of its
        dropout's masks, in place of the task's."""
        f = self.function if seed is None else self.function.replaced(seed=seed)
        return self.query_losses(f.train({**self.z, "data_weights": weights}).model_state)

    def without(self, dropped: Tensor, seed: int | None = None) -> Tensor:
        """float64 `[k]`: the queries' losses after a training in which these examples have weight 0."""
        return self.with_weights(self.z["data_weights"].index_fill(0, dropped.to(self.device), 0.0), seed)
