"""`mgd bench overhead`: what this package's own Python costs a step, on a network too small for anything else to count.

Of the time of a step of a metagradient, the plain gradient (torch's operators and autograd) and the replay of the
second derivatives' graph are measured alone; what is left is ours: states, kernels of the optimizer, log, bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from mgd import TrainingFunction
from mgd.bench import show, timing
from mgd.options import Json
from mgd.tracing import below_autograd
from mgd_kernels import AdamW


def smallest(steps: int, seed: int = 0) -> tuple[TrainingFunction, dict[str, Tensor]]:
    """A network of 15 parameters, 5-2-1 with GELU, on batches of 8, AdamW; lr [T], weight decay, data weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 2), nn.GELU(), nn.Linear(2, 1))
    x, y = torch.randn(64, 5), torch.randn(64, 1)
    index = [torch.randint(64, (8,)) for _ in range(steps)]

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
    z = {"lr": torch.full((steps,), 1e-3), "weight_decay": torch.tensor(0.01), "data_weights": torch.ones(64)}
    return function, z


def measure(steps: int = 512, rounds: int = 7, core: int | None = -1) -> dict[str, Any]:
    """Microseconds a step, the least of `rounds`, in JSON's types."""
    with timing.pinned(core) as pinning:
        function, z = smallest(steps)

        def whole() -> None:
            function.metagradient(z)

        whole()
        parts = {"whole": whole, "gradient": _gradient(function, z), "second derivatives": _graph(function, z)}
        seconds = timing.least(rounds, *parts.values())
        found = {name: 1e6 * value / steps for name, value in zip(parts, seconds, strict=True)}
        found["own"] = found["whole"] - found["gradient"] - found["second derivatives"]
        parameters = sum(p.numel() for p in function.model.parameters())
        return {"steps": steps, "parameters": parameters, **pinning, "microseconds": found}


def _gradient(function: TrainingFunction, z: dict[str, Tensor]) -> Callable[[], None]:
    """Every step's gradient by plain torch."""
    parameters = list(function.model.parameters())

    def run() -> None:
        for t in range(len(function)):
            batch = function.batches[t]
            loss = function.loss(function.model, batch, {"data_weights": z["data_weights"][batch[2]]})
            torch.autograd.grad(loss, parameters)

    return run


def _graph(function: TrainingFunction, z: dict[str, Tensor]) -> Callable[[], None]:
    """As many replays of the traced graph as a metagradient makes, always on the tensors of one step."""
    traces = function._traces
    assert traces is not None
    ((key, graph),) = traces.graphs.items()
    calls: list[Any] = []

    def noting(*arguments: Any) -> Any:
        calls.append(arguments)
        return graph(*arguments)

    traces.graphs[key] = noting
    try:
        function.metagradient(z)
    finally:
        traces.graphs[key] = graph
    # The tensors of the sweep's end: their values are those of no step, which matters to nobody here.
    arguments, count = calls[-1], len(calls)

    def run() -> None:
        with below_autograd(True):  # as `mgd.tracing.Traces` replays it
            for _ in range(count):
                graph(*arguments)

    return run


def command(
    steps: Annotated[int, typer.Option("--steps", min=2, help="Training steps.")] = 512,
    rounds: show.Rounds = 7,
    core: show.Core = -1,
    json: Json = None,
) -> None:
    """What this package's own Python costs a step, on a network of 15 parameters."""
    console, where = show.console(), timing.machine()
    console.print(timing.describe(where), highlight=False)
    found = measure(steps, rounds, show.core_of(core))
    rows = [["a step", "µs"]]
    names = {
        "whole": "metagradient",
        "gradient": "of it: a plain gradient by torch",
        "second derivatives": "of it: the traced graph of the second derivatives",
        "own": "of it: this package's own",
    }
    rows += [[text, f"{found['microseconds'][name]:.0f}"] for name, text in names.items()]
    show.table(console, f"{found['parameters']} parameters, {steps} steps, the least of {rounds}", rows)
    show.finish(console, "bench overhead", {"machine": where, **found}, json, None, lambda: ("", "", []))
