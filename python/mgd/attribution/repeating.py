"""The sweeps of an attribution: each has an objective for some of the queries, and repeats the same training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgd.attribution import scores as files
from mgd.errors import BadObjective, ReplayDivergence
from mgd.function import TrainingFunction
from mgd.results import Metagradient, Trained
from mgd.util.text import describe

Objectives = Callable[[nn.Module, Tensor], Tensor]


def objective_of(objectives: Objectives, part: list[int]) -> Callable[[nn.Module], Tensor]:
    """The objective of a chunk: the losses of its queries, `[len(part)]`."""

    def objective(model: nn.Module) -> Tensor:
        losses = objectives(model, torch.tensor(part))
        if not isinstance(losses, Tensor) or losses.shape != (len(part),):
            raise BadObjective(
                f"expected objectives(model, index) to return one loss for each of {len(part)} queries, of shape "
                f"[{len(part)}]; got {describe(losses)}. Use reduction='none' and index the queries with `index`."
            )
        return losses

    return objective


def repeated(
    f: TrainingFunction, z: Mapping[str, Any], place: Path | None, rehearsal: Trained, progress: bool
) -> Metagradient:
    """A chunk's metagradient. Raises ReplayDivergence unless its training repeated the rehearsal bit by bit."""
    try:
        result = f.metagradient(z, resume=place, progress=progress)
    except ReplayDivergence:
        # The reverse sweep meets the last differing step first; training once more finds the first one.
        check_same_training(rehearsal, f.train(z))
        raise
    check_same_training(rehearsal, result)
    return result


def check_same_training(first: Trained, second: Trained | Metagradient) -> None:
    """Raise ReplayDivergence unless both trainings have the same losses and the same trained state, bit by bit."""
    advice = (
        "An attribution needs a training that repeats itself: the same batches each time (a fixed order and fixed "
        "augmentation), random numbers from torch's generators only, no state outside the model's buffers, and "
        "deterministic kernels (torch.use_deterministic_algorithms)."
    )
    step = files.first_difference(first.losses.numpy(), second.losses.numpy())
    if step is not None:
        a, b = float(first.losses[step]), float(second.losses[step])
        raise ReplayDivergence(step, f"its loss was {a!r} in one training and {b!r} in the next. {advice}")
    for name, tensor in first.model_state.items():
        if not torch.equal(tensor, second.model_state[name]):
            last = len(first.losses) - 1
            cause = f"two trainings with equal losses end with different values of {name}. {advice}"
            raise ReplayDivergence(last, cause)
