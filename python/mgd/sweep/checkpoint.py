"""Resuming an interrupted metagradient: log and snapshots on disk, and from time to time the sweep's own place.

Between two checkpoints nothing that the first of them needs is deleted, so that a run that ends at any moment, by
`kill -9` too, continues at the last checkpoint and comes to the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mgd.errors import CorruptState, StaleRun
from mgd.sweep.history import damage_explained

if TYPE_CHECKING:
    from mgd.sweep.sweep import Sweep

CHECKPOINT_EVERY = 50  # steps of either sweep that are done again at most
MAX_PENDING_DELETES = 8  # snapshots that may wait for the next checkpoint to be deleted


class RunCheckpoint:
    """The record of one metagradient in a directory.

    identity: what the result depends on, name -> digest; a directory that holds another run is refused.
    settings: chosen when the run began, and kept by the runs that continue it.
    """

    def __init__(self, directory: str | os.PathLike[str], staging: int, identity: Mapping[str, str], settings: Any):
        from mgd_kernels.store import Store

        self.store = Store.open(directory, host=staging, durable=True)
        self.settings, self._identity, self._since = settings, dict(identity), 0
        try:
            self.began = "run" in self.store
            if self.began:
                with damage_explained():
                    header = _decode(self.store.get("run"))
                differing = sorted(k for k in identity if header["identity"].get(k) != identity[k])
                if differing:
                    raise StaleRun(str(directory), differing)
                self.settings = header["settings"]
        except BaseException:
            self.store.close()
            raise

    def begin(self) -> None:
        """Make the directory that of this run, unless it is already."""
        if not self.began:
            self._clear()
            self.store.put("run", _encode({"identity": self._identity, "settings": self.settings}), "disk")
            self.store.flush()
            self.began = True

    def reached(self, sweep: Sweep) -> None:
        """Called after every step of either sweep, where the sweep's state is consistent."""
        self._since += 1
        if self._since >= CHECKPOINT_EVERY or sweep.tape.late >= MAX_PENDING_DELETES:
            self._since = 0
            self._checkpoint(sweep)

    def trained(self, sweep: Sweep, value: Tensor) -> None:
        """Keep the end of the training, which is part of the result."""
        self.store.put("trained", [value, *sweep.state.tensors(), *sweep.buffers.values()], "disk")

    def _checkpoint(self, sweep: Sweep) -> None:
        header = {
            "index": sweep.index,
            "step": sweep.state.step,
            "visited": sweep.visited,
            "reversed": sweep.reversed,
            "first_read": sweep.meta.first_read,
            "objectives": len(sweep.adjoints),
        }
        self.store.flush()  # everything that the checkpoint refers to
        tensors = [_encode(header), sweep.losses, *sweep.state.tensors(), *sweep.buffers.values()]
        self.store.put("checkpoint", [*tensors, *_reverse_tensors(sweep)], "disk")
        self.store.flush()
        sweep.tape.sweep_out()

    def restore(self, sweep: Sweep) -> Tensor | None:
        """Put the sweep where the last checkpoint left it, if there is one.

        Returns the objective's value where the training is complete: then the trained state is in `sweep.trained`.
        """
        sweep.tape.adopt(self.store.keys())
        try:
            tensors = iter(self.store.get("checkpoint"))
            header = _decode(next(tensors))
            end = self.store.get("trained") if header["objectives"] else []
        except (KeyError, CorruptState):  # there is none yet, or it is damaged: begin again
            sweep.tape.discard_after(0)
            return None
        sweep.index, sweep.visited, sweep.reversed = header["index"], header["visited"], header["reversed"]
        sweep.tick("train", sweep.visited)
        sweep.meta.first_read.update(header["first_read"])
        sweep.losses.copy_(next(tensors))
        value = None
        if header["objectives"]:
            value, *end = end
            self._load(sweep, iter(end), len(sweep.losses))
            sweep.complete(sweep.continued)
            sweep.tick("reverse", sweep.reversed)
        self._load(sweep, tensors, header["step"])
        if header["objectives"]:
            sweep.begin_reverse([sweep.zero_adjoint() for _ in range(header["objectives"])])
            for mine in _reverse_tensors(sweep):
                mine.copy_(next(tensors))
        else:
            sweep.tape.discard_after(header["step"])
        return value

    @staticmethod
    def _load(sweep: Sweep, tensors: Any, step: int) -> None:
        for mine in sweep.state.tensors():
            mine.copy_(next(tensors))
        sweep.state.step = step
        sweep.buffers = {name: next(tensors).to(sweep.arena.device) for name in sweep.buffers}

    def finish(self) -> None:
        """The result is there: the directory may begin another run."""
        self._clear()
        self.store.flush()

    def _clear(self) -> None:
        # The header goes last: without it, what is left belongs to no run.
        for key in sorted(self.store.keys(), key=lambda key: key == "run"):
            self.store.delete(key)


def _reverse_tensors(sweep: Sweep) -> list[Tensor]:
    """The tensors that the reverse sweep changes in place, in a fixed order."""
    if sweep.gradients is None:
        return []
    adjoints = [t for adjoint in sweep.adjoints for t in (*adjoint.state.tensors(), *adjoint.buffers)]
    return [*adjoints, sweep.gradients.hyper, *sweep.gradients.leaves]


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(tensor: Any) -> Any:
    return json.loads(bytes(tensor.tolist()))
