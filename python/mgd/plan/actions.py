"""The actions of a plan: what a replay loop with one current state, snapshots and a gradient log is told to do.

The position t of the current state s_t is part of the meaning of each action; all steps are absolute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Advance:
    """Run from the current position to `stop`. `log` names the tier that keeps the gradients of these steps, or None.

    A step whose gradient is in the log is rebuilt by the elementwise update; any other runs the model.
    """

    stop: int
    log: str | None = None


@dataclass(frozen=True, slots=True)
class Save:
    """Copy the current state, at position `step`, into a snapshot on `tier`."""

    step: int
    tier: str


@dataclass(frozen=True, slots=True)
class Load:
    """Make the snapshot of `step` the current state. The snapshot stays."""

    step: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Free the snapshot of `step`."""

    step: int


@dataclass(frozen=True, slots=True)
class Reverse:
    """Adjoint step t = `step`, from the current state at that position, which stays as it is.

    Takes the step's gradient from the log and frees the entry, or computes it with the model where there is none.
    """

    step: int


Action: TypeAlias = Advance | Save | Load | Drop | Reverse
