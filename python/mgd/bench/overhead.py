"""`mgd bench overhead`: what this package's own Python costs per step.

The network is so small that nothing else counts. Of the time that a metagradient takes per step, torch's part is
measured alone: the plain gradient by autograd and the replay of the second derivatives' graph, or the parts of the
joint graph. The rest is ours: states, kernels of the optimizer, log, bookkeeping.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from mgd import TrainingFunction
from mgd.autodiff.captured import CapturedEvaluator
from mgd.autodiff.execution import below_autograd
from mgd.bench import shared, timing
from mgd.ui.options import Json
from mgd_kernels import AdamW


def smallest(steps: int, seed: int = 0, device: str = "cpu") -> tuple[TrainingFunction, dict[str, Tensor]]:
    """A network of 15 parameters, 5-2-1 with GELU, on batches of 8, AdamW; lr [T], weight decay, data weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 2), nn.GELU(), nn.Linear(2, 1)).to(device)
    x, y = torch.randn(64, 5).to(device), torch.randn(64, 1).to(device)
    index = [torch.randint(64, (8,)).to(device) for _ in range(steps)]

    def loss(model: nn.Module, batch: Any, z: Any) -> Tensor:
        inputs, targets, _ = batch
        return (z["data_weights"] * (model(inputs) - targets).square().mean(1)).mean()

    function = TrainingFunction(
        model,
        loss,
        [(x[i], y[i], i) for i in index],
        optimizer=AdamW(lr=1e-3, eps_root=1e-8, weight_decay=0.01),
        objective=lambda model: F.mse_loss(model(x), y),
        per_example={"data_weights": lambda batch: batch[2]},
        trace=True,
    )
    z = {
        "lr": torch.full((steps,), 1e-3),
        "weight_decay": torch.tensor(0.01),
        "data_weights": torch.ones(64, device=device),
    }
    return function, z


def measure(steps: int = 512, rounds: int = 7, core: int | None = -1) -> dict[str, Any]:
    """Microseconds per step, the least of `rounds`, in JSON's types: the whole, torch's parts, and our own."""
    with timing.pinned(core) as pinning:
        function, z = smallest(steps)
        found = {}
        for name, run in {"captured": function}.items():
            run.metagradient(z)  # captures
            parts = parts_of(run, z)
            whole = functools.partial(run.metagradient, z)
            seconds = timing.least(rounds, whole, *parts.values())
            micro = [1e6 * value / steps for value in seconds]
            found[name] = dict(zip(("whole", *parts), micro, strict=True)) | {"own": micro[0] - sum(micro[1:])}
        parameters = sum(p.numel() for p in function.model.parameters())
        return {"steps": steps, "parameters": parameters, **pinning, "microseconds": found}


def parts_of(function: TrainingFunction, z: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
    """The runs of each part of the captured graph in a metagradient."""
    evaluator = function._evaluator
    assert isinstance(evaluator, CapturedEvaluator)
    (graph,) = evaluator.graphs.values()
    parts = {"gradient": "_forward", "second derivatives": "_refresh_once"}
    return {
        name: _replays(function, z, functools.partial(setattr, graph.joint, part), getattr(graph.joint, part))
        for name, part in parts.items()
    }


def _replays(
    function: TrainingFunction, z: dict[str, Tensor], put: Callable[[Any], None], graph: Callable[..., Any]
) -> Callable[[], None]:
    """As many calls of a graph as a metagradient makes, on the tensors of one step. put: sets it in its place."""
    calls: list[Any] = []

    def noting(*arguments: Any) -> Any:
        calls.append(arguments)
        return graph(*arguments)

    put(noting)
    try:
        function.metagradient(z)
    finally:
        put(graph)
    # The tensors of the sweep's end: their values are those of no step, which matters to nobody here.
    arguments, count = calls[-1], len(calls)

    def run() -> None:
        with below_autograd(True):  # as it is replayed
            for _ in range(count):
                graph(*arguments)

    return run


def command(
    steps: Annotated[int, typer.Option("--steps", min=2, help="Number of training steps.")] = 512,
    rounds: shared.Rounds = 7,
    core: shared.Core = -1,
    json: Json = None,
) -> None:
    """What this package's own Python costs per step, on a network of 15 parameters."""
    session, where = shared.begin("bench overhead", None, json)
    measured = measure(steps, rounds, shared.core_of(core))
    columns = measured["microseconds"]
    rows = [["µs per step", *columns]]
    names = {
        "whole": "metagradient",
        "gradient": "of it, the graph of loss and gradient",
        "second derivatives": "of it, the graph of the second derivatives",
        "own": "of it, this package's own",
    }
    for name, text in names.items():
        rows.append([text, *(f"{column[name]:.0f}" if name in column else "-" for column in columns.values())])
    session.table(f"{measured['parameters']} parameters, {steps} steps, the least of {rounds}", rows)
    session.write(None, {"machine": where, **measured})
