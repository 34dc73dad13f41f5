"""From a memory budget to a plan, and from a plan to the tape that carries it out."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgd.budget import Budget, Costs, Sizes
from mgd.journal import REDO
from mgd.model import Buffers
from mgd.planner import Plan, plan
from mgd.tape import Tape
from mgd_kernels import Arena, Optimizer

if TYPE_CHECKING:
    from mgd_kernels.store import Store

SHARE = 0.5  # of the free memory, where no budget is given
STAGING = (
    32 << 20
)  # bytes, the least transfer buffers of a disk tier; taken from the budget's host part where it has room
STEP_IN_UPDATES = (
    50  # a training step in elementwise updates, where nothing was measured: batch and depth make it large
)
LATE_SNAPSHOTS = 16  # checkpoints, the trained state, and snapshots dropped since the last checkpoint
MEMORY_BANDWIDTH = 1e10  # bytes a second, of one processor thread; where nothing was measured


def sizes(arena: Arena, optimizer: Optimizer, buffers: Buffers, microbatches: int) -> Sizes:
    """Bytes of a snapshot and of a log entry: the gradient, and the buffers as each microbatch finds and leaves them.

    Buffers are counted as if each evaluation replaced all of them; those that none replaces are kept once.
    """
    moving = sum(b.numel() * b.element_size() for b in buffers.values())
    flat = arena.numel * arena.dtype.itemsize
    return Sizes(
        snapshot=flat * (1 + len(optimizer.slots)) + moving,
        gradient=arena.numel * arena.gradient_dtype.itemsize + (1 + microbatches) * moving,
    )


def choose(steps: int, size: Sizes, budget: Budget, costs: Costs | None, schedule: str, device: torch.device) -> Plan:
    """The plan of a training under a budget. Raises BudgetTooSmall before anything runs."""
    on_device = device.type != "cpu"
    if costs is None:
        update = size.snapshot * 2 / (MEMORY_BANDWIDTH if not on_device else 100 * MEMORY_BANDWIDTH)
        costs = Costs(
            step=STEP_IN_UPDATES * update, update=update, overlap=("host", "disk") if on_device else ("disk",)
        )
    limits = budget.limits(int(SHARE * free_host_memory()))
    if budget == Budget() and on_device:
        limits = {"device": int(SHARE * torch.cuda.mem_get_info(device)[0]), **limits}
    if "disk" in limits:
        limits["host"] = limits.get("host", 0) - staging(limits, size)
    parts = {tier: max(0, limits[tier]) for tier in ("device", "host") if tier in limits}
    disk = (budget.directory, limits["disk"]) if "disk" in limits else None
    return plan(steps, size, Budget(**parts, disk=disk), costs, schedule=schedule)


def staging(limits: dict[str, int], size: Sizes) -> int:
    """Bytes of the buffers between memory and disk: room to write one entry behind and read two ahead."""
    wanted = 3 * max(size.gradient, STAGING // 3)
    return max(STAGING, min(wanted, limits.get("host", 0) // 2))


def tape(chosen: Plan, size: Sizes, budget: Budget, constants: Buffers, arena: Arena, microbatches: int) -> Tape:
    """An empty tape with the tiers that the plan uses."""
    on_device = arena.device.type != "cpu"
    used = {tier for tier, peak in chosen.peak.items() if peak}
    store = None
    if "disk" in used or (on_device and "host" in used):
        from mgd_kernels.store import Store

        buffers = staging(budget.limits(), size)
        host = buffers + (chosen.limits.get("host", 0) if on_device else 0)
        disk = (chosen.directory, chosen.limits["disk"]) if "disk" in used else None
        store = Store(host=host, disk=disk, staging=buffers if disk else None)
    return Tape(store, constants, _scratch(arena, store), microbatches, on_device)


def resume_limit(directory: str | os.PathLike[str], budget: Budget) -> int:
    """Bytes of disk that a resumable run may take: those of the budget, else a share of what is free."""
    os.makedirs(directory, exist_ok=True)
    return budget.limits().get("disk") or int(SHARE * shutil.disk_usage(directory).free)


def resumable(
    store: Store,
    steps: int,
    size: Sizes,
    directory: str | os.PathLike[str],
    disk: int,
    schedule: str,
    constants: Buffers,
    arena: Arena,
    microbatches: int,
) -> tuple[Plan, Tape]:
    """The plan and the tape of a run that keeps everything on disk, with room for what is deleted late."""
    late = REDO * size.gradient + LATE_SNAPSHOTS * size.snapshot
    chosen = choose(steps, size, Budget(disk=(directory, max(0, disk - late))), None, schedule, arena.device)
    return chosen, Tape(store, constants, _scratch(arena, store), microbatches, persistent=True)


def _scratch(arena: Arena, store: Store | None) -> Tensor:
    return torch.empty(0) if store is None else arena.zeros(arena.gradient_dtype)


def free_host_memory() -> int:
    """Bytes that the system says are available."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
