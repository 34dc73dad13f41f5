"""Checkpoints of a resumable run: log and snapshots on disk and, from time to time, the state of the sweep itself.

Between two checkpoints nothing that the first of them needs is deleted. So a run that ends at any moment, also by
`kill -9`, continues at the last checkpoint and gives the same bits. It begins and ends by clearing the store, which is
one step; entries that another run wrote are refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mgd.errors import CorruptState, ForeignEntry, StaleRun, StoreIOError, UnknownFormat
from mgd.plan import training
from mgd.ranks.ranks import Ranks
from mgd.sweep.damage import ADVICE, Key, with_advice
from mgd.sweep.history import History
from mgd_kernels.store import Store

State = dict[str, Any]  # names of tensors, and of values of JSON's types
KEYS = "checkpoint", "checkpoint 1"
SHARDED = "state.", "adjoint."  # the names of flat buffers, of which each rank has its range, begin so


class RunCheckpoint:
    """The record of one metagradient in a directory.

    identity: what the result depends on, name -> digest; a directory that holds another run is refused.
    settings: chosen when the run began, and kept by the runs that continue it. share: the directory is a part of the
    run's own. ranks: each has one, and a checkpoint counts where all of them have it. So several ranks keep the last
    two: what the older one needs is deleted once every rank has the newer one.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        staging: int,
        identity: Mapping[str, str],
        settings: Mapping[str, Any],
        ranks: Ranks,
        share: bool = False,
    ):
        self.directory = os.fspath(directory)
        self.store = Store.open(directory, host=staging, durable=True)
        self.settings, self._identity, self._steps = settings, dict(identity), 0
        self._ranks, self._share, self._number = ranks, share, 0
        self._keys = KEYS[: 1 if ranks.size == 1 else 2]
        try:
            self._refuse_foreign()
            self.began = "run" in self.store
            if self.began:
                with with_advice():
                    entry = self.store.get("run")
                with self._as_recorded("run"):
                    run = _decode(entry)
                    began, self.settings = dict(run["identity"]), dict(run["settings"])
                differing = sorted(k for k in identity if began.get(k) != identity[k])
                if differing:
                    raise StaleRun(self.directory, differing)
        except BaseException:
            self.store.close()
            raise

    def begin(self) -> None:
        """Make the directory that of this run, unless it is already."""
        if not self.began:
            self.renew()
            self.commit(self.settings)

    def renew(self) -> None:
        """Make the directory empty."""
        if self.store.keys():  # else it is new, or the run before has cleared it
            self.store.clear()
        self.began = False

    def commit(self, settings: Mapping[str, Any]) -> None:
        """What is in the directory is a run."""
        self.settings = dict(settings)
        self.store.flush()
        self.store.put("run", _encode({"identity": self._identity, "settings": self.settings}), "disk")
        self.store.flush()
        self.began = True

    def after_step(self, state: Callable[[], State], history: History) -> None:
        """To be called after every step of either sweep, where the sweep's state is consistent."""
        self._steps += 1
        if self._steps >= training.CHECKPOINT_EVERY or history.pending_snapshots >= training.MAX_PENDING_DELETES:
            self._steps = 0
            self.store.flush()  # everything that the checkpoint refers to
            self.save(state() | {"number": self._number})
            self._ranks.every(True)  # has written its own
            history.delete_pending()

    def save(self, state: State) -> None:
        """Keep a checkpoint, whose number is in it."""
        self._put(self._keys[state["number"] % len(self._keys)], state)
        self.store.flush()
        self._number = state["number"] + 1

    def save_trained(self, state: State) -> None:
        """Keep the end of the training, which is part of the result."""
        self._put("trained", state)

    def load(self) -> tuple[State | None, State | None]:
        """The state of the sweep at the last checkpoint, and the end of the training if it was reached by then.

        None where no checkpoint is whole on every rank: begin again.
        """
        found = self.records()
        common = set.intersection(*map(set, self._ranks.objects(list(found))))
        if not common:
            return None, None
        self._number = max(common) + 1
        return found[max(common)]

    def records(self) -> dict[int, tuple[State, State | None]]:
        """What this rank has of its last checkpoints, by their numbers: the state of the sweep, the end of the
        training."""
        found: dict[int, tuple[State, State | None]] = {}
        for key in KEYS:
            with contextlib.suppress(KeyError, CorruptState):
                state = self._get(key)
                found[state["number"]] = state, self._get("trained") if state["trained"] else None
        return found

    def entries(self) -> list[Key]:
        """Those of the log and the snapshots."""
        return [key for key in self.store.keys() if isinstance(key, tuple) and key[0] in ("gradient", "snapshot")]

    def shared_entries(self) -> list[Key]:
        """Those that every rank has. The others are deleted: a rank with a step more would leave the others' way."""
        own = self.entries()
        common = set.intersection(*map(set, self._ranks.objects(own)))
        for key in set(own) - common:
            self.store.delete(key)
        return [key for key in own if key in common]

    def finish(self) -> None:
        """The result is complete: the directory may begin another run."""
        self.store.clear()
        self.store.flush()

    def remove(self) -> None:
        """Remove the directory, which is closed, if it is a part of that of the run."""
        if self._share:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _refuse_foreign(self) -> None:
        """Entries of another run may be whole and good, and would give numbers that are not those of this one."""
        for key in self.store.keys():
            try:
                self.store.layout(key)
            except ForeignEntry:
                raise
            except (CorruptState, StoreIOError, UnknownFormat):
                pass  # the entry may not be needed; if it is, its get raises this again

    def _put(self, key: str, state: State) -> None:
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        values = {name: value for name, value in state.items() if name not in tensors}
        header = _encode({"values": values, "tensors": [[n, str(t.dtype), *t.shape] for n, t in tensors.items()]})
        self.store.put(key, [header, *tensors.values()], "disk")

    def _get(self, key: str) -> State:
        header, *tensors = self.store.get(key)
        with self._as_recorded(key):
            record = _decode(header)
            values, names = dict(record["values"]), [name for name, *_ in record["tensors"]]
            if [[n, str(t.dtype), *t.shape] for n, t in zip(names, tensors, strict=True)] != record["tensors"]:
                raise ValueError("tensors of other shapes or types than its own record says")
        return values | dict(zip(names, tensors, strict=True))

    @contextlib.contextmanager
    def _as_recorded(self, key: str) -> Iterator[None]:
        """Whatever fails while an entry is taken apart: it is not what was put."""
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            found = f"expected what a run records in {self.directory}; got {error!r}"
            raise CorruptState(key, None, found, ADVICE) from error


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(tensor: Any) -> Any:
    return json.loads(bytes(tensor.tolist()))
