"""The plan of a training: how large its states and gradients are, how much room they may take, and assumed costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mgd.errors import BudgetTooSmall
from mgd.plan.budget import Budget, Costs, Sizes
from mgd.plan.plan import Plan, plan
from mgd.util.devices import set_aside
from mgd.util.system import free_memory
from mgd_kernels import Arena, Optimizer
from mgd_kernels.arena import Stretch
from mgd_kernels.store import CHUNK, PAGE

SHARE = 0.5  # of the free memory, if no budget is given
STAGING = 32 << 20  # bytes, the least transfer buffers of a disk tier; taken from the budget's host part if it has room
STEP_IN_UPDATES = 50  # a training step in elementwise updates, if nothing was measured; depends on batch and depth
CHECKPOINT_EVERY = 50  # steps of either sweep: a resumed run repeats at most this many
MAX_PENDING_DELETES = 8  # snapshots that may wait for the next checkpoint before they are deleted
# On disk, beside the plan's own objects: checkpoints, the trained state, and snapshots that wait to be deleted.
PENDING_SNAPSHOTS = 2 * MAX_PENDING_DELETES
MEMORY_BANDWIDTH = 1e10  # bytes per second of one processor thread, if nothing was measured
FRESH_MEMORY = dict.fromkeys(("device", "host"), 2.8e9)  # bytes per second of copies into newly allocated CPU memory
COPY_BANDWIDTH = 5e9  # bytes per second of a copy to or from the store's buffers, with its checksum
# Bytes per second between an accelerator and pinned memory of the host, half of what PCIe 4 x16 promises. The next step
# waits for what is read. What is written goes beside the computation, and counts as if it did not.
DEVICE_COPY = 1.6e10
DEVICE_CHECKED = 4e9  # the same through the buffers of the disk, with the checksum of what is read
ACTIVATIONS = 4  # second derivatives, in what a captured step keeps for them
# What a sweep on an accelerator holds beside its plan, with one objective: state, its copy, adjoint; gradients, some of
# which are on their way to the store, or were read to advance over them at once.
STATES, GRADIENTS = 3, 7
KEY = 64  # bytes, more than any key of a history


@dataclass(frozen=True)
class PlanRequest:
    """What the plan of a training depends on.

    steps: T. arena: what flat buffers are. buffers: those of the model. costs, residuals: as an earlier metagradient
    measured them, the latter in bytes of what a captured step can keep; None and 0 if there was none. stop_at: the
    first step that is differentiated. memory: bytes of the system's memory that are free for this process.
    """

    steps: int
    arena: Arena | Stretch
    optimizer: Optimizer
    buffers: Mapping[str, Tensor]
    microbatches: int
    budget: Budget
    costs: Costs | None
    schedule: str
    residuals: int = 0
    stop_at: int = 0
    memory: int | None = None

    def sizes(self, through_store: bool = False) -> Sizes:
        """Bytes of a snapshot and of a log entry: the gradient, and the buffers before and after the step.

        Buffers are counted as if each step replaced all of them; a buffer that none replaces is stored only once.
        Entries that may pass through the store are as large as their files (docs/format.md).
        """
        arena, residuals, memory = self.arena, self.residuals, own_memory(self.arena.device)
        history = [b.numel() * b.element_size() for b in self.buffers.values()]
        ranks = [b.ndim for b in self.buffers.values()]
        state, times = 1 + len(self.optimizer.slots), 2
        snapshot = [arena.numel * arena.dtype.itemsize] * state + history
        gradient = [arena.numel * arena.gradient_dtype.itemsize] + history * times
        if through_store or self.budget.disk is not None or arena.device.type != "cpu":
            return Sizes(
                snapshot=_file_bytes(snapshot, [1] * state + ranks),
                gradient=_file_bytes([*gradient, 8 * self.microbatches], [1, *ranks * times, 1]),
                residuals=residuals,
                memory=memory,
            )
        return Sizes(snapshot=sum(snapshot), gradient=sum(gradient), residuals=residuals, memory=memory)

    def plan(self) -> Plan:
        """The plan within the budget.

        Raises BudgetTooSmall before anything runs; it names the least that would work for each part of the budget.
        """
        how = self.costs, self.schedule, self.arena.device
        return choose(self.steps, self.sizes(), self.budget, *how, memory=self.memory, stop_at=self.stop_at)

    def resumable_plan(self, directory: str, disk: int) -> Plan:
        """The plan of a run that keeps everything in `directory`, with room for objects whose deletion is deferred.

        Uses no measured costs, because a resumed run must get the same plan as the run that began.
        """
        sizes = replace(self.sizes(through_store=True), residuals=0)
        late = CHECKPOINT_EVERY * sizes.gradient + PENDING_SNAPSHOTS * sizes.snapshot
        how = None, self.schedule, self.arena.device, late
        return choose(self.steps, sizes, Budget(disk=(directory, disk)), *how, stop_at=self.stop_at)


def own_memory(device: torch.device) -> str:
    """The tier that is the training's own memory, where residuals can be."""
    return "host" if device.type == "cpu" else "device"


def _file_bytes(tensors: Sequence[int], ranks: Sequence[int]) -> int:
    """An upper bound on the bytes of an entry's file, from the bytes and ranks of its tensors."""
    payload = _round_up(sum(_round_up(size, 64) for size in tensors), PAGE)
    header = 80 + KEY + sum(24 + 8 * rank for rank in ranks) + 8 * -(-payload // CHUNK)
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
    memory: int | None = None,
    stop_at: int = 0,
) -> Plan:
    """The plan of a training under a budget. reserve: bytes of the budget's disk part to leave for other use. memory:
    free bytes of the system's; None: look. stop_at: the first step to be reversed."""
    on_device = device.type != "cpu"
    if costs is None:
        update = size.snapshot * 2 / (MEMORY_BANDWIDTH if not on_device else 100 * MEMORY_BANDWIDTH)
        costs = Costs(step=STEP_IN_UPDATES * update, update=update, **transfers(on_device))
    limits = budget.limits(int(SHARE * (free_memory() if memory is None else memory)))
    if budget == Budget() and on_device:
        limits = {"device": device_room(device, size), **limits}

    def within(limits: dict[str, int], schedule: str = schedule) -> Plan:
        parts = dict(limits)
        if "disk" in parts:
            parts["disk"] -= reserve
            parts["host"] = parts.get("host", 0) - staging(limits, size)
        parts = {tier: max(0, room) for tier, room in parts.items()}
        disk = (budget.directory or "", parts.pop("disk")) if "disk" in parts else None
        return plan(steps, size, Budget(**parts, disk=disk), costs, schedule=schedule, stop_at=stop_at)

    try:
        return within(limits)
    except BudgetTooSmall as refusal:
        # The search for the fastest plan takes long, and no plan needs less than revolve.
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
    low = high // 2  # is too little
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


def transfers(on_device: bool, write: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Arguments of `Costs` for transfers: which run beside the computation, and what the processor copies itself, or
    waits for.

    write: measured bytes per second by tier.
    """
    if on_device:
        rate = {"host": DEVICE_COPY}
        return {"overlap": ("disk",), "copy": DEVICE_CHECKED, "write": {**rate, **(write or {})}, "read": rate}
    return {"overlap": ("disk",), "copy": COPY_BANDWIDTH, "write": {**FRESH_MEMORY, **(write or {})}}


def device_room(device: torch.device, size: Sizes) -> int:
    """Bytes of an accelerator for a plan, if no budget is given: a share of what neither a tensor nor the sweep itself
    takes, and so much less that the second derivatives of a step fit beside it, as far as they are known.

    What torch's allocator holds and no tensor has is free, although the driver does not say so, but for what is set
    aside.
    """
    module = torch.get_device_module(device)
    cached = module.memory_reserved(device) - module.memory_allocated(device) - set_aside[device]
    free = module.mem_get_info(device)[0] + cached - STATES * size.snapshot - GRADIENTS * size.gradient
    return max(0, min(int(SHARE * free), free - ACTIVATIONS * size.residuals))


def staging(limits: Mapping[str, int], size: Sizes) -> int:
    """Bytes of the buffers between memory and disk: enough to write one entry and prefetch two, if there is room."""
    enough = 3 * max(size.gradient, STAGING // 3)
    return max(STAGING, min(enough, limits.get("host", 0) // 2))
