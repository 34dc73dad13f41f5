"""A resumable metagradient on several processes, of which one is killed at a chosen moment."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1] / "mgd" / "ranks"))
from interruptions import die_at
from rank_trainings import mlp, outcome

from mgd.errors import MetagradientError
from mgd.plan import training as planning
from mgd.ranks import processes
from mgd_kernels import _core

SECONDS = 60  # for one run, which takes two
Moment = tuple[int, str, int]  # the rank that is killed; before a "step" or a "change" of its disk; which of them


def metagradient(group: Any = None, directory: Path | None = None) -> dict[str, Any]:
    planning.CHECKPOINT_EVERY, processes.GRACE = 2, 0.5
    case = mlp().to(torch.float32)
    return outcome(case.function(process_group=group).metagradient(case.z, resume=directory))


def rank_of(rank: int, size: int, folder: Path, directory: Path, moment: Moment | None) -> None:
    """One of the processes: it leaves what it found in `folder`, or the text of its error."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place, wait = f"file://{folder}/rendezvous", timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size, timeout=wait)
    if moment is not None and moment[0] == rank:
        _arm(*moment[1:])
    try:
        torch.save(metagradient(dist.group.WORLD, directory), folder / f"{rank}.pt")
    except MetagradientError as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def _arm(kind: str, left: int) -> None:
    """Kill this process before its `left`-th evaluation of a step, or call that changes the disk."""
    if kind == "change":
        _core.store_inject("killed", left)
        return
    die_at(left)


def run(size: int, folder: Path, directory: Path, moment: Moment | None = None) -> list[int | None]:
    """How the processes of one run ended, by rank: exit codes, None for one that had to be ended here."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mgd", "torch.distributed"])
    ranks = [context.Process(target=rank_of, args=(r, size, folder, directory, moment)) for r in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes


def left_running() -> list[int]:
    """Processes that the server of forks has, beyond those that were joined."""
    server = forkserver._forkserver._forkserver_pid
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = path.read_text().rsplit(")", 1)
        except OSError:
            continue  # it ended meanwhile
        if rest.split()[0] != "Z":
            parents[int(name.split()[0])] = int(rest.split()[1])
    return [pid for pid, parent in parents.items() if parent == server]


def shared_memory() -> set[str]:
    """Segments of shared memory that no process has mapped."""
    names, mapped = {str(path) for path in Path("/dev/shm").iterdir()}, ""
    for path in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped += path.read_text()
        except OSError:
            continue
    return {name for name in names if name not in mapped}
