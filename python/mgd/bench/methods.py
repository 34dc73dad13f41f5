"""The ways to a metagradient that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mgd.bench import baselines
from mgd.bench.bergson import magic
from mgd.bench.cases import Case
from mgd.plan.budget import Budget
from mgd.results import Report

OBJECTIVES, DIRECTIONS = 16, 4
BUDGET = "128MB"


@dataclass
class Outcome:
    """What a method found: the value, the gradient of every entry of `z` (of the mean objective); and the report of a
    method of this package. along: of forward mode, its directions and the value's derivatives along them."""

    value: Tensor
    grads: dict[str, Any]
    report: Report | None = None
    along: tuple[list[dict[str, Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class Method:
    """what: for people. prepare: from a case to a function that computes its metagradient from the beginning.
    ours: of this package. objectives: how many metagradients one call computes. share: of a training's steps that is
    enough to time it, where a call takes long; a step costs the same wherever it stands."""

    what: str
    prepare: Callable[[Case], Callable[[], Outcome]]
    ours: bool = False
    objectives: int = 1
    share: float = 1.0


def training(case: Case) -> tuple[Callable[[], Any], str]:
    """Plain training of the case, and how it is done."""
    try:
        return baselines.Training(case.function, case.z), "plain eager training (torch.optim, backward)"
    except baselines.Unsupported as reason:
        return lambda: case.function.train(case.z), f"this package's own training, since {reason}"


def _plain(function: Callable[..., baselines.Found]) -> Callable[[Case], Callable[[], Outcome]]:
    return lambda case: lambda: Outcome(*function(case.function, case.z))


def package(**options: Any) -> Callable[[Case], Callable[[], Outcome]]:
    """This package with some of the training function's options changed."""

    def prepare(case: Case) -> Callable[[], Outcome]:
        function = case.function.replaced(**options)

        def run() -> Outcome:
            found = function.metagradient(case.z)
            return Outcome(found.value, found.grads, found.report)

        return run

    return prepare


def _objectives(case: Case) -> Callable[[], Outcome]:
    if case.objectives is None:
        raise baselines.Unsupported("only the package's own workloads know how to split their objective")
    function = case.function.replaced(objective=case.objectives(OBJECTIVES), trace=True)

    def run() -> Outcome:
        found = function.metagradient(case.z)
        return Outcome(found.value.mean(), {k: g.mean(0) for k, g in found.grads.items()}, found.report)

    return run


def _forward(count: int) -> Callable[[Case], Callable[[], Outcome]]:
    """Forward mode along random directions in which every entry of z moves by its own magnitude."""

    def prepare(case: Case) -> Callable[[], Outcome]:
        generator = torch.Generator().manual_seed(0)

        def moved(x: Any) -> Any:
            if isinstance(x, dict):
                return {key: moved(value) for key, value in x.items()}
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            return noise * x.detach().abs().mean()

        directions = [moved(dict(case.z)) for _ in range(count)]
        function = case.function.replaced(trace=True)

        def run() -> Outcome:
            found = function.jvp(case.z, directions)
            return Outcome(found.value, {}, found.report, (directions, found.tangent))

        return run

    return prepare


METHODS: dict[str, Method] = {
    "unrolled": Method("plain torch: one autograd graph through all steps", _plain(baselines.unrolled)),
    "states": Method("plain torch: every state kept, each step differentiated by autograd", _plain(baselines.states)),
    "sqrt": Method("plain torch: a state every sqrt(T) steps, the rest trained again", _plain(baselines.sqrt)),
    "bergson": Method("bergson: MAGIC from checkpoints on disk, the data weights' gradient alone", _plain(magic)),
    "mgd": Method("mgd, with the options that the training function was made with", package(), ours=True),
    "eager": Method("mgd, every step by autograd", package(trace=False), ours=True),
    "captured": Method("mgd, steps captured as a graph", package(trace=True), ours=True),
    "compiled": Method("mgd, captured, compiled by torch.compile (takes a minute)", package(compile=True), ours=True),
    "bounded": Method(
        f"mgd captured, all that it keeps within {BUDGET}", package(trace=True, budget=Budget(host=BUDGET)), ours=True
    ),
    "microbatches": Method("mgd captured, each batch in 2 parts", package(trace=True, microbatches=2), ours=True),
    "objectives": Method(
        f"mgd, {OBJECTIVES} objectives in one sweep, ratio for one of them",
        _objectives,
        ours=True,
        objectives=OBJECTIVES,
        share=1 / 8,
    ),
    "forward": Method("mgd captured, forward mode along one direction, no gradient", _forward(1), ours=True),
    "directions": Method(
        f"mgd captured, forward mode along {DIRECTIONS} directions in one sweep, ratio for one of them",
        _forward(DIRECTIONS),
        ours=True,
        objectives=DIRECTIONS,
    ),
}
LEFT_OUT = ("bergson", "mgd", "compiled", "microbatches", "forward", "directions")
DEFAULT = tuple(name for name in METHODS if name not in LEFT_OUT)


def difference_along(outcome: Outcome, reference: Mapping[str, Any]) -> dict[str, float]:
    """Of forward mode's derivatives from `<gradient, direction>`: over the root of the sum of its squared terms."""
    assert outcome.along is not None
    worst = 0.0
    for direction, tangent in zip(*outcome.along, strict=True):
        pairs = zip(tree_leaves(dict(reference)), tree_leaves(direction), strict=True)
        terms = torch.cat([(g.double() * d.double()).flatten().cpu() for g, d in pairs])
        worst = max(worst, float((tangent.double().cpu().sum() - terms.sum()).abs() / terms.square().sum().sqrt()))
    return {"along": worst}


def differences(found: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float]:
    """For every entry of z, the norm of the difference over the norm."""
    return {
        key: float((found[key].double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300))
        for key, wanted in reference.items()
        if key in found and isinstance(wanted, Tensor) and torch.is_floating_point(wanted)
    }
