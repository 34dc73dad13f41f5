"""A directory in which a descent, or the learning of a rater, is kept so that the same call continues it."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from mgd.errors import CorruptState, StaleRun


class Resumable(Protocol):
    """What a directory can keep: its state as tensors, numbers and texts, and its history as dataclasses."""

    history: list[Any]

    @property
    def identity(self) -> Mapping[str, str]:
        """Digests of what must be the same for it to be continued."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


class Directory:
    """The state in `state.pt`, and `history.json` for people."""

    def __init__(self, directory: str | os.PathLike[str]):
        self.path = Path(directory)
        self.path.mkdir(parents=True, exist_ok=True)

    def restore(self, place: Resumable) -> None:
        """Put the descent where the directory left it, if it holds one."""
        file = self.path / "state.pt"
        if not file.exists():
            return
        try:
            kept = torch.load(file, weights_only=True)
            theirs, state = kept["identity"], kept["place"]
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise CorruptState(str(file), None, str(error), "Delete it to begin the descent again.") from error
        known = place.identity | theirs
        if differing := [name for name in known if theirs.get(name) != place.identity.get(name)]:
            raise StaleRun(str(self.path), differing)
        place.load(state)

    def save(self, place: Resumable) -> None:
        self._replace(
            "state.pt", lambda path: torch.save({"identity": dict(place.identity), "place": place.state()}, path)
        )
        history = json.dumps([asdict(step) for step in place.history], indent=1)
        self._replace("history.json", lambda path: path.write_text(history + "\n"))

    def _replace(self, name: str, write: Callable[[Path], Any]) -> None:
        """All of the new file or all of the old one, whenever the process ends."""
        temporary = self.path / f".{name}"
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)
