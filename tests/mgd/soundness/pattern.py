"""What a pattern is: a small training that does in its loss or model what people do, and how its step may behave.

A pattern is a function that builds a fresh `Training`; two of them share nothing. So one instance can be unrolled,
others run with moved metaparameters for finite differences, and another one handed to `mgd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from mgd_kernels import SGD, Optimizer

STEPS, EXAMPLES = 8, 8


class Kind(Enum):
    """What is accepted. Anything else, a raw exception or another number, is a failure."""

    PURE = "the step is a function of its inputs: the right number, in every mode"
    STATEFUL = "Python state makes two evaluations of a step differ: the right number, or an error of mgd.errors"
    REFUSABLE = "torch itself has no second derivative here: the right number, or an error of mgd.errors"


PURE, STATEFUL, REFUSABLE = Kind.PURE, Kind.STATEFUL, Kind.REFUSABLE


@dataclass
class Training:
    model: nn.Module
    loss: Callable[..., Tensor]
    batches: Sequence[Any]
    objective: Callable[[nn.Module], Tensor]
    z: dict[str, Any]
    optimizer: Optimizer = field(default_factory=lambda: SGD(lr=0.1))  # z["lr"] overrides it


@dataclass(frozen=True, eq=False)
class Pattern:
    """plain: builds the same training from operators that unrolled autograd differentiates twice, if `build` does not.

    honest: whether unrolled autograd is the derivative in the sense of finite differences. It is not where the loss
    tells autograd something else: `detach`, `no_grad`, `item`, and a backward that is not the forward's derivative.
    There, as autograd reads it is right. differences: only finite differences give the right number.
    """

    name: str
    build: Callable[[], Training]
    kind: Kind
    plain: Callable[[], Training]
    honest: bool
    differences: bool


PATTERNS: dict[str, Pattern] = {}


def pattern(
    kind: Kind = PURE,
    *,
    plain: Callable[[], Training] | None = None,
    honest: bool = True,
    differences: bool = False,
) -> Callable[[Callable[[], Training]], Callable[[], Training]]:
    """Register the decorated builder under its name."""

    def register(build: Callable[[], Training]) -> Callable[[], Training]:
        name = build.__name__
        assert name not in PATTERNS, name
        PATTERNS[name] = Pattern(name, build, kind, plain or build, honest, differences)
        return build

    return register


# --- what most patterns are built from ---------------------------------------------------------------------------


def training(
    loss: Callable[..., Tensor],
    model: nn.Module | None = None,
    *,
    objective: Callable[[nn.Module], Tensor] | None = None,
    z: dict[str, Any] | None = None,
    optimizer: Optimizer | None = None,
    wrap: Callable[[dict[str, Any]], Any] = lambda batch: batch,
    **fields: Callable[[int, torch.Generator], Any],
) -> Training:
    """A regression of 8 examples per step whose metaparameters are `lr` `[T]` and the data weights `w`.

    fields: further entries of each batch, as functions of the step and a generator. wrap: makes of this dictionary
    the batch that the loss sees.
    """
    g = torch.Generator().manual_seed(3)
    batches = []
    for t in range(STEPS):
        batch: dict[str, Any] = {"x": randn(EXAMPLES, 4, g=g), "y": randn(EXAMPLES, 1, g=g)}
        batch["i"], batch["c"] = torch.arange(EXAMPLES), torch.randint(3, (EXAMPLES,), generator=g)
        batches.append(wrap(batch | {name: make(t, g) for name, make in fields.items()}))
    x, y = randn(5, 4, g=g), randn(5, 1, g=g)
    metaparameters = {
        "lr": torch.linspace(0.1, 0.05, STEPS, dtype=torch.float64),
        "w": torch.linspace(0.5, 1.5, EXAMPLES, dtype=torch.float64),
    }
    return Training(
        mlp() if model is None else model,
        loss,
        batches,
        objective or (lambda m: (m.eval()(x) - y).square().mean()),
        metaparameters | (z or {}),
        optimizer or SGD(lr=0.1),
    )


def randn(*shape: int, g: torch.Generator | int) -> Tensor:
    generator = torch.Generator().manual_seed(g) if isinstance(g, int) else g
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def seeded(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """`make(...)` in float64 with the same initialisation every time; the global generator is not touched."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make(*args, **kwargs).double()


def mlp() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)))


def features(model: nn.Module, x: Tensor) -> Tensor:
    """The hidden layer of `mlp`: `[len(x), 6]`."""
    return torch.tanh(model[0](x))


def errors(model: nn.Module, batch: Any, z: Any) -> Tensor:
    """The weighted squared error of each example: `[8]`."""
    return z["w"][batch["i"]] * (model(batch["x"]) - batch["y"]).square()[:, 0]


def mean(model: nn.Module, batch: Any, z: Any) -> Tensor:
    return errors(model, batch, z).mean()


def first(count: Callable[[int], int]) -> Callable[[int, torch.Generator], Tensor]:
    """A mask of the first `count(t)` examples."""
    return lambda t, g: torch.arange(EXAMPLES) < count(t)
