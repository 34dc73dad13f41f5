"""The state of a metagradient descent, which a `RunDirectory` can hold."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mgd.descent.constraints import Constraint
from mgd.errors import BadArgument, NonFiniteState
from mgd.util.fingerprint import digest

Variables = dict[str, Tensor]

SMALLER = 0.5  # factor on the outer learning rate (or on what a group's "shrinks" names) after a training diverged


@dataclass(frozen=True)
class MetaStep:
    """One training of a descent.

    value: the objective. score: by which the best training is chosen, the value or what `validate` returns.
    gradient_norms: by variable. seconds: of the training with its metagradient. diverged: how many trainings before
    this one diverged, each followed by a smaller step.
    """

    step: int
    value: float
    score: float
    gradient_norms: dict[str, float]
    seconds: float
    diverged: int = 0


class DescentState:
    """The state of a descent: variables, outer optimizer, history, and the point from which the last step started.

    Raises BadArgument for variables that are not finite floating-point tensors, for constraints that do not fit them,
    and for an `optimizer` that does not make one of torch.
    """

    def __init__(
        self,
        variables: Mapping[str, Tensor],
        constraints: Mapping[str, Constraint],
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    ):
        if not variables:
            raise BadArgument("expected at least one variable to descend on; got none")
        for name, x in variables.items():
            if not isinstance(x, Tensor) or not x.is_floating_point():
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise BadArgument(f"expected variable {name!r} to be a floating-point tensor; got {got}")
            if not bool(x.isfinite().all()):
                raise BadArgument(f"expected variable {name!r} to be finite; it holds NaN or infinity")
        if unknown := sorted(set(constraints) - set(variables)):
            raise BadArgument(f"expected constraints for some of {list(variables)}; got {unknown}")
        for name, constraint in constraints.items():
            constraint.check(name, variables[name])
        self.constraints = constraints
        self.leaves = {name: x.detach().clone().requires_grad_() for name, x in variables.items()}
        self._project()
        self._make, self.optimizer = optimizer, optimizer(list(self.leaves.values()))
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise BadArgument(f"expected optimizer to make one of torch.optim; got {type(self.optimizer).__name__}")
        self.history: list[MetaStep] = []
        self.notes: list[str] = []
        self.best, self.best_step = self.copy(), 0
        self.before: dict[str, Any] | None = None  # the variables, gradients and optimizer state before the last step

    def identity(self) -> dict[str, str]:
        """Digests of what tells this descent from others of the same problem.

        Constraints and optimizers may be anybody's, so what they do counts, too: to points far and near, and in a few
        steps.
        """
        starts = {f"the start of {name!r}": digest(x) for name, x in self.leaves.items()}
        constraints = {}
        for name, c in self.constraints.items():
            x = self.leaves[name].detach()
            projected = [c.project(_pattern(x) * scale) for scale in (1.0, 100.0)]
            constraints[f"the constraint on {name!r}"] = digest(type(c).__name__, getattr(c, "__dict__", {}), projected)
        groups = [{**group, "params": None} for group in self.optimizer.param_groups]
        kind = type(self.optimizer).__name__
        return starts | constraints | {"the outer optimizer": digest(kind, groups, self._trial())}

    def _trial(self) -> list[Tensor]:
        """Where copies of the variables are after a few steps of an optimizer of their own."""
        copies = [x.detach().clone().requires_grad_() for x in self.leaves.values()]
        optimizer = self._make(copies)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            for scale in (1.0, -0.1, 0.3):
                for x in copies:
                    x.grad = _pattern(x) * scale
                optimizer.step()
        return [x.detach() for x in copies]

    def copy(self) -> Variables:
        return {name: x.detach().clone() for name, x in self.leaves.items()}

    def record(self, step: MetaStep) -> None:
        if not self.history or _rank(step) < _rank(self.history[self.best_step]):
            self.best, self.best_step = self.copy(), step.step
        self.history.append(step)

    def stalled(self, patience: int | None) -> bool:
        """Whether the score has not fallen in the last `patience` meta-steps."""
        return patience is not None and bool(self.history) and len(self.history) - 1 - self.best_step >= patience

    def descend(self) -> None:
        """Take a step of the outer optimizer, then project."""
        gradients = {name: x.grad.clone() for name, x in self.leaves.items() if x.grad is not None}
        self.before = {
            "variables": self.copy(),
            "gradients": gradients,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }
        self._step()

    def retreat(self, error: NonFiniteState) -> None:
        """Go back to where the last step began, and repeat that step, smaller."""
        assert self.before is not None
        self._set(self.before["variables"])
        for name, g in self.before["gradients"].items():
            self.leaves[name].grad = g.clone()
        names = [group.get("shrinks", "lr") for group in self.before["optimizer"]["param_groups"]]
        for name, group in zip(names, self.before["optimizer"]["param_groups"], strict=True):
            group[name] *= SMALLER
        self.optimizer.load_state_dict(copy.deepcopy(self.before["optimizer"]))
        words = {"lr": "an outer learning rate"}.get(names[0], f"a {names[0]}")
        self.notes.append(
            f"meta-step {len(self.history)}: {error.where} left the finite numbers at training step {error.step}; "
            f"taken again with {words} of {self.optimizer.param_groups[0][names[0]]:.3g}"
        )
        self._step()

    def _step(self) -> None:
        self.optimizer.step()
        self._project()

    def _project(self) -> None:
        with torch.no_grad():
            for name, constraint in self.constraints.items():
                self.leaves[name].copy_(constraint.project(self.leaves[name]))

    def _set(self, variables: Variables) -> None:
        with torch.no_grad():
            for name, x in variables.items():
                self.leaves[name].copy_(x)

    def state(self) -> dict[str, Any]:
        return {
            "variables": self.copy(),
            "optimizer": self.optimizer.state_dict(),
            "history": [asdict(step) for step in self.history],
            "notes": self.notes,
            "best": (self.best, self.best_step),
            "before": self.before,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self._set(state["variables"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [MetaStep(**step) for step in state["history"]]
        self.notes, self.before = state["notes"], state["before"]
        self.best, self.best_step = state["best"]


def _pattern(x: Tensor) -> Tensor:
    """Numbers of both signs in the shape of x, no two of them equal."""
    return torch.linspace(-1.0, 1.3, x.numel(), dtype=torch.float64).reshape(x.shape).to(x)


def _rank(step: MetaStep) -> float:
    """The score, with NaN ranked last."""
    return math.inf if math.isnan(step.score) else step.score
