"""From a memory budget to a plan, and from a plan to the tape that carries it out."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mgd.errors import BudgetTooSmall, StoreIOError
from mgd.plan.budget import Budget, Costs, Sizes
from mgd.plan.plan import Plan, plan
from mgd.step.model import Buffers
from mgd.sweep.checkpoint import CHECKPOINT_EVERY, MAX_PENDING_DELETES
from mgd.sweep.history import History
from mgd.sweep.residuals import ResidualCache
from mgd.util.system import free_memory
from mgd_kernels import Arena, Optimizer
from mgd_kernels.store import CHUNK, PAGE

if TYPE_CHECKING:
    from mgd.sweep.sweep import Timings
    from mgd_kernels.store import Store

SHARE = 0.5  # of the free memory, where no budget is given
STAGING = 32 << 20  # bytes, the least transfer buffers of a disk tier; from the budget's host part where it has room
STEP_IN_UPDATES = 50  # a training step in elementwise updates, where nothing was measured: batch and depth matter
PENDING_SNAPSHOTS = (
    2 * MAX_PENDING_DELETES
)  # bytes of disk for checkpoints, the trained state, and snapshots dropped since the last
MEMORY_BANDWIDTH = 1e10  # bytes a second, of one processor thread; where nothing was measured
FRESH_MEMORY = dict.fromkeys(("device", "host"), 2.8e9)  # bytes a second that copies into new memory of a CPU take
COPY_BANDWIDTH = 5e9  # bytes a second, of a copy to or from the store's buffers, with its checksum
KEY = 64  # bytes, more than any key of a tape
ENOUGH = 1 << 20  # bytes, from which on a transfer's bandwidth is worth remembering


def sizes(
    arena: Arena, optimizer: Optimizer, buffers: Buffers, microbatches: int, budget: Budget, resume: bool = False
) -> Sizes:
    """Bytes of a snapshot and of a log entry: the gradient, and the buffers as each microbatch finds and leaves them.

    Buffers are counted as if each evaluation replaced all of them; those that none replaces are kept once. Where
    entries may pass through the store, they are as large as their files (docs/format.md).
    """
    history = [b.numel() * b.element_size() for b in buffers.values()]
    ranks = [b.ndim for b in buffers.values()]
    state, times = 1 + len(optimizer.slots), 1 + microbatches
    snapshot = [arena.numel * arena.dtype.itemsize] * state + history
    gradient = [arena.numel * arena.gradient_dtype.itemsize] + history * times
    if resume or budget.disk is not None or arena.device.type != "cpu":
        return Sizes(
            snapshot=_file_bytes(snapshot, [1] * state + ranks),
            gradient=_file_bytes([*gradient, 8 * microbatches], [1, *ranks * times, 1]),
        )
    return Sizes(snapshot=sum(snapshot), gradient=sum(gradient))


def _file_bytes(tensors: Sequence[int], ranks: Sequence[int]) -> int:
    """Bytes of an entry's file at most, from the bytes and ranks of its tensors."""
    payload = _round_up(sum(_round_up(size, 64) for size in tensors), PAGE)
    header = 64 + KEY + sum(24 + 8 * rank for rank in ranks) + 8 * -(-payload // CHUNK)
    return _round_up(header, PAGE) + payload


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def choose(
    steps: int,
    size: Sizes,
    budget: Budget,
    costs: Costs | None,
    schedule: str,
    device: torch.device,
    reserve: int = 0,
) -> Plan:
    """The plan of a training under a budget. reserve: bytes of its disk part that are for something else.

    Raises BudgetTooSmall, which names for each part of the budget the least that would work, before anything runs.
    """
    on_device = device.type != "cpu"
    if costs is None:
        update = size.snapshot * 2 / (MEMORY_BANDWIDTH if not on_device else 100 * MEMORY_BANDWIDTH)
        costs = Costs(step=STEP_IN_UPDATES * update, update=update, **_transfers(on_device))
    limits = budget.limits(int(SHARE * free_host_memory()))
    if budget == Budget() and on_device:
        limits = {"device": int(SHARE * torch.cuda.mem_get_info(device)[0]), **limits}

    def within(limits: dict[str, int], schedule: str = schedule) -> Plan:
        parts = dict(limits)
        if "disk" in parts:
            parts["disk"] -= reserve
            parts["host"] = parts.get("host", 0) - staging(limits, size)
        parts = {tier: max(0, room) for tier, room in parts.items()}
        disk = (budget.directory or "", parts.pop("disk")) if "disk" in parts else None
        return plan(steps, size, Budget(**parts, disk=disk), costs, schedule=schedule)

    try:
        return within(limits)
    except BudgetTooSmall as refusal:
        # The search for the quickest plan takes long, and what it finds needs no less than revolve.
        feasible = functools.partial(within, schedule="revolve" if schedule == "auto" else schedule)

        def least(tier: str) -> int:
            return _least(lambda room: feasible(limits | {tier: room}))

        needs = {tier: least(tier) for tier in limits}
        raise BudgetTooSmall(needs, limits, refusal.advice) from None


def _least(attempt: Callable[[int], object]) -> int:
    """The least number of bytes with which the attempt does not raise BudgetTooSmall."""

    def works(room: int) -> bool:
        try:
            attempt(room)
        except BudgetTooSmall:
            return False
        return True

    high = 1
    while not works(high):
        high *= 2
    low = high // 2  # too little
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


def _transfers(on_device: bool, write: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What runs beside the computation, and what of it the processor does itself. write: as measured."""
    if on_device:
        return {"overlap": ("host", "disk"), "write": write or {}}
    return {"overlap": ("disk",), "copy": COPY_BANDWIDTH, "write": {**FRESH_MEMORY, **(write or {})}}


def measured_costs(measured: Timings, store: dict[str, Any] | None, device: torch.device) -> Costs | None:
    """What a metagradient's work cost, for the plan of the next one; None where a part of it was never done."""
    mean, rebuilt = measured.mean, measured.counts["rebuilt steps"]
    step, hvp = mean("training") + mean("update"), mean("optimizer vjp") + mean("hvp")
    if not step or not hvp:
        return None
    rates = {way: store[way] for way in ("write", "read") if store and store[way]["bytes"] >= ENOUGH}
    write, read = ({"disk": rates[way]["bandwidth"]} if way in rates else {} for way in ("write", "read"))
    return Costs(
        step=step,
        hvp=hvp,
        update=measured.seconds["rebuild"] / rebuilt if rebuilt else mean("update"),
        read=read,
        **_transfers(device.type != "cpu", write),
    )


def staging(limits: dict[str, int], size: Sizes) -> int:
    """Bytes of the buffers between memory and disk: room to write one entry behind and read two ahead."""
    wanted = 3 * max(size.gradient, STAGING // 3)
    return max(STAGING, min(wanted, limits.get("host", 0) // 2))


def tape(chosen: Plan, size: Sizes, budget: Budget, constants: Buffers, arena: Arena, microbatches: int) -> History:
    """An empty tape with the tiers that the plan uses."""
    on_device = arena.device.type != "cpu"
    used = {tier for tier, peak in chosen.peak.items() if peak}
    store = None
    if "disk" in used or (on_device and "host" in used):
        from mgd_kernels.store import Store

        buffers = staging(budget.limits(), size)
        host = buffers + (chosen.limits.get("host", 0) if on_device else 0)
        disk = (chosen.directory or "", chosen.limits["disk"]) if "disk" in used else None
        store = Store(host=host, disk=disk, staging=buffers if disk else None)
    return History(store, constants, functools.partial(arena.zeros, arena.gradient_dtype), microbatches, on_device)


def shelf(chosen: Plan, device: torch.device) -> ResidualCache:
    """For what joint graphs keep (see `mgd.autodiff.joint`), in the training's own memory as far as the plan leaves it free."""
    tier = "host" if device.type == "cpu" else "device"
    limit = chosen.limits.get(tier, 0)
    return ResidualCache(max(0, limit - chosen.peak.get(tier, 0)), limit if device.type == "cpu" else None)


def resume_limit(directory: str | os.PathLike[str], budget: Budget) -> int:
    """Bytes of disk that a resumable run may take: those of the budget, else a share of what is free."""
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise StoreIOError(error.errno or 0, os.fspath(directory), "cannot make the directory") from error
    return budget.limits().get("disk") or int(SHARE * shutil.disk_usage(directory).free)


def resumable(
    steps: int, size: Sizes, directory: str | os.PathLike[str], disk: int, schedule: str, device: torch.device
) -> Plan:
    """The plan of a run that keeps everything on disk, with room for what is deleted late.

    Costs are never the measured ones: a run that continues must come to the plan of the one that began.
    """
    late = CHECKPOINT_EVERY * size.gradient + PENDING_SNAPSHOTS * size.snapshot
    return choose(steps, size, Budget(disk=(directory, disk)), None, schedule, device, late)


def resumable_tape(store: Store, constants: Buffers, arena: Arena, microbatches: int) -> History:
    """A tape all of whose entries are in `store` and outlive the process."""
    return History(
        store, constants, functools.partial(arena.zeros, arena.gradient_dtype), microbatches, persistent=True
    )


def free_host_memory() -> int:
    """Bytes of memory that this process may still take."""
    free = free_memory()
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if free is None else free
