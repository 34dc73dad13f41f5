"""Metagradient descent: train, differentiate the training, update the metaparameters, repeat (arXiv 2503.13751)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from mgd.descent.checkpoint import DescentCheckpoint
from mgd.descent.constraints import Constraint
from mgd.descent.state import DescentState, MetaStep, Variables
from mgd.errors import BadArgument, NonFiniteState
from mgd.function import TrainingFunction
from mgd.ranks.directory import SharedDirectory
from mgd.ranks.ranks import Ranks
from mgd.results import Metagradient
from mgd.util.fingerprint import digest
from mgd.util.progress import tracked

Problem = Callable[[Variables, int], tuple[TrainingFunction, Mapping[str, Any]]]

ATTEMPTS = 8  # ever smaller steps from one point before the descent gives up


@dataclass
class Descent:
    """The result of `MetaDescent.run`.

    variables: after the last step. best: those with the lowest score, with which meta-step `best_step` trained.
    history: one entry per training. stopped: why the descent ended, "steps" or "patience". notes: trainings that
    diverged, and with what step they were repeated.
    """

    variables: Variables
    best: Variables
    best_step: int
    history: list[MetaStep]
    stopped: str
    notes: list[str] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        """The objective of every training."""
        return [step.value for step in self.history]

    def to_dict(self) -> dict[str, Any]:
        return {
            "best_step": self.best_step,
            "stopped": self.stopped,
            "notes": self.notes,
            "history": [asdict(step) for step in self.history],
        }


class MetaDescent:
    """Descend on the metaparameters of a training by metagradients. Every meta-step trains anew.

    problem: a `TrainingFunction`; the variables are then its `z`. Or a function `(variables, meta-step) -> (f, z)`. It
        may compute `z` from other variables (knots of a schedule, logarithms) by differentiable torch operations, and
        the training itself may depend on the variables and the meta-step (batches drawn by counts, another seed).
    optimizer: makes the outer optimizer from the list of variables: `lambda x: torch.optim.Adam(x, lr=0.1)`, any other
        optimizer of torch, or `mgd.SignDescent`.
    constraints: variable -> `Box` or `Simplex`. The variable is projected to it at the start and after each step.
    validate: `validate(result: Metagradient) -> float`, the score of a training; the best variables are those with the
        lowest. By default the score is the objective.

    A training that diverges (`NonFiniteState`) does not end the descent. The variables go back, the outer learning rate
    (or what the optimizer's groups name under "shrinks") is halved from then on, and the step is repeated. `notes` and
    the history record it.
    """

    def __init__(
        self,
        problem: TrainingFunction | Problem,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        *,
        constraints: Mapping[str, Constraint] | None = None,
        validate: Callable[[Metagradient], float] | None = None,
    ):
        if not callable(problem):
            raise BadArgument(
                f"expected problem to be a TrainingFunction or a function (variables, meta-step) -> (f, z); got "
                f"{type(problem).__name__}"
            )
        self.problem, self.optimizer = problem, optimizer
        self.constraints, self.validate = dict(constraints or {}), validate

    def run(
        self,
        variables: Mapping[str, Tensor],
        steps: int,
        *,
        patience: int | None = None,
        directory: str | os.PathLike[str] | None = None,
        progress: bool = False,
        observe: Callable[[MetaStep, Metagradient, Variables], None] | None = None,
    ) -> Descent:
        """Train `steps` times, each time with a metagradient and a step of the outer optimizer.

        variables: floating-point tensors, by name, at which the descent starts. They are not changed.
        patience: end after this many meta-steps without a lower score.
        directory: save history and state there after every meta-step. The same call then continues an interrupted
            descent, to the same bits; a call with more steps continues a finished one. All that it depends on is
            compared with the saved descent: the start, the constraints, the optimizer, `validate`, and the training of
            every meta-step that is done, as `TrainingFunction.identity` tells it. For that a `problem` is called once
            more for each of them, with the variables of the start.
        observe: called after every training, with the variables that were used for it.

        Raises BadArgument for variables that do not fit, and NonFiniteState if the start itself, or every smaller step,
        diverges. For a directory: StaleRun if it belongs to another run, UnknownFormat if it holds something else,
        StoreBusy if another process uses it, CorruptState if it is damaged.
        """
        if steps < 1 or (patience is not None and patience < 1):
            raise BadArgument(f"expected steps and patience of at least 1; got {steps} and {patience}")
        state = DescentState(variables, self.constraints, self.optimizer)
        with contextlib.ExitStack() as stack:
            checkpoint = None
            if directory is not None:
                start = {name: x.requires_grad_() for name, x in state.copy().items()}
                ranks, first = self._training_at(start, 0)
                identity = state.identity() | first | {"the score": digest(self.validate is None)}
                run = stack.enter_context(SharedDirectory(ranks, directory, "descent", identity))
                training_at = lambda number: self._training_at(start, number)[1]
                one = isinstance(self.problem, TrainingFunction)
                checkpoint = DescentCheckpoint(run, state, self.validate, None if one else training_at)
            tick = stack.enter_context(tracked("meta-steps", steps, len(state.history), progress))
            while len(state.history) < steps and not state.stalled(patience):
                step, result = self._train(state)
                if observe is not None:
                    observe(step, result, state.copy())
                state.record(step)
                state.descend()
                if checkpoint is not None:
                    checkpoint.save(result)
                tick(f"objective {step.value:.4f}")
        stopped = "steps" if len(state.history) >= steps else "patience"
        return Descent(state.copy(), state.best, state.best_step, state.history, stopped, state.notes)

    def _training_at(self, variables: Variables, index: int) -> tuple[Ranks, dict[str, str]]:
        """Whose the training of a meta-step is, and what it depends on."""
        with torch.random.fork_rng([]):
            f, z = self._training(variables, index)
        return f.ranks, f.identity(_detached(z))

    def _train(self, state: DescentState) -> tuple[MetaStep, Metagradient]:
        """A training with its metagradient, at the variables of `state`, or closer to the last ones if it diverges."""
        for attempt in range(ATTEMPTS + 1):
            start = time.perf_counter()
            try:
                result = self._differentiate(state.leaves, len(state.history))
                break
            except NonFiniteState as error:
                if attempt == ATTEMPTS or not state.history:
                    raise
                state.retreat(error)
        value = float(result.value)
        score = value if self.validate is None else float(self.validate(result))
        norms = {name: float(x.grad.norm()) for name, x in state.leaves.items() if x.grad is not None}
        return MetaStep(len(state.history), value, score, norms, time.perf_counter() - start, attempt), result

    def _differentiate(self, leaves: Variables, index: int) -> Metagradient:
        """The metagradient, propagated from `z` to the variables: into the `grad` of each of them."""
        f, z = self._training(leaves, index)
        if not f.gather and "init" in z:
            raise BadArgument("expected gather=True: a descent on initial parameters needs their whole gradient")
        result = f.metagradient(_detached(z))
        if result.value.ndim:
            raise BadArgument(f"expected one objective to descend on; got {result.value.numel()}")
        gradients = tree_flatten({key: result.grads[key] for key in z})[0]
        pairs = [(x, g.to(x)) for x, g in zip(tree_flatten(dict(z))[0], gradients, strict=True) if _moves(x)]
        if not pairs:
            raise BadArgument(
                "expected z to be computed from the variables by torch operations; it does not depend on the variables"
            )
        for x in leaves.values():
            x.grad = None
        torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        for name, x in leaves.items():
            if x.grad is not None and not bool(x.grad.isfinite().all()):
                raise NonFiniteState(0, f"the gradient of variable {name!r}")
        return result

    def _training(self, leaves: Variables, index: int) -> tuple[TrainingFunction, Mapping[str, Any]]:
        if isinstance(self.problem, TrainingFunction):
            return self.problem, leaves
        with torch.enable_grad():
            f, z = self.problem(leaves, index)
        if not isinstance(f, TrainingFunction) or not isinstance(z, Mapping):
            raise BadArgument(
                f"expected problem to return a TrainingFunction and its z; got {type(f).__name__}, {type(z).__name__}"
            )
        return f, z


def _detached(z: Mapping[str, Any]) -> dict[str, Any]:
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, dict(z))


def _moves(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
