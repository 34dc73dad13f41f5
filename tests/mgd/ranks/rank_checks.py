"""What every rank of a small group does, in processes that a fixture starts: each check once for all tests.

A check returns values that the test compares with those of one process. It runs alone, too: `group` is then None.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import cases
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_resuming import halfway, resharded, resumed, trains  # noqa: F401 (checks, by name)
from rank_trainings import TRAININGS, Counting, Interrupted, V, interrupt, mlp, outcome, several, told, weighted_loss
from torch import nn

import mgd
from mgd.plan import training as planning
from mgd.plan.scale import DEVICES, Forecast, Scale
from mgd.ranks import processes
from mgd_kernels import AdamW

STALL = 4.0  # seconds: the timeout of the group in which a rank stalls
processes.GRACE = 0.5


def bits(name: str, group: Any) -> dict[str, Any]:
    return outcome(TRAININGS[name]().metagradient(process_group=group))


def on_disk(group: Any, folder: Path) -> dict[str, Any]:
    budget = mgd.Budget(host="64MB", disk=(folder, "1GB"))
    return outcome(mlp().to(torch.float32).metagradient(process_group=group, budget=budget))


def other_calls(group: Any) -> dict[str, Any]:
    case = mlp().to(torch.float32)
    f = case.function(process_group=group)
    lr = case.z["lr"].clone().requires_grad_()
    phi = f({**case.z, "lr": lr})
    (2 * phi).backward()
    return {"train": f.train(case.z).model_state, "value": f.value(case.z), "phi": phi.detach(), "grad": lr.grad}


def users(group: Any) -> dict[str, Any]:
    """What is built on a training function."""
    case = mlp().to(torch.float32)
    f = case.function(process_group=group)
    scores = mgd.attribute(f, case.z, 3, _query_losses(case), weights="weights")
    found = _descent(f, case.z).run({"lr": case.z["lr"]}, 2)
    rater = _rater(group)
    steps = [rater.step() for _ in range(2)]
    return {
        "scores": torch.as_tensor(scores.scores),
        "descent": found.variables,
        "values": torch.tensor(found.values),
        "rater": [p.detach() for p in rater.rater.parameters()],
        "steps": len(steps),
    }


def queries(group: Any) -> dict[str, Any]:
    """An attribution whose queries are shared out among two groups of processes."""
    case = mlp(steps=3).to(torch.float32)
    f = case.function(process_group=group)
    how = {"weights": "weights", "chunk": 2, "query_groups": 1 if group is None else 2}
    attributed = lambda **options: mgd.attribute(f, case.z, 5, _query_losses(case), **how, **options)
    return {"exact": scores_of(attributed()), "estimate": scores_of(attributed(combine=3))}


def attributions(group: Any, folder: Path) -> dict[str, Any]:
    """Attributions in directories: made by two groups and by one, interrupted, and continued by another number."""
    planning.CHECKPOINT_EVERY = 2
    case, rank, found = mlp(steps=3).to(torch.float32), dist.get_rank(group), {}
    losses, how = _query_losses(case), {"weights": "weights", "chunk": 2}

    def attributed(case: cases.Case, group: Any = group, **options: Any) -> Any:
        return mgd.attribute(case.function(process_group=group), case.z, 5, losses, **how, **options)

    ways = {"groups": {"query_groups": 2}, "one": {}, "estimate": {"query_groups": 2, "combine": 3}}
    for name, options in ways.items():
        made = attributed(case, out=folder / name, **options)
        again = attributed(case, out=folder / name, **options)
        found[name] = scores_of(made) | {"kept": again.report.chunks_kept}
        assert made.directory == str(folder / name) and same_scores(made, again)
    # In the third chunk's reverse sweep, after the visits, the rehearsal, two chunks and the digests of each of them.
    stop = 12 * len(case) + 2
    batches = Interrupted(case.batches, stop if rank == 1 else -1, interrupt)
    ends = told(lambda: attributed(case.but(batches=batches), resume=folder / "run")) if rank == 0 else None
    if rank:
        with contextlib.suppress(KeyboardInterrupt):
            attributed(case.but(batches=batches), resume=folder / "run")
    dist.barrier()
    left = sorted(path.name for path in (folder / "run").iterdir())
    dist.barrier()
    if rank == 0:
        alone = attributed(case, None, resume=folder / "run")
        found["run"] = scores_of(alone) | {"kept": alone.report.chunks_kept}
    dist.barrier()
    other = {"lr": case.z["lr"] * (1 + rank)}
    refused = {
        "other z": told(lambda: attributed(case.but(z=other), out=folder / "z")),
        "other run": told(lambda: attributed(case.but(z={"lr": 2 * case.z["lr"]}), out=folder / "one")),
        "other places": told(lambda: attributed(case, out=folder / f"{rank}")),
        "one place": told(lambda: attributed(case, out=folder / "one" if rank else None)),
        "blind": told(lambda: _elsewhere(rank, folder, lambda: attributed(case, out="mine"))),
    }
    return {"found": found, "ends": ends, "left": left, "refused": refused}


def scores_of(found: Any) -> dict[str, Any]:
    errors = None if found.estimate is None else found.estimate.errors
    return {"scores": torch.tensor(found.scores), "losses": found.values, "errors": errors}


def same_scores(one: Any, other: Any) -> bool:
    return bool((one.scores == other.scores).all()) and torch.equal(one.values, other.values)


def _elsewhere(rank: int, folder: Path, call: Any) -> Any:
    """Make the call in another working directory on each rank."""
    (folder / f"work {rank}").mkdir()
    before = os.getcwd()
    os.chdir(folder / f"work {rank}")
    try:
        return call()
    finally:
        os.chdir(before)


def _query_losses(case: cases.Case) -> Any:
    x, y, _ = case.batches[0]
    return lambda model, index: F.cross_entropy(model(x[index]), y[index], reduction="none")


def directories(group: Any, folder: Path) -> dict[str, Any]:
    """A descent and a rater that are continued in a directory, which another call is then refused."""
    case = mlp().to(torch.float32)
    f, start = case.function(process_group=group), {"lr": case.z["lr"]}
    ends = [_descent(f, case.z).run(start, steps, directory=folder / "descent") for steps in (1, 2)]
    raters = [_rater(group).fit(steps, directory=folder / "rater", save_every=1) for steps in (1, 2)]
    other = told(lambda: _descent(f, case.z).run({"lr": 2 * case.z["lr"]}, 2, directory=folder / "descent"))
    rates = [p.detach() for p in raters[-1].rater.parameters()]
    return {"descent": ends[-1].variables, "rater": rates, "trained": len(ends[-1].history), "other": other}


def _descent(f: mgd.TrainingFunction, z: dict[str, Any]) -> mgd.MetaDescent:
    return mgd.MetaDescent(lambda v, k: (f, {**z, "lr": v["lr"]}), lambda v: torch.optim.SGD(v, lr=1e-3))


def _rater(group: Any) -> mgd.DataRater:
    pool = (torch.randn(40, 5, generator=cases.generator(5)), torch.randint(3, (40,), generator=cases.generator(6)))
    torch.manual_seed(3)
    return mgd.DataRater(
        _Rater(),
        lambda: cases.mlp().float(),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        pool,
        pool,
        batch=8,
        population=1,
        options={"microbatches": V, "process_group": group, "trace": False},
    )


def jvps(group: Any) -> dict[str, Any]:
    """Forward mode, along two directions."""
    found = {}
    for name in ("convnet", "matrices"):
        case, generator = TRAININGS[name](), cases.generator(7)
        one = {"init": {n: torch.randn(x.shape, generator=generator) for n, x in case.z["init"].items()}}
        result = case.function(process_group=group).jvp(case.z, [one, {k: case.z[k] for k in ("lr", "weights")}])
        found[name] = {"value": result.value, "tangent": result.tangent, "model": result.model_tangent}
    return found


def shares(group: Any) -> dict[str, Any]:
    """What results hold where each process keeps its own."""
    found = {}
    for name in ("mlp", "matrices"):
        case = TRAININGS[name]()
        f = case.function(process_group=group, gather=False)
        result, trained = f.metagradient(case.z), f.train(case.z)
        assert result.share == trained.share
        init = {n: x.clone().requires_grad_() for n, x in case.z["init"].items()}
        f({**case.z, "init": init}).backward()
        found[name] = {
            "parts": {
                "init": result.grads["init"],
                "trained": result.model_state,
                **{slot: x for slot, x in trained.optimizer_state.items() if slot != "step"},
            },
            "share": result.share,
            "whole": {"weights": result.grads["weights"], "backward": {n: x.grad for n, x in init.items()}},
        }
    return found


class _Rater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 1)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.linear(batch[0]).squeeze(1)


class Part:
    """A batch that loads its examples when it is asked for them."""

    asked: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, batch: Any):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch[0])

    def load(self, start: int, stop: int) -> Any:
        Part.asked.append((start, stop))
        return tuple(x[start:stop] for x in self.batch)


def parts(group: Any) -> dict[str, Any]:
    case = mlp().to(torch.float32)
    Part.asked = []
    found = outcome(case.but(batches=[Part(b) for b in case.batches]).metagradient(process_group=group))
    return found | {"asked": sorted(set(Part.asked))}


def sizes(group: Any) -> dict[str, int]:
    """Bytes per process of what a metagradient of a model of some size holds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 40))
    batches = [(torch.randn(8, 40), torch.randn(8, 40)) for _ in range(4)]
    f = mgd.TrainingFunction(
        model,
        lambda model, batch, z: F.mse_loss(model(batch[0]), batch[1]),
        batches,
        optimizer=AdamW(lr=1e-3, eps_root=1e-6),
        objective=lambda model: sum(p.square().sum() for p in model.parameters()),
        microbatches=V,
        process_group=group,
    )
    z = {"lr": torch.full((4,), 1e-3)}
    with f._guarded():
        sweep = f._trained(z)
        found = {
            "state": sum(x.nbytes for x in sweep.state.tensors()),
            "adjoint": sum(x.nbytes for x in sweep.adjoints[0].tensors()),
            "log": sum(step.gradient.nbytes for step in sweep.history._gradients.values()),
            "snapshot": f.plan().sizes.snapshot,
        }
        f._reversed(sweep, z)
    return found


def traffic(group: Any) -> tuple[int, int]:
    """Bytes that this rank sends during a metagradient, and the forecast of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 200))
    batches = [(torch.randn(8, 200), torch.randn(8, 200)) for _ in range(4)]
    f = mgd.TrainingFunction(
        model,
        lambda model, batch, z: z["scale"] * F.mse_loss(model(batch[0]), batch[1]),
        batches,
        optimizer=AdamW(lr=1e-3, eps_root=1e-6),
        objective=lambda model: torch.stack([p.square().sum() for p in model.parameters()][:2]),
        microbatches=V,
        process_group=group,
        trace=False,
    )
    f.metagradient({"lr": torch.full((4,), 1e-3), "scale": torch.tensor(1.0)})
    scale = Scale(sum(p.numel() for p in model.parameters()), dist.get_world_size(group), objectives=2)
    return f.ranks.sent, Forecast(scale, DEVICES["h100"], 50e9, 1, f.plan()).network_bytes


# --- what is refused, and failures -----------------------------------------------------------------------------------


def _other_loss(model, batch, z):
    return weighted_loss(model, batch, z) * 2


def _none(model: nn.Module, index: torch.Tensor) -> None:
    """Losses that are none."""


def _not_the_last(losses: Any) -> Any:
    return lambda model, index: None if 2 in index else losses(model, index)


def refusals(group: Any, folder: Path) -> dict[str, tuple[str, str]]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    case = mlp().to(torch.float32)

    def of(case: cases.Case, **options: Any) -> tuple[str, str]:
        return told(lambda: case.metagradient(process_group=group, **options))

    def attributed(losses: Any, groups: int) -> Any:
        f = case.function(process_group=group)
        return mgd.attribute(f, case.z, 3, losses, weights="weights", query_groups=groups)

    other_batches = [(b[0] + (rank == 1 and t == 3), *b[1:]) for t, b in enumerate(case.batches)]
    order = [tuple(x.flip(0) for x in b) if rank == 1 else b for b in case.batches]
    fewer = case.but(batches=case.batches[: 6 - (rank == 1)])
    found = {
        "z": of(case.but(z={"temperature": torch.tensor(1.0 + rank)})),
        "batches": of(case.but(batches=other_batches)),
        "order": of(case.but(batches=order)),
        "length": of(fewer.but(z={"lr": torch.full((len(fewer),), 1e-2)})),
        "seed": of(case, seed=rank),
        "code": of(case.but(loss=weighted_loss if rank else _other_loss)),
        "objective": of(case.but(objective=lambda model: several(model)[rank])),
        "divides": of(case, microbatches=size + 1),
        "buffers": of(case.but(model=Counting(), z={"init": {}})),
        "jvp": told(lambda: case.function(process_group=group).jvp(case.z, {"lr": case.z["lr"] + rank})),
        "groups": told(lambda: attributed(_none, 3)),
        "one group": told(lambda: attributed(_not_the_last(_query_losses(case)), 2)),
        "other queries": told(lambda: attributed(_none if rank else _query_losses(case), 1)),
        "resume": told(
            lambda: case.function(process_group=group).metagradient(case.z, resume=folder / "a" if rank else None)
        ),
        "calls": told(
            lambda: (lambda f: f.train(case.z) if rank else f.metagradient(case.z))(case.function(process_group=group))
        ),
    }
    bad = [b if rank == 0 or t != 4 else ("no tensors",) for t, b in enumerate(case.batches)]
    found["one rank"] = of(case.but(batches=bad))
    again = case.function(process_group=group)
    found["afterwards"] = told(lambda: again.metagradient(case.z))
    return found


def stalled(group: Any) -> tuple[str, str, float]:
    """Rank 1 does not come back in time."""
    short = dist.new_group(timeout=timedelta(seconds=STALL))
    rank, case = dist.get_rank(group), mlp().to(torch.float32)
    batches = Interrupted(case.batches, 3 if rank == 1 else -1, lambda: time.sleep(STALL + 2))
    begin = time.monotonic()
    told_of = told(lambda: case.but(batches=batches).metagradient(process_group=short))
    return *told_of, time.monotonic() - begin


def died(group: Any, folder: Path) -> tuple[str, str, float]:
    """Rank 1 dies in the middle of a training."""
    rank, case = dist.get_rank(group), mlp().to(torch.float32)
    batches = Interrupted(case.batches, 3 if rank == 1 else -1, lambda: os._exit(9))
    begin = time.monotonic()
    told_of = told(lambda: case.but(batches=batches).metagradient(process_group=group))
    return *told_of, time.monotonic() - begin


def everything(rank: int, size: int, folder: Path, names: list[str]) -> None:
    """The checks of these names, in this order, as one rank of a group; results go to a file as they come."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    group, found = dist.group.WORLD, {}
    for name in names:
        begin, used = time.monotonic(), time.process_time()
        found[name] = check(name, group, folder / name.replace(" ", "-"))
        found[f"seconds of {name}"] = time.monotonic() - begin, time.process_time() - used
        torch.save(found, folder / f"{rank}.part")
        (folder / f"{rank}.part").rename(folder / f"{rank}.pt")
    with contextlib.suppress(Exception):
        dist.barrier()


def check(name: str, group: Any, folder: Path) -> Any:
    if name in TRAININGS:
        return bits(name, group)
    function = globals()[name]
    if "folder" not in inspect.signature(function).parameters:
        return function(group)
    folder.mkdir(exist_ok=True)
    return function(group, folder)
