"""A directory in which a descent, or the learning of a rater, is kept, so that the same call continues it; and the
one way in which this package replaces a file."""

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
    """What a directory can keep: a state of tensors, numbers and texts, and a history of dataclasses."""

    history: list[Any]

    @property
    def identity(self) -> Mapping[str, str]:
        """Digests of what must be the same for it to be continued."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


class CheckpointDirectory:
    """The state in `state.pt`, and `history.json` for people."""

    def __init__(self, directory: str | os.PathLike[str]):
        self.path = Path(directory)
        self.path.mkdir(parents=True, exist_ok=True)

    def restore(self, descent: Resumable) -> None:
        """Put the descent where it was when the directory was written, if it holds one."""
        file = self.path / "state.pt"
        if not file.exists():
            return
        try:
            record = torch.load(file, weights_only=True)
            theirs, state = record["identity"], record["place"]
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise CorruptState(str(file), None, str(error), "Delete it to begin the descent again.") from error
        known = descent.identity | theirs
        if differing := [name for name in known if theirs.get(name) != descent.identity.get(name)]:
            raise StaleRun(str(self.path), differing)
        descent.load(state)

    def save(self, descent: Resumable) -> None:
        record = {"identity": dict(descent.identity), "place": descent.state()}
        replace_file(self.path / "state.pt", lambda path: torch.save(record, path))
        history = json.dumps([asdict(step) for step in descent.history], indent=1)
        replace_file(self.path / "history.json", lambda path: path.write_text(history + "\n"))


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file anew: whenever the process ends, all of the new one or all of the old one is there."""
    temporary = path.with_name(f".{path.name}")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
