"""DataRater: learn to rate training examples, by metagradients through short windows of training (arXiv 2505.17895).

A rater gives every example a score from its content. A softmax of the scores over each batch weights the losses in an
inner model's training steps, and the rater descends on the inner model's held-out loss after a window of such steps.
A rater trained on small models can rank any amount of data for larger ones.

The metaparameters of a window are its weights, of which there are few. The reverse sweep computes their cotangents, and
autograd propagates those into the rater, so the rater itself is never part of the sweep.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mgd.errors import BadArgument, NonFiniteState, ReplayDivergence
from mgd.ranks.directory import SharedDirectory
from mgd.rater.population import Loss, Population
from mgd.rater.population_adam import PopulationAdam
from mgd.rater.sampling import Sampler, lengths, sampler
from mgd.results import Metagradient
from mgd.step.rng import seed_of
from mgd.util.fingerprint import digest
from mgd.util.progress import tracked
from mgd.util.text import describe
from mgd_kernels import AdamW, Optimizer

CHUNK = 256  # examples rated at a time

# Kind of work in a report -> its name in `DataRater.seconds`.
KINDS = {
    "training": "training",
    "replay": "replay",
    "rebuild": "replay",
    "update": "optimizer",
    "optimizer vjp": "optimizer",
    "hvp": "hvp",
    "objective": "held-out loss",
}


@dataclass(frozen=True)
class RaterStep:
    """One meta-step. Lists have one entry per member of the population.

    values: the held-out loss after the member's window, None if the window diverged. ages: the member's windows before
    this one. effective: the number of examples that share the weight of a batch, as exp of the entropy of its weights,
    averaged over the window. renewed: the members that were replaced after the step. seconds: of the whole step.
    """

    step: int
    values: list[float | None]
    ages: list[int]
    effective: list[float]
    renewed: list[int]
    seconds: float


class DataRater:
    """Trains `rater` by metagradients through the trainings of a population of inner models.

    rater: a module, examples -> floating-point scores `[n]`. It is trained in place. Examples are what `pool` yields.
    model: makes a fresh inner model, `() -> nn.Module`, with other random numbers each time.
    loss: `loss(model, examples) -> [n]`, the inner model's loss on every example, including held-out ones.
    pool, held_out: pytrees of tensors `[N, ...]` from which batches are drawn, or functions `(n, generator) ->
        examples` that draw them and use no other random numbers. The rater learns to rate the pool, so that the loss on
        the held-out examples becomes low. Neither should contain the data by which the outcome is judged.
    optimizer: that of the inner models. batch, window: examples per step and steps per window (2 in the paper).
    held_out_batch: held-out examples per window, `2 * batch` by default.
    population, lifetime: the number of inner models, and the number of windows after which each is replaced by a new
        one. Their ages are spread evenly over the lifetime.
    lr, betas: of the Adam that normalises each member's meta-gradient (see `PopulationAdam`).
    seed: that of all random numbers. options: further arguments of `TrainingFunction`, such as `trace=False`.

    notes: the members that diverged and were replaced. history: one entry per meta-step. seconds: by kind of work; the
    first window, in which second derivatives are traced, is counted separately.

    Raises BadArgument for arguments that do not fit.
    """

    def __init__(
        self,
        rater: nn.Module,
        model: Callable[[], nn.Module],
        loss: Loss,
        pool: Any,
        held_out: Any,
        *,
        optimizer: Optimizer | None = None,
        batch: int = 16,
        held_out_batch: int | None = None,
        window: int = 2,
        population: int = 4,
        lifetime: int = 200,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ):
        if not isinstance(rater, nn.Module) or not any(p.requires_grad for p in rater.parameters()):
            raise BadArgument(
                f"expected the rater to be a module with trainable parameters; got {type(rater).__name__}"
            )
        if batch < 2:
            raise BadArgument(
                f"expected batch >= 2, because weights sum to 1 in a batch: that of one example is fixed; got {batch}"
            )
        for name, number in {"window": window, "population": population, "lifetime": lifetime}.items():
            if number < 1:
                raise BadArgument(f"expected {name} >= 1; got {number}")
        self.rater, self.batch, self.window, self.lifetime, self.seed = rater, batch, window, lifetime, seed
        self.held_out_batch = 2 * batch if held_out_batch is None else held_out_batch
        self.pool: Sampler = sampler(pool, "pool")
        self.held_out: Sampler = sampler(held_out, "held_out")
        optimizer = optimizer or AdamW(lr=1e-3, eps_root=1e-8)
        options = {"trace": True, **(options or {})}
        self.population = Population(model, loss, optimizer, population, window, batch, seed, options)
        self.parameters = [p for p in rater.parameters() if p.requires_grad]
        self.adam = PopulationAdam(self.parameters, population, lr, betas)
        self.history: list[RaterStep] = []
        self.notes: list[str] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self._start = {name: x.detach().clone() for name, x in rater.state_dict().items()}
        self._sources, self._lr = (pool, held_out), lr

    # --- learning ----------------------------------------------------------------------------------------------

    def step(self) -> RaterStep:
        """Train every inner model for a window, then take a step of the rater."""
        begin = time.perf_counter()
        k, size = len(self.history), len(self.population.members)
        ages = [member.age for member in self.population.members]
        gradients, values, effective = [], [], []
        renewed = []
        for i in range(size):
            gradient, value, examples = self._window(k, i)
            gradients.append(gradient)
            values.append(value)
            effective.append(examples)
            # The first lives end early, which spreads the ages.
            if value is None or (k + 1 + i * self.lifetime // size) % self.lifetime == 0:
                self.population.renew(i)
                renewed.append(i)
        self.adam.step(gradients)
        self.history.append(RaterStep(k, values, ages, effective, renewed, time.perf_counter() - begin))
        return self.history[-1]

    def fit(
        self,
        steps: int,
        *,
        directory: str | os.PathLike[str] | None = None,
        save_every: int = 10,
        progress: bool = False,
        observe: Callable[[RaterStep], None] | None = None,
    ) -> DataRater:
        """Continue until `steps` meta-steps have been taken. observe: called after each.

        directory: save the state there every `save_every` meta-steps, so that the same call continues an interrupted
            one, to the same bits. All that it depends on is compared with the saved run: the settings, the rater and
            its first ratings, the pool, the held-out examples, and the first window of the first inner model, as
            `TrainingFunction.identity` tells it. Of a pool that is a function, the first examples count.

        For a directory, raises StaleRun if it belongs to another run, UnknownFormat if it holds something else,
        StoreBusy if another process uses it, and CorruptState if it is damaged.
        """
        with contextlib.ExitStack() as stack:
            run = None
            if directory is not None:
                ranks = self.population.function.ranks
                run = stack.enter_context(SharedDirectory(ranks, directory, "rater", self.identity()))
                if (saved := run.read("state")) is not None:
                    self.load_state_dict(saved)
            tick = stack.enter_context(tracked("meta-steps", steps, len(self.history), progress))
            while len(self.history) < steps:
                step = self.step()
                if observe is not None:
                    observe(step)
                if run is not None and (len(self.history) % save_every == 0 or len(self.history) == steps):
                    self._save(run)
                finite = [value for value in step.values if value is not None]
                tick(f"held-out loss {sum(finite) / max(1, len(finite)):.3f}")
        return self

    # --- rating ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rate(self, examples: Any) -> Tensor:
        """Ratings `[n]` of any examples. Only their differences matter: adding a constant to all changes no weight.

        The rater is in evaluation mode during the call. Raises BadArgument unless the examples have one length >= 1.
        """
        sizes = lengths(examples)
        if len(sizes) != 1 or min(sizes) < 1:
            raise BadArgument(f"expected examples with one common first dimension of at least 1; got {sorted(sizes)}")
        (n,) = sizes
        training = self.rater.training
        self.rater.eval()
        try:
            parts = []
            for index in torch.arange(n).split(CHUNK):
                part = slice(int(index[0]), int(index[-1]) + 1)
                parts.append(self._scores(tree_map(lambda x, part=part: x[part], examples), len(index)))
        finally:
            self.rater.train(training)
        return torch.cat(parts)

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the next meta-step depends on, and the history."""
        return {
            "rater": {name: x.detach().clone() for name, x in self.rater.state_dict().items()},
            "adam": self.adam.state_dict(),
            "members": self.population.state(),
            "history": [asdict(step) for step in self.history],
            "notes": list(self.notes),
            "seconds": dict(self.seconds),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rater.load_state_dict(state["rater"])
        self.adam.load_state_dict(state["adam"])
        self.population.load(state["members"])
        self.history = [RaterStep(**step) for step in state["history"]]
        self.notes = list(state["notes"])
        self.seconds = defaultdict(float, state["seconds"])

    def identity(self) -> dict[str, str]:
        """Digests of what must be the same for a saved run to continue as this one, by name."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, 0, 0))
        examples = self.pool(self.window * self.batch, generator)
        held_out = self.held_out(self.held_out_batch, generator)
        with torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(seed_of(self.seed, 0, 0))
            ratings = torch.func.functional_call(
                self.rater, {k: x.clone() for k, x in self._start.items()}, (examples,)
            )
        adam = self.adam
        parts = {
            "batch": (self.batch, self.held_out_batch, self.window),
            "population": (len(self.population.members), self.lifetime),
            "the seed": self.seed,
            "the outer Adam": (self._lr, adam.betas, adam.eps),
            "the start of the rater": self._start,
            "the first ratings": ratings,
            "the pool": (examples, self._sources[0]),
            "the held-out examples": (held_out, self._sources[1]),
        }
        return self.population.identity(examples, held_out) | {name: digest(part) for name, part in parts.items()}

    def _save(self, run: SharedDirectory) -> None:
        run.write("state", self.state_dict())
        run.show("history.json", [asdict(step) for step in self.history])

    # --- private -----------------------------------------------------------------------------------------------

    def _window(self, k: int, i: int) -> tuple[list[Tensor] | None, float | None, float]:
        """Train member i for a window: its meta-gradient and held-out loss (None if it diverged), and the effective
        number of examples."""
        begin = time.perf_counter()
        generator = torch.Generator().manual_seed(seed_of(self.seed, k, i))
        examples = self.pool(self.window * self.batch, generator)
        held_out = self.held_out(self.held_out_batch, generator)
        draw_end = time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(self.seed, k, i))
            scores = self._scores(examples, self.window * self.batch)
        if not scores.requires_grad:
            raise BadArgument(
                "expected ratings that depend on the rater's parameters; they do not depend on the rater (detached?)"
            )
        weights = scores.view(self.window, self.batch).softmax(1)
        rating_end = time.perf_counter()
        first_step, age = self.population.steps(i), self.population.members[i].age
        gradient, value = None, None
        try:
            result = self.population.train(i, examples, weights, held_out)
        except NonFiniteState as error:
            if age == 0:
                raise  # a new member would diverge again
            self.notes.append(
                f"meta-step {k}: inner model {i}, {age} windows old, left the finite numbers ({error.where}); made anew"
            )
            return None, None, _effective(weights)
        except ReplayDivergence as error:
            cause = f"{error.cause} (inner model {i}, meta-step {k})"
            raise ReplayDivergence(first_step + error.step, cause) from error
        training_end = time.perf_counter()
        cotangent = result.grads["weights"].view_as(weights).to(weights)
        gradient = list(
            torch.autograd.grad(weights, self.parameters, cotangent, materialize_grads=True, allow_unused=True)
        )
        value = float(result.value)
        scoring = rating_end - draw_end + time.perf_counter() - training_end
        self._account(result, draw_end - begin, scoring, training_end - rating_end)
        return gradient, value, _effective(weights)

    def _scores(self, examples: Any, n: int) -> Tensor:
        scores = self.rater(examples)
        if not isinstance(scores, Tensor) or scores.shape != (n,) or not scores.is_floating_point():
            raise BadArgument(
                f"expected the rater to give a score to each of {n} examples, [{n}]; got {describe(scores)}"
            )
        if not bool(torch.isfinite(scores).all()):
            raise NonFiniteState(len(self.history), "a rating")
        return scores

    def _account(self, result: Metagradient, drawing: float, scoring: float, window: float) -> None:
        if not self.seconds:
            self.seconds["first window"] = drawing + scoring + window
            return
        self.seconds["drawing"] += drawing
        self.seconds["scoring"] += scoring
        for kind, seconds in result.report.seconds.items():
            self.seconds[KINDS.get(kind, "other")] += seconds
        self.seconds["other"] += window - sum(result.report.seconds.values())


def _effective(weights: Tensor) -> float:
    """exp of the entropy of weights `[window, batch]`, averaged over the window."""
    p = weights.detach()
    return float(torch.special.entr(p).sum(1).exp().mean())
