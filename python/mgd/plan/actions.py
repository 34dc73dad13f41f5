"""The actions of a plan: instructions for a replay loop that has one current state, snapshots and a gradient log.

The current state s_t has a position t, and what an action does depends on it. All step numbers are absolute.

The actions before the first `Reverse` lead to s_{T-1}. There the last step is trained beside the current state: its
update makes s_T, at which the objective is evaluated, and its gradient waits for that `Reverse`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Advance:
    """Run from the current position to `stop`. `log`: the tier on which to log the gradients of these steps, or None.

    A step whose gradient is in the log is repeated by the elementwise update alone; any other step runs the model.
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
    """Make the snapshot of `step` the current state. The snapshot is kept."""

    step: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Free the snapshot of `step`."""

    step: int


@dataclass(frozen=True, slots=True)
class Reverse:
    """Run the adjoint step t = `step`, from the current state at that position. The state is not changed.

    Takes the step's gradient from the log and frees the entry; without an entry, the model computes the gradient. The
    last step's is there already, from the training.
    """

    step: int


Action: TypeAlias = Advance | Save | Load | Drop | Reverse
