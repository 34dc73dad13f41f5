"""A directory that holds the state of a descent or of a rater's training, so that the same call continues it.

`replace_file` is how this package replaces any file.
"""

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
    """A run that a directory can hold: a state of tensors, numbers and strings, and a history of dataclasses."""

    history: list[Any]

    @property
    def identity(self) -> Mapping[str, str]:
        """Digests of everything that must be unchanged for the run to continue, by name."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


class CheckpointDirectory:
    """`state.pt` holds the state; `history.json` is for people to read."""

    def __init__(self, directory: str | os.PathLike[str]):
        self.path = Path(directory)
        self.path.mkdir(parents=True, exist_ok=True)

    def restore(self, run: Resumable) -> None:
        """Load the saved state into `run`, if there is one.

        Raises StaleRun if the directory belongs to another run, CorruptState if its file is damaged.
        """
        file = self.path / "state.pt"
        if not file.exists():
            return
        try:
            record = torch.load(file, weights_only=True)
            identity, state = record["identity"], record["place"]
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise CorruptState(str(file), None, str(error), "Delete it to start again.") from error
        names = run.identity | identity
        if differences := [name for name in names if identity.get(name) != run.identity.get(name)]:
            raise StaleRun(str(self.path), differences)
        run.load(state)

    def save(self, run: Resumable) -> None:
        record = {"identity": dict(run.identity), "place": run.state()}
        replace_file(self.path / "state.pt", lambda path: torch.save(record, path))
        history = json.dumps([asdict(step) for step in run.history], indent=1)
        replace_file(self.path / "history.json", lambda path: path.write_text(history + "\n"))


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Replace a file atomically: whenever the process ends, `path` holds all of the old file or all of the new one."""
    temporary = path.with_name(f".{path.name}")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
