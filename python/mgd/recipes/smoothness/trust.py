"""How far the metagradient of a training can be followed: its smoothness, and how well it predicts a step along it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from mgd.check import agreement
from mgd.errors import BadArgument
from mgd.function import TrainingFunction


@dataclass
class Trust:
    """How far a metagradient can be followed. smoothness: by direction, the metagradient's own first, and by size.
    predicted, actual: by size, the change of the objective by a step of sign descent."""

    smoothness: list[list[float]]
    predicted: list[float]
    actual: list[float]

    @property
    def mean_smoothness(self) -> float:
        return mean(value for row in self.smoothness for value in row)

    @property
    def error(self) -> float:
        """Of the prediction, relative to it: the geometric mean over sizes."""
        pairs = zip(self.predicted, self.actual, strict=True)
        return math.exp(mean(math.log(max(abs(a - p) / abs(p), 1e-9)) for p, a in pairs))


def trust(
    f: TrainingFunction, z: Mapping[str, Any], key: str, directions: Sequence[Tensor], sizes: Sequence[float]
) -> Trust:
    """Measure any training at `z` along changes of `z[key]`, a tensor: along the step that sign descent would take, and
    along `directions` of its shape. Costs a metagradient and 2 trainings a direction and size."""
    result = f.metagradient(z)
    gradient, value = result.grads[key], float(result.value)
    if not bool(gradient.any()):
        raise BadArgument(f"the metagradient of {key!r} is 0 everywhere: there is no step along it")
    names = [name for name, p in f.model.named_parameters() if p.requires_grad]

    def vector(state: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([state[name].reshape(-1).double() for name in names])

    start = vector(result.model_state)
    found = Trust([], [], [])
    model = copy.deepcopy(f.model)
    for number, direction in enumerate([-gradient.sign(), *directions]):
        found.smoothness.append([])
        for h in sizes:
            middle, end = (f.train({**z, key: z[key] + k * h * direction}) for k in (1, 2))
            found.smoothness[-1].append(agreement(start, vector(middle.parameters), vector(end.parameters)))
            if number == 0:
                model.load_state_dict(middle.model_state, strict=False)
                with torch.no_grad():
                    found.actual.append(float(f.objective(model)) - value)
                found.predicted.append(float((gradient.double() * h * direction).sum()))
    return found
