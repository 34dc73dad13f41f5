"""Where a sweep keeps what it needs to go back: opened before the sweep is made, from its plan."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mgd.errors import StoreIOError
from mgd.plan.plan import Plan
from mgd.plan.training import SHARE, PlanRequest, staging
from mgd.ranks.shards import Shards
from mgd.sweep.history import History
from mgd.sweep.residuals import ResidualCache
from mgd.util.files import path_of
from mgd_kernels import Arena
from mgd_kernels.arena import Stretch

if TYPE_CHECKING:
    from mgd.sweep.checkpoint import RunCheckpoint


@dataclass
class Storage:
    """plan: what is kept where; None: nothing is kept, there is no way back. stats: what the store did, at the end."""

    plan: Plan | None
    history: History
    residuals: ResidualCache
    checkpoint: RunCheckpoint | None = None
    stats: dict[str, Any] | None = None

    def finish(self) -> None:
        """The result is complete: delete everything."""
        with self.history.closed_after_errors():
            if self.checkpoint is not None:
                self.checkpoint.finish()
            self.stats = self.history.stats()
        self.residuals.clear()
        self.history.close()
        if self.checkpoint is not None:
            self.checkpoint.remove()

    @contextlib.contextmanager
    def closed_after_errors(self) -> Iterator[None]:
        """Lets go of everything when the block fails."""
        try:
            with self.history.closed_after_errors():
                yield
        except BaseException:
            self.residuals.clear()
            raise


@dataclass(frozen=True)
class Resume:
    """A run that outlives the process. identity: what its result depends on, name -> digest. reversible: with what a
    way back needs."""

    directory: str | os.PathLike[str]
    identity: Mapping[str, str]
    reversible: bool = True


def no_storage(request: PlanRequest, room: int = 0) -> Storage:
    """For a training without a way back, or one that keeps what that needs. room: bytes for residuals."""
    return Storage(None, History(dict(request.buffers), request.microbatches), ResidualCache(room))


def open_storage(request: PlanRequest, shards: Shards, resume: Resume | None = None) -> Storage:
    """An empty storage with the tiers of the training's plan, or that of an earlier process in `resume.directory`.

    The plan is that of rank 0, and each rank has its part of all that it names.
    """
    ranks, layout = shards.ranks, shards.layout
    if resume is None:
        plan = ranks.first(request.plan)
        return _fresh(request, plan if ranks.rank == 0 else replace(plan, directory=request.budget.directory), layout)
    from mgd.sweep.resharding import open_run

    directory, sizes = os.fspath(path_of(resume.directory)), request.sizes(through_store=True)
    settings = {"disk": _disk_limit(directory, request.budget.limits()), "processes": ranks.size}
    checkpoint = open_run(directory, staging({}, sizes), resume.identity, settings, shards)
    history = History(dict(request.buffers), request.microbatches, layout=layout, store=checkpoint.store, durable=True)
    with history.closed_after_errors():
        began = replace(request, arena=shards.longest(checkpoint.settings["processes"]))  # with the plan of then
        disk = checkpoint.settings["disk"]
        kept = ranks.first(lambda: began.resumable_plan(directory, disk)) if resume.reversible else None
        checkpoint.begin()
        history.adopt(checkpoint.shared_entries())
        return Storage(kept, history, ResidualCache(), checkpoint)


def _fresh(request: PlanRequest, plan: Plan, layout: Arena | Stretch) -> Storage:
    on_device = request.arena.device.type != "cpu"
    used = {tier for tier, peak in plan.peak.items() if peak}
    store = None
    if "disk" in used or (on_device and "host" in used):
        from mgd_kernels.store import Store

        buffers = staging(request.budget.limits(), request.sizes())
        host = buffers + (plan.limits.get("host", 0) if on_device else 0)
        disk = (plan.directory or "", plan.limits["disk"]) if "disk" in used else None
        store = Store(host=host, disk=disk, staging=buffers if disk else None)
    own_memory = ("device",) if on_device else ("device", "host")
    history = History(dict(request.buffers), request.microbatches, layout=layout, store=store, in_memory=own_memory)
    return Storage(plan, history, residual_cache(plan))


def residual_cache(plan: Plan) -> ResidualCache:
    """For residuals in the training's own memory, as far as the plan leaves it free: as it chose, once it knew them."""
    tier = plan.sizes.memory
    return ResidualCache(max(0, plan.limits.get(tier, 0) - plan.peak.get(tier, 0)), plan.T)


def _disk_limit(directory: str, limits: Mapping[str, int]) -> int:
    """Bytes of disk that a resumable run may take: those of the budget, else a share of what is free."""
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
        return limits.get("disk") or int(SHARE * shutil.disk_usage(directory).free)
    except OSError as error:
        raise StoreIOError(error.errno or 0, directory, "cannot make the directory") from error
