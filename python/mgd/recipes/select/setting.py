"""What a setting of the recipe is: a pool whose good examples are known, a training, and who judges it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mgd.recipes.select.problem import SelectionProblem
from mgd.recipes.trainings import seeded, warm_up_cosine
from mgd_kernels import AdamW

if TYPE_CHECKING:
    from matplotlib.figure import Figure

State = dict[str, Tensor]  # a trained model's parameters and buffers


@dataclass(frozen=True)
class Settings:
    """Of every setting. at: share of the steps after which candidates enter. budget, memory, shard, share, highest: of
    `select`. repeats: trainings per figure."""

    steps: int = 400
    batch_size: int = 100
    at: float = 0.8
    learning_rate: float = 1e-3
    meta_steps: int = 60
    share: float = 0.05
    highest: int = 2
    budget: int | None = None
    memory: float = 0.0
    shard: int | None = None
    repeats: int = 5
    seed: int = 0

    def schedule(self) -> Tensor:
        """The learning rate of every step, float64 `[steps]`."""
        return warm_up_cosine(self.steps, self.learning_rate)


class Setting(ABC):
    """Once made, it holds `settings`, and of the n examples of the pool `kind`, int64 `[n]`, an index into `kinds`, and
    `good`, bool `[n]`: which of them are as they should be. No method but `test` looks at test data. device: where
    models are trained; what says something of the examples stays on the CPU."""

    name: ClassVar[str]
    title: ClassVar[str]
    examples: ClassVar[str]  # what the pool holds: "images"
    kinds: ClassVar[tuple[str, ...]]
    measures: ClassVar[tuple[str, ...]] = ("test accuracy",)  # the first judges; each in 0..1
    #: Shares of the pool that a filter may keep, beside what the selection keeps.
    sizes: ClassVar[tuple[float, ...]] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    filtered: ClassVar[str] = "lowest loss"  # by what a filter keeps
    truths: ClassVar[str] = "true labels"  # what the good examples have

    settings: Settings
    kind: Tensor
    good: Tensor
    device: str = "cpu"

    @abstractmethod
    def over(self, pool: Any) -> SelectionProblem:
        """The training of this setting on a pool of examples (a pytree), with the held-out loss as objective."""

    @property
    @abstractmethod
    def pool(self) -> Any:
        """The pool, as a pytree of tensors `[n, ...]`."""

    @property
    @abstractmethod
    def held(self) -> Any:
        """The held-out examples, in the form of the pool."""

    @abstractmethod
    def test(self, state: State) -> tuple[float, ...]:
        """The measures on test data of a trained model."""

    @abstractmethod
    def scores(self, state: State) -> Tensor:
        """`[n]`, on the CPU: of the pool's examples under a trained model, low where a filter should keep them."""

    @abstractmethod
    def lead(self) -> str:
        """What the pool, the training and the held-out data are, in a sentence or two."""

    @abstractmethod
    def data(self) -> dict[str, Any]:
        """What the data are, as JSON."""

    @abstractmethod
    def show(self, some: Tensor, title: str) -> tuple[Figure | None, list[list[str]]]:
        """Some examples (indices) as a picture, or as a table."""

    @cached_property
    def problem(self) -> SelectionProblem:
        return self.over(self.pool)

    def training(
        self,
        model: nn.Module,
        pool: Any,
        losses: Callable[[nn.Module, Any], Tensor],
        objective: Callable[[nn.Module], Tensor],
        weight_decay: float,
        reset: Callable[[nn.Module], None] | None = None,
    ) -> SelectionProblem:
        """A training as the settings say, for `over`. reset: draws the initial parameters anew (`reset_layers`)."""
        s = self.settings
        return SelectionProblem(
            model.to(self.device),
            pool,
            losses,
            objective,
            AdamW(lr=s.learning_rate, weight_decay=weight_decay, eps_root=1e-6),
            s.steps,
            s.batch_size,
            at=int(s.at * s.steps),
            initialise=initialiser(reset or reset_layers),
            fixed={"lr": s.schedule()},
        )

    def numbers(self) -> dict[str, int]:
        """kind -> how many of the pool's examples are of it."""
        return {name: int((self.kind == i).sum()) for i, name in enumerate(self.kinds)}

    def by_kind(self, counts: Tensor) -> dict[str, list[int]]:
        """kind -> how many of its examples have which count, up to the highest: `{"clean": [dropped, once, twice]}`."""
        top = int(counts.max()) + 1
        return {
            name: torch.bincount(counts[self.kind == i].long(), minlength=top).tolist()
            for i, name in enumerate(self.kinds)
        }

    def call(self, state: State, *args: Any) -> Any:
        """The model with other parameters, without a gradient."""
        with torch.no_grad():
            return torch.func.functional_call(self.problem.model, state, args)


def initialiser(reset: Callable[[nn.Module], None]) -> Callable[[nn.Module, int], None]:
    """`initialise` of a `SelectionProblem`: `reset` with the CPU's random numbers of a seed, wherever the model is."""

    def initialise(model: nn.Module, seed: int) -> None:
        here = next(model.parameters()).device.type == "cpu"
        drawn = model if here else copy.deepcopy(model).cpu()
        with seeded(seed):
            reset(drawn)
        if not here:
            model.load_state_dict(drawn.state_dict())

    return initialise


def reset_layers(model: nn.Module) -> None:
    """New parameters for its linear and convolutional layers."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.reset_parameters()
