"""Data selection as a problem of metagradient descent (arXiv 2503.13751, section 4.1).

How often each training example is used is a vector of whole numbers c, which has no derivative. Its surrogate: train
with the batches that c gives, and let the loss of ONE step k be `mean loss of its batch + Σ_i z_i · loss_i / B` over
candidates i, at z = 0. The training is the same, and the metagradient with respect to z_i says what more of example i
at step k would do to the objective: whether its count should rise or fall.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from mgd.errors import BadArgument, BadData, BadLoss
from mgd.function import TrainingFunction
from mgd.recipes.select.draws import Draws
from mgd.results import Metagradient, Trained
from mgd_kernels import Optimizer

WEIGHTS = "candidate_weights"  # the key of z


@dataclass
class SelectionProblem:
    """A training whose examples are to be selected.

    pool: a pytree of tensors (a tensor, a tuple, a dict) with a common first dimension, the n examples.
    losses: `losses(model, examples) -> [b]`, the loss of each of b examples of a slice of the pool; one example's loss
        may depend on the others of its batch, as contrastive losses do.
    objective: `objective(model) -> scalar`, on held-out data that the pool does not hold.
    optimizer: of `mgd_kernels`; Adam and AdamW with an eps_root of 1e-8 or more.
    steps, batch_size: of every training, whatever the counts are.
    at: the step k at which the candidates enter. An early step sees an untrained model, a late one has little left to
        act on; the reverse sweep costs `steps - at` steps. By default at two thirds.
    initialise: `initialise(model, seed)` puts other initial parameters into the model; called before every training, so
        that a selection does not suit one initialisation only. Without it all trainings begin with those of `model`.
    fixed: hyperparameters with a schedule, as in `TrainingFunction`: `{"lr": a tensor [steps]}`.
    options: further arguments of `TrainingFunction`, such as budget, trace, autocast, max_grad_norm.
    """

    model: nn.Module
    pool: Any
    losses: Callable[[nn.Module, Any], Tensor]
    objective: Callable[[nn.Module], Tensor]
    optimizer: Optimizer
    steps: int
    batch_size: int
    at: int | None = None
    initialise: Callable[[nn.Module, int], None] | None = None
    fixed: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        leaves = tree_flatten(self.pool)[0]
        if not leaves or not all(isinstance(x, Tensor) and x.ndim for x in leaves):
            raise BadData("expected the pool to hold tensors whose first dimension is the number of examples")
        if len({len(x) for x in leaves}) > 1:
            raise BadData(f"expected tensors of one length in the pool; got {[len(x) for x in leaves]}")
        if len(self) == 0:
            raise BadData("the pool is empty: expected at least one example")
        if any(x.is_floating_point() and not bool(torch.isfinite(x).all()) for x in leaves):
            raise BadData("the pool holds NaN or infinity")
        if self.steps < 1 or self.batch_size < 1:
            raise BadArgument(f"expected steps and batch_size >= 1; got {self.steps} and {self.batch_size}")
        self.at = self.steps * 2 // 3 if self.at is None else self.at
        if not 0 <= self.at < self.steps:
            raise BadArgument(f"expected the step at which candidates enter in 0..{self.steps - 1}; got {self.at}")
        if int(self.options.get("microbatches", 1)) > 1:
            raise BadArgument("microbatches do not go with candidates; expected batches that fit in memory whole")

    def __len__(self) -> int:
        return len(tree_flatten(self.pool)[0][0])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def draws(self) -> Draws:
        assert self.at is not None
        return Draws(self.pool, self.steps, self.batch_size, self.at)

    @cached_property
    def function(self) -> TrainingFunction:
        """The training by `draws`; one object, so that its graphs are traced once."""
        return TrainingFunction(
            self.model,
            self._loss,
            self.draws,
            optimizer=self.optimizer,
            objective=self.objective,
            fixed=self.fixed,
            **self.options,
        )

    def train(self, counts: Tensor, seed: int = 0) -> Trained:
        """Train with the batches that `counts` `[n]` and `seed` give, without a gradient."""
        self.prepare(counts, seed)
        return self.function.train()

    def metagradient(self, counts: Tensor, candidates: Tensor, seed: int = 0) -> Metagradient:
        """The same training, with the metagradient of the candidates (indices `[m]`) under the key
        `candidate_weights`, `[m]`: positive where more of the example would raise the objective."""
        self.prepare(counts, seed, candidates)
        return self.function.metagradient({WEIGHTS: torch.zeros(len(candidates), device=self.device)})

    def prepare(self, counts: Tensor, seed: int, candidates: Tensor | None = None) -> None:
        """Make `function` the training that these three say."""
        self.draws.set(counts, seed, candidates)
        if self.initialise is not None:
            with torch.no_grad():
                self.initialise(self.function.model, seed)

    def _loss(self, model: nn.Module, batch: Mapping[str, Any], z: Mapping[str, Tensor]) -> Tensor:
        losses = self._checked(model, batch["examples"], self.batch_size)
        total = losses.mean()
        if "candidates" in batch:
            # In slices of a batch's size, so that losses that look at their neighbours see as many as in training.
            weights = z[WEIGHTS].to(losses)
            for start in range(0, len(weights), self.batch_size):
                stop = min(start + self.batch_size, len(weights))
                part = tree_map(lambda x, start=start, stop=stop: x[start:stop], batch["candidates"])
                total = total + (weights[start:stop] * self._checked(model, part, stop - start)).sum() / self.batch_size
        return total

    def _checked(self, model: nn.Module, examples: Any, count: int) -> Tensor:
        losses = self.losses(model, examples)
        if not isinstance(losses, Tensor) or losses.shape != (count,):
            got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise BadLoss(f"expected losses(model, examples) to give a loss for each of {count} examples; got {got}")
        return losses
