"""Inner models of different ages. Each is trained one window of steps at a time, with the window's metagradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mgd.errors import BadArgument, BadLoss
from mgd.function import TrainingFunction
from mgd.results import Metagradient
from mgd.step.rng import seed_of
from mgd.util.text import describe
from mgd_kernels import Optimizer

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Member:
    """An inner model between two windows.

    tensors: its parameters and buffers by name. optimizer_state: as in `Trained`. age: windows since it was made.
    births: how many models have had this place in the population.
    """

    tensors: dict[str, Tensor]
    optimizer_state: dict[str, Any]
    age: int
    births: int


class Population:
    """`size` inner models. They share one module and one training function, so one trace serves them all.

    model: makes a fresh inner model. loss: `loss(model, examples) -> [n]`, one loss per example. window: the number of
    steps in a window. Each step trains on the weighted sum of the losses of `batch` examples. options: further
    arguments of `TrainingFunction`.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        loss: Loss,
        optimizer: Optimizer,
        size: int,
        window: int,
        batch: int,
        seed: int,
        options: Mapping[str, Any],
    ):
        self.factory, self.loss, self.seed = model, loss, seed
        self.members = [Member({}, {}, 0, 0) for _ in range(size)]
        self.held_out: Any = None
        shell = self._fresh(0, 0)
        if not isinstance(shell, nn.Module):
            raise BadArgument(f"expected model() to make a torch.nn.Module; got {type(shell).__name__}")
        self.batches = _Window(window, batch, next(iter(_tensors(shell).values())).device)
        self.function = TrainingFunction(
            shell,
            self._weighted,
            self.batches,
            optimizer=optimizer,
            objective=self._objective,
            seed=seed,
            per_example={"weights": lambda batch: batch[1]},
            optimizer_state={},
            **options,
        )
        for i in range(size):
            self.renew(i)

    def renew(self, i: int) -> None:
        """Replace a member by a new one."""
        births = self.members[i].births
        tensors = {name: x.detach().clone() for name, x in _tensors(self._fresh(i, births)).items()}
        self.members[i] = Member(tensors, {}, 0, births + 1)

    def train(self, i: int, examples: Any, weights: Tensor, held_out: Any) -> Metagradient:
        """Train a member for a window and return the metagradient of its held-out loss.

        examples: a pytree of tensors `[window * batch, ...]`. weights: `[window, batch]`. held_out: a pytree of
        examples. If the call raises, the member is unchanged.
        """
        member = self.members[i]
        self.batches.examples, self.held_out = examples, held_out
        self._load(member)
        self.function.optimizer_state = member.optimizer_state
        result = self.function.metagradient({"weights": weights.detach().reshape(-1)})
        member.tensors |= result.model_state
        assert result.optimizer_state is not None
        member.optimizer_state = result.optimizer_state
        member.age += 1
        return result

    def identity(self, examples: Any, held_out: Any) -> dict[str, str]:
        """Digests of what the first member's first window on these examples depends on."""
        self.batches.examples, self.held_out = examples, held_out
        self._load(Member(_tensors(self._fresh(0, 0)), {}, 0, 1))
        self.function.optimizer_state, size = {}, self.batches.size
        return self.function.identity({"weights": torch.full((size,), 1 / size, device=self.batches.indices[0].device)})

    def steps(self, i: int) -> int:
        """The number of steps for which a member has been trained."""
        return self.members[i].age * len(self.batches)

    def module(self, i: int) -> nn.Module:
        """A member as a module. All members share this module, so its contents change with the next call."""
        self._load(self.members[i])
        return self.function.model

    def state(self) -> list[dict[str, Any]]:
        return [asdict(member) for member in self.members]

    def load(self, state: Sequence[Mapping[str, Any]]) -> None:
        self.members = [Member(**member) for member in state]

    def _fresh(self, i: int, births: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(self.seed, births, i))
            return self.factory()

    @torch.no_grad()
    def _load(self, member: Member) -> None:
        for name, place in _tensors(self.function.model).items():
            place.copy_(member.tensors[name])

    def _weighted(self, model: nn.Module, batch: Any, z: Mapping[str, Tensor]) -> Tensor:
        examples, index = batch
        return (z["weights"] * checked_losses(self.loss(model, examples), len(index))).sum()

    def _objective(self, model: nn.Module) -> Tensor:
        return checked_losses(self.loss(model.eval(), self.held_out)).mean()


class _Window(Sequence):
    """The batches of a window: slices of `examples`, each with the indices of its examples on the models' device."""

    def __init__(self, window: int, batch: int, device: torch.device):
        self.examples: Any = None
        self.size, self.batch = window * batch, batch
        self.indices = list(torch.arange(self.size, device=device).split(batch))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, t: Any) -> Any:
        index, start = self.indices[t], range(len(self.indices))[t] * self.batch
        return tree_map(lambda x: x[start : start + self.batch], self.examples), index


def checked_losses(losses: Any, n: int | None = None) -> Tensor:
    """`losses`, if it is a vector with one entry per example. Raises BadLoss if it is not."""
    if not isinstance(losses, Tensor) or losses.ndim != 1 or (n is not None and len(losses) != n):
        raise BadLoss(
            f"expected loss(model, examples) to return the loss of every example, [{n or 'n'}]; got {describe(losses)}"
        )
    return losses


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
