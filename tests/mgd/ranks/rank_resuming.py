"""Runs on several processes that are interrupted and continued, also by another number of them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cases
import torch
import torch.distributed as dist
from rank_trainings import TRAININGS, Interrupted, interrupt, mlp, outcome, told

import mgd
from mgd import errors
from mgd.plan import training as planning
from mgd.sweep.checkpoint import RunCheckpoint
from mgd.sweep.resharding import OtherRun
from mgd_kernels import Store


def resumed(group: Any, folder: Path) -> dict[str, Any]:
    """Interrupted twice on one rank, once in each sweep; then to the end."""
    planning.CHECKPOINT_EVERY = 2
    base = mlp().to(torch.float32)
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    ends = []
    # The digests that a run begins with read every batch once, and one of them again.
    for stop in (len(base) + 5, len(base) + 9):
        batches = Interrupted(base.batches, stop if last else -1, interrupt)
        f = base.but(batches=batches).function(process_group=group)
        try:
            f.metagradient(base.z, resume=folder / "run")
            ends.append("finished")
        except KeyboardInterrupt:
            ends.append("interrupted")
        except errors.RankFailed as error:
            ends.append(str(error))
    batches = Interrupted(base.batches, -1, interrupt)
    f = base.but(batches=batches).function(process_group=group)
    found = outcome(f.metagradient(base.z, resume=folder / "run"))
    left = sorted(path.name for path in (folder / "run").iterdir()) if last else []
    return found | {"ends": ends, "accesses": batches.count, "left": left}


CHAINS = (1, 2, 4, 2, 1), (4, 2, 1, 2, 4)  # numbers of processes
# Batches that each reads until it is interrupted, beyond those of digests: in the training, then in the reverse sweep.
MOMENTS = (4, 4, 6, 4, None)
REACHED = [(2, 0), (4, 0), (6, 2), (6, 4)]  # by the last checkpoints: steps of either sweep
RESHARDED = [
    ("mlp", 0),
    ("mlp", 1),
    ("matrices", 1),
    ("convnet", 0),
    ("mlp, from snapshots", 0),
]


def resharded(group: Any, folder: Path) -> dict[str, Any]:
    """Interrupted again and again, and continued each time by another number of processes."""
    planning.CHECKPOINT_EVERY = 2
    groups = {1: None, 2: dist.new_group([0, 1]), 4: group}
    small = mgd.Budget(disk=(folder, "700kB"))
    trainings = TRAININGS | {"mlp, from snapshots": lambda: mlp(schedule="revolve", budget=small).to(torch.float32)}
    return {
        (name, chain): _resharded(trainings[name](), groups, CHAINS[chain], folder / f"{name} {chain}")
        for name, chain in RESHARDED
    }


def _resharded(case: cases.Case, groups: dict[int, Any], chain: tuple[int, ...], folder: Path) -> dict[str, Any]:
    ends = []
    for size, moment in zip(chain, MOMENTS, strict=True):
        if dist.get_rank() < size:
            stop = -1 if moment is None else len(case) + 1 + moment
            batches = Interrupted(case.batches, stop if dist.get_rank() == size - 1 else -1, interrupt)
            f = case.but(batches=batches).function(process_group=groups[size])
            try:
                found = outcome(f.metagradient(case.z, resume=folder))
            except (KeyboardInterrupt, errors.RankFailed):
                shares = sorted(path for path in folder.iterdir() if path.is_dir()) or [folder]
                if dist.get_rank() == 0:
                    ends.append((len(shares), *_reached(shares[0])))
        dist.barrier()
    return {"outcome": found, "ends": ends} if dist.get_rank() == 0 else {}


def trains(group: Any, folder: Path) -> dict[str, Any]:
    """A training that is interrupted, and continued by another number of processes."""
    planning.CHECKPOINT_EVERY = 2
    case, size = mlp().to(torch.float32), dist.get_world_size(group)
    groups, accesses = {1: None, 2: dist.new_group([0, 1]), 4: group}, []
    for chain in ((1, size, 1), (size, 1, size)):
        for processes, moment in zip(chain, (4, 4, None), strict=True):
            if dist.get_rank() < processes:
                stop = -1 if moment is None else len(case) + 1 + moment
                batches = Interrupted(case.batches, stop if dist.get_rank() == processes - 1 else -1, interrupt)
                f = case.but(batches=batches).function(process_group=groups[processes])
                with contextlib.suppress(KeyboardInterrupt, errors.RankFailed):
                    found = f.train(case.z, resume=folder / str(chain))
            dist.barrier()
        accesses.append(batches.count)
    left = sorted(path.name for path in (folder / str(chain)).iterdir())
    return {"train": found.model_state, "accesses": accesses, "left": left}


def _reached(directory: Path) -> tuple[int, int]:
    """The steps that each sweep had behind it at the last checkpoint."""
    with Store.open(directory) as store:
        kept = [store.get(key)[0] for key in store.keys() if str(key).startswith("checkpoint")]
    values = [json.loads(bytes(header.tolist()))["values"] for header in kept]
    last = max(values, key=lambda value: value["number"])
    return last["visited"], last["reversed"]


def halfway(group: Any, folder: Path) -> dict[str, Any]:
    """A process ends in the middle of taking over what another number of them kept, in several ways."""
    planning.CHECKPOINT_EVERY = 2
    case, rank = mlp().to(torch.float32), dist.get_rank()
    groups, found = {1: None, 2: dist.new_group([0, 1]), 4: group}, {}

    def call(size: int, batches: Any = None) -> Any:
        """What comes of a call by so many processes."""
        with contextlib.suppress(KeyboardInterrupt, errors.RankFailed):
            if rank < size:
                f = case.but(batches=batches or case.batches).function(process_group=groups[size])
                return f.metagradient(case.z, resume=folder)
        return None

    def moved(source: str, target: str) -> None:
        dist.barrier()
        if rank == 0:
            (folder / source).rename(folder / target)
        dist.barrier()

    call(2, Interrupted(case.batches, len(case) + 5 if rank == 1 else -1, interrupt))
    moved("rank 1 of 2", "elsewhere")
    found["missing"] = told(lambda: call(4))
    moved("elsewhere", "rank 1 of 2")
    moments = (4, 3, RunCheckpoint, "commit"), (2, 1, OtherRun, "discard"), (4, 0, OtherRun, "discard")
    for size, last, kind, method in moments:
        ends = patch.object(kind, method, side_effect=KeyboardInterrupt)
        with ends if rank == last else contextlib.nullcontext():
            assert call(size) is None
        dist.barrier()
        found[f"{size} {method}"] = sorted(path.name for path in folder.iterdir()) if rank == 0 else []
        dist.barrier()
    batches = Interrupted(case.batches, -1, interrupt)
    result = call(1, batches)
    dist.barrier()
    left = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    return found | {"outcome": result and outcome(result), "accesses": batches.count, "left": left}
