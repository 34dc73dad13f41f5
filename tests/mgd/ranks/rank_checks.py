"""What every rank of a small group does, in processes that a fixture starts: each check once for all tests.

A check returns values that the test compares with those of one process. It runs alone, too: `group` is then None.
"""

from __future__ import annotations

import contextlib
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
from torch import nn

import mgd
from mgd import errors
from mgd.plan import training as planning
from mgd_kernels import AdamW, Muon, RMSprop

V = 4
STALL = 8.0  # seconds: the timeout of the group in which a rank stalls


def outcome(result: Any) -> dict[str, Any]:
    return {
        "value": result.value,
        "grads": result.grads,
        "losses": result.losses,
        "model": result.model_state,
        "adjoint norms": result.report.adjoint_norms,
    }


def weighted(case: cases.Case, **changes: Any) -> cases.Case:
    """With a weight for every example, a temperature that all microbatches read, learning rates and initial weights."""
    examples, steps = 20, len(case)
    z = {
        "weights": torch.linspace(0.5, 1.5, examples, dtype=torch.float64),
        "temperature": torch.tensor(1.1, dtype=torch.float64),
        "lr": torch.full((steps,), 1e-2, dtype=torch.float64),
        "init": {name: p.detach().clone() for name, p in case.model.named_parameters()},
    }
    options = {
        "trace": False,
        "microbatches": V,
        "per_example": {"weights": lambda batch: batch[2]},
        "max_grad_norm": 0.5,
    }
    return case.but(z=z, loss=weighted_loss, **options | changes)


def weighted_loss(model, batch, z):
    x, y, _ = batch
    return (z["weights"] * F.cross_entropy(model(x) * z["temperature"], y, reduction="none")).mean()


def mlp(**changes: Any) -> cases.Case:
    model = nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Dropout(0.1), nn.Linear(24, cases.CLASSES))
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return weighted(cases.supervised(model, (5,), steps=6), **changes)


def gpt(**changes: Any) -> cases.Case:
    case = cases.language()
    return case.but(**{"trace": False, "microbatches": V, "max_grad_norm": 0.5} | changes)


def several(model: nn.Module) -> torch.Tensor:
    """Two objectives."""
    return torch.stack([p.double().square().sum() for p in model.parameters()][:2]).to(next(model.parameters()))


TRAININGS = {
    "mlp": lambda: mlp().to(torch.float32),
    "mlp in float64": lambda: mlp(),
    "gpt with dropout": lambda: gpt().to(torch.float32),
    "gpt, captured": lambda: gpt(trace=True).to(torch.float32),
    "parameter groups": lambda: mlp(
        optimizer=AdamW(lr=1e-2, eps_root=1e-4, param_groups=[{"params": "*.bias", "weight_decay": 0.0}])
    ).to(torch.float32),
    "matrices": lambda: mlp(optimizer=Muon()).to(torch.float32),
    "a torch update": lambda: mlp(optimizer=RMSprop(eps_root=1e-4)).to(torch.float32),
    "two objectives": lambda: mlp(objective=several).to(torch.float32),
    "replays on a small budget": lambda: mlp(budget=mgd.Budget(host="40kB")).to(torch.float32),
}


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
    f, x, y = case.function(process_group=group), case.batches[0][0], case.batches[0][1]

    def losses(model: nn.Module, index: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x[index]), y[index], reduction="none")

    scores = mgd.attribute(f, case.z, 3, losses, weights="weights")
    descent = mgd.MetaDescent(lambda v, k: (f, {**case.z, "lr": v["lr"]}), lambda v: torch.optim.SGD(v, lr=1e-3))
    found = descent.run({"lr": case.z["lr"]}, 2)
    pool = (torch.randn(40, 5, generator=cases.generator(5)), torch.randint(3, (40,), generator=cases.generator(6)))
    torch.manual_seed(3)
    rater = mgd.DataRater(
        _Rater(),
        lambda: cases.mlp().float(),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        pool,
        pool,
        batch=8,
        population=1,
        options={"microbatches": V, "process_group": group, "trace": False},
    )
    steps = [rater.step() for _ in range(2)]
    return {
        "scores": torch.as_tensor(scores.scores),
        "descent": found.variables,
        "values": torch.tensor(found.values),
        "rater": [p.detach() for p in rater.rater.parameters()],
        "steps": len(steps),
    }


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


# --- what is refused, and failures -----------------------------------------------------------------------------------


class Counting(nn.Module):
    """Keeps a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return y - self.mean


def told(call: Any) -> tuple[str, str]:
    """The error of a call, and that it came from `mgd.errors`."""
    try:
        call()
    except Exception as error:
        assert type(error).__name__ in errors.__all__, error
        return type(error).__name__, str(error)
    return "none", ""


def refusals(group: Any, folder: Path) -> dict[str, tuple[str, str]]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    case = mlp().to(torch.float32)

    def of(case: cases.Case, **options: Any) -> tuple[str, str]:
        return told(lambda: case.metagradient(process_group=group, **options))

    other_batches = [(b[0] + (rank == 1 and t == 3), *b[1:]) for t, b in enumerate(case.batches)]
    order = [tuple(x.flip(0) for x in b) if rank == 1 else b for b in case.batches]
    fewer = case.but(batches=case.batches[: 6 - (rank == 1)])
    found = {
        "z": of(case.but(z={"temperature": torch.tensor(1.0 + rank)})),
        "batches": of(case.but(batches=other_batches)),
        "order": of(case.but(batches=order)),
        "length": of(fewer.but(z={"lr": torch.full((len(fewer),), 1e-2)})),
        "seed": of(case, seed=rank),
        "objective": of(case.but(objective=lambda model: several(model)[rank])),
        "divides": of(case, microbatches=size + 1),
        "buffers": of(case.but(model=Counting(), z={"init": {}})),
        "jvp": told(lambda: case.function(process_group=group).jvp(case.z, {"lr": case.z["lr"]})),
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


class Interrupted:
    """Batches whose `stop`-th access raises, or does something else; counts accesses."""

    def __init__(self, batches: list[Any], stop: int, act: Any):
        self.batches, self.stop, self.act, self.count = batches, stop, act, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, t: int) -> Any:
        self.count += 1
        if self.count == self.stop:
            self.act()
        return self.batches[t]


def _interrupt() -> None:
    raise KeyboardInterrupt


def resumed(group: Any, folder: Path) -> dict[str, Any]:
    """Interrupted twice on one rank, once in each sweep; then with another number of processes; then to the end."""
    planning.CHECKPOINT_EVERY = 2
    base = mlp().to(torch.float32)
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    ends = []
    # The digests that a run begins with read every batch once, and one of them again.
    for stop in (len(base) + 5, len(base) + 9):
        batches = Interrupted(base.batches, stop if last else -1, _interrupt)
        f = base.but(batches=batches).function(process_group=group)
        try:
            f.metagradient(base.z, resume=folder / "run")
            ends.append("finished")
        except KeyboardInterrupt:
            ends.append("interrupted")
        except errors.RankFailed as error:
            ends.append(str(error))
    alone = told(lambda: base.function().metagradient(base.z, resume=folder / "run"))
    batches = Interrupted(base.batches, -1, _interrupt)
    f = base.but(batches=batches).function(process_group=group)
    found = outcome(f.metagradient(base.z, resume=folder / "run"))
    left = sorted(path.name for path in (folder / "run").iterdir()) if last else []
    return found | {"ends": ends, "alone": alone, "accesses": batches.count, "left": left}


def stalled(group: Any) -> tuple[str, str, float]:
    """Rank 1 does not come back in time."""
    short = dist.new_group(timeout=timedelta(seconds=STALL))
    rank, case = dist.get_rank(group), mlp().to(torch.float32)
    batches = Interrupted(case.batches, 3 if rank == 1 else -1, lambda: time.sleep(3 * STALL))
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
        begin = time.monotonic()
        found[name] = check(name, group, folder / name.replace(" ", "-"))
        found[f"seconds of {name}"] = time.monotonic() - begin
        torch.save(found, folder / f"{rank}.part")
        (folder / f"{rank}.part").rename(folder / f"{rank}.pt")
    with contextlib.suppress(Exception):
        dist.barrier()


def check(name: str, group: Any, folder: Path) -> Any:
    if name in TRAININGS:
        return bits(name, group)
    function = globals()[name]
    if name in ("on_disk", "refusals", "resumed", "died"):
        folder.mkdir(exist_ok=True)
        return function(group, folder)
    return function(group)
