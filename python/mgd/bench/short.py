"""`mgd bench short`: many trainings of a few steps, as in MAML (arXiv 1703.03400), against an unrolled graph.

For every task: some steps of SGD on a small network, then the gradient of the query loss with respect to the initial
parameters and the learning rate. At this size Python's time is what counts. Three methods run all tasks at once, and
give the mean alone. The default does once that pays: its calls before are told beside.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from mgd import TrainingFunction, mean_over
from mgd.bench import shared, timing
from mgd.errors import BadArgument
from mgd.tasks.account import decided
from mgd.ui.options import Json
from mgd_kernels import SGD

RATE = 0.01
PASSES = 4  # over all tasks, for one time: the collection of garbage before it must not count
PATIENCE = 60.0  # seconds of first calls
AGREE = 1e-3  # float32 rounding, carried through some steps; measured up to 1e-6
Found = list[tuple[Tensor, dict[str, Tensor], Tensor]]  # of every task: query loss, gradients of init, and of the rate


@dataclass(eq=False)
class Tasks:
    """support, query: of every task, inputs and targets. criterion(outputs, targets) -> loss."""

    model: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    support: list[tuple[Tensor, Tensor]]
    query: list[tuple[Tensor, Tensor]]
    steps: int

    def loss(self, model: nn.Module, batch: Any, z: Any) -> Tensor:
        return self.criterion(model(batch[0]), batch[1])

    def objective(self, task: int) -> Callable[[nn.Module], Tensor]:
        held, targets = self.query[task]
        return lambda model: self.criterion(model(held), targets)

    def function(self, task: int, **how: Any) -> TrainingFunction:
        batches, objective = [self.support[task]] * self.steps, self.objective(task)
        return TrainingFunction(self.model, self.loss, batches, optimizer=SGD(lr=RATE), objective=objective, **how)

    def z(self) -> dict[str, Any]:
        init = {name: p.detach() for name, p in self.model.named_parameters()}
        return {"init": init, "lr": torch.tensor(RATE)}


def _tasks(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    shots: Callable[[int], tuple[Tensor, Tensor]],
    tasks: int,
    steps: int,
) -> Tasks:
    support, query = ([shots(task) for task in range(tasks)] for _ in range(2))
    return Tasks(model, criterion, support, query, steps)


def sines(tasks: int, steps: int) -> Tasks:
    """1-40-40-1 with ReLU on 10 points of a sine."""
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))

    def points(phase: int) -> tuple[Tensor, Tensor]:
        x = 10 * torch.rand(10, 1) - 5
        return x, torch.sin(x + phase)

    return _tasks(model, F.mse_loss, points, tasks, steps)


def images(tasks: int, steps: int) -> Tasks:
    """784-64-10 with ReLU on 10 random images."""
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))

    def shots(task: int) -> tuple[Tensor, Tensor]:
        return torch.randn(10, 784), torch.randint(10, (10,))

    return _tasks(model, F.cross_entropy, shots, tasks, steps)


WORKLOADS = {"sines": sines, "images": images}


# --- methods ---------------------------------------------------------------------------------------------------------


def _unrolled(tasks: Tasks) -> Callable[[], Found]:
    """One autograd graph through all steps of a task, by `torch.func.functional_call`."""

    def run() -> Found:
        found: Found = []
        for (x, y), (held, targets) in zip(tasks.support, tasks.query, strict=True):
            init = {name: p.detach().requires_grad_() for name, p in tasks.model.named_parameters()}
            rate = torch.tensor(RATE, requires_grad=True)
            params = init
            for _ in range(tasks.steps):
                loss = tasks.criterion(functional_call(tasks.model, params, (x,)), y)
                grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
                params = {name: p - rate * g for (name, p), g in zip(params.items(), grads, strict=True)}
            value = tasks.criterion(functional_call(tasks.model, params, (held,)), targets)
            *by_init, by_rate = torch.autograd.grad(value, [*init.values(), rate])
            found.append((value.detach(), dict(zip(init, by_init, strict=True)), by_rate))
        return found

    return run


def _vmapped(tasks: Tasks) -> Callable[[], Found]:
    """The same graph for all tasks at once, by `torch.func.vmap`, and the gradient of their mean."""
    support, query = ([torch.stack(part) for part in zip(*data, strict=True)] for data in (tasks.support, tasks.query))

    def run() -> Found:
        init = {name: p.detach().requires_grad_() for name, p in tasks.model.named_parameters()}
        rate = torch.tensor(RATE, requires_grad=True)

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return tasks.criterion(functional_call(tasks.model, params, (x,)), y)

        def trained(x: Tensor, y: Tensor, held: Tensor, targets: Tensor) -> Tensor:
            params = init
            for _ in range(tasks.steps):
                grads = torch.func.grad(loss)(params, x, y)
                params = {name: p - rate * grads[name] for name, p in params.items()}
            return loss(params, held, targets)

        value = torch.func.vmap(trained)(*support, *query).mean()
        *by_init, by_rate = torch.autograd.grad(value, [*init.values(), rate])
        return [(value.detach(), dict(zip(init, by_init, strict=True)), by_rate)]

    return run


def _higher(tasks: Tasks) -> Callable[[], Found]:
    """The same graph, by the package `higher`."""
    import higher

    def run() -> Found:
        found: Found = []
        for (x, y), (held, targets) in zip(tasks.support, tasks.query, strict=True):
            rate = torch.tensor(RATE, requires_grad=True)
            optimizer = torch.optim.SGD(tasks.model.parameters(), lr=RATE)
            override = {"lr": [rate]}
            with higher.innerloop_ctx(tasks.model, optimizer, override=override) as (model, inner):
                for _ in range(tasks.steps):
                    inner.step(tasks.criterion(model(x), y))
                value = tasks.criterion(model(held), targets)
                *grads, by_rate = torch.autograd.grad(value, [*model.parameters(time=0), rate])
            names = [name for name, _ in tasks.model.named_parameters()]
            found.append((value.detach(), dict(zip(names, grads, strict=True)), by_rate))
        return found

    return run


def _per_task(**how: Any) -> Callable[[Tasks], Callable[[], Found]]:
    """A training function for every task."""

    def method(tasks: Tasks) -> Callable[[], Found]:
        functions = [tasks.function(task, **how) for task in range(len(tasks.support))]
        return lambda: [_found(function, tasks) for function in functions]

    return method


def _one(**how: Any) -> Callable[[Tasks], Callable[[], Found]]:
    """One training function, which is given the batches and the objective of each task."""

    def method(tasks: Tasks) -> Callable[[], Found]:
        function = tasks.function(0, **how)

        def run() -> Found:
            found = []
            for task, support in enumerate(tasks.support):
                function.batches, function.objective = [support] * tasks.steps, tasks.objective(task)
                found.append(_found(function, tasks))
            return found

        return run

    return method


def _together(**how: Any) -> Callable[[Tasks], Callable[[], Found]]:
    """The mean over all tasks. By default, the first calls go on until it is decided how they run."""

    def method(tasks: Tasks) -> Callable[[], Found]:
        functions = [tasks.function(task, **how) for task in range(len(tasks.support))]

        patience = 0.0 if how else PATIENCE

        def run() -> Found:
            nonlocal patience
            found, end, patience = once(), time.process_time() + patience, 0.0
            while time.process_time() < end and not decided(functions[0], tasks.z()):
                once()
            return found

        def once() -> Found:
            leaves, spec = tree_flatten(tasks.z())
            leaves = [x.clone().requires_grad_() for x in leaves]
            value = mean_over(functions, tree_unflatten(leaves, spec))
            value.backward()
            grads = tree_unflatten([x.grad for x in leaves], spec)
            return [(value.detach(), grads["init"], grads["lr"])]

        return run

    return method


def _mean(found: Found) -> Found:
    values, grads, rates = zip(*found, strict=True)
    init = {name: torch.stack([each[name] for each in grads]).mean(0) for name in grads[0]}
    return [(torch.stack(values).mean(), init, torch.stack(rates).mean())]


def _found(function: TrainingFunction, tasks: Tasks) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    result = function.metagradient(tasks.z())
    return result.value, result.grads["init"], result.grads["lr"]


METHODS: dict[str, Callable[[Tasks], Callable[[], Found]]] = {
    "higher": _higher,
    "unrolled, torch.func.vmap": _vmapped,
    "autograd": _per_task(trace=False),
    "autograd, batches set anew": _one(trace=False),
    "captured": _per_task(trace=True),
    "captured, batches set anew": _one(trace=True),
    "compiled": _per_task(compile=True),
    "mean_over, captured": _together(trace=True),
    "mean_over": _together(),
}


# --- the command -----------------------------------------------------------------------------------------------------


def measure(
    workload: str = "sines", tasks: int = 4, steps: int = 5, rounds: int = 50, core: int | None = -1
) -> dict[str, Any]:
    """Processor time of `PASSES` passes over all tasks, in JSON's types: seconds of the unrolled graph, and of each
    method its summary with ratios to that, and the seconds of its first calls. `higher` is left out where it is not
    installed. Raises BadArgument for an unknown workload."""
    if workload not in WORKLOADS:
        raise BadArgument(f"expected a workload among {', '.join(WORKLOADS)}; got {workload!r}")
    with timing.pinned(core) as pinning:
        torch.manual_seed(0)
        problem = WORKLOADS[workload](tasks, steps)
        baseline, missing = _unrolled(problem), importlib.util.find_spec("higher") is None
        names = [name for name in METHODS if not (name == "higher" and missing)]
        methods = {name: METHODS[name](problem) for name in names}
        expected = baseline()
        differences, first = {}, {}
        for name, run in methods.items():
            start = time.process_time()
            differences[name] = _differences(run(), expected)
            run()  # the first calls warm up
            first[name] = time.process_time() - start
        passes = {name: _passes(run) for name, run in methods.items()}
        seconds, samples = timing.alternate(rounds, _passes(baseline), passes, clock=time.process_time)
        found = {
            name: samples[name].summary() | {"difference": differences[name], "first": first[name]} for name in names
        }
        return {
            "workload": workload, "tasks": tasks, "steps": steps, "passes": PASSES, **pinning,
            "unrolled": timing.quantiles(seconds), "methods": found,
        }  # fmt: skip


def _passes(run: Callable[[], Found]) -> Callable[[], None]:
    def several() -> None:
        for _ in range(PASSES):
            run()

    return several


def _differences(found: Found, expected: Found) -> float:
    """The largest difference of all tasks, or that of the mean where only that was found."""
    return max(map(_difference, found, expected if len(found) == len(expected) else _mean(expected)))


def _difference(found: Any, expected: Any) -> float:
    """The largest difference of a task's results, each relative to the largest expected entry of its kind."""
    (value, init, rate), (value_, init_, rate_) = found, expected
    pairs = [(value, value_), (rate, rate_), *((init[name], x) for name, x in init_.items())]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


def command(
    workload: Annotated[str, typer.Option("--workload", help=f"One of {', '.join(WORKLOADS)}.")] = "sines",
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="Number of tasks.")] = 4,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Inner steps of each.")] = 5,
    rounds: shared.Rounds = 50,
    core: shared.Core = -1,
    json: Json = None,
) -> None:
    """Many trainings of a few steps, as in MAML, against an unrolled graph."""
    session, where = shared.begin("bench short", None, json)
    measured = measure(workload, tasks, steps, rounds, shared.core_of(core))

    def each(entry: dict[str, float]) -> str:
        return f"{1e3 * entry['median'] / (PASSES * tasks):.2f}"

    rows = [["method", "ms per task", "in unrolled graphs", "difference", "s of the first calls"]]
    rows.append(["unrolled", each(measured["unrolled"]), "1", "", ""])
    for name, entry in measured["methods"].items():
        told = f"{entry['difference']:.0e}", f"{entry['first']:.1f}"
        rows.append([name, each(entry["seconds"]), shared.ratio(entry["ratio"]), *told])
    session.table(f"{workload}: {tasks} tasks of {steps} steps, median of {rounds}", rows)
    session.write(None, {"machine": where, **measured})
    if wrong := [name for name, entry in measured["methods"].items() if not entry["difference"] <= AGREE]:
        session.print(f"The metagradients of {', '.join(wrong)} differ from the unrolled graph's.", style="bold red")
        raise typer.Exit(1)
