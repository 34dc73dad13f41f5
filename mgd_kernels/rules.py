"""The update rules: which hyperparameters each has, in which order, and which slots its state holds.

A *rule* is a pure description that every backend shares. The element-wise mathematics lives in one place per
language: `backends/reference.py` (torch, the specification), `csrc/optim/*.h` (C++ and CUDA) and
`backends/triton_rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from mgd_kernels.errors import BadArgument

# Hyperparameters that the rules take from [low, high) only; all others may be any finite number.
RANGES = {"beta1": (0.0, 1.0), "beta2": (0.0, 1.0), "eps": (0.0, math.inf), "eps_root": (0.0, math.inf)}


def check_range(ranges: Mapping[str, tuple[float, float]], name: str, values: float | Tensor, called: str = "") -> None:
    """BadArgument unless the values are finite, and in [low, high) where `ranges` has the name."""
    low, high = ranges.get(name, (-math.inf, math.inf))
    numbers = [float(values)] if not isinstance(values, Tensor) else values.detach().flatten().tolist()
    for number in numbers:
        if not (low <= number < high and math.isfinite(number)):
            wanted = "a finite number" if low == -math.inf else f"a finite number in [{low:g}, {high:g})"
            raise BadArgument(f"expected {wanted} for {called or name}; got {number}")


# Which cotangents a VJP computes: none, those of `lr` and `weight_decay`, the first columns of every rule, or all, that
# of the gradient's scale among them.
Wanted = Literal["none", "rates", "all"]
WANTED: tuple[Wanted, ...] = get_args(Wanted)


@dataclass(frozen=True)
class Rule:
    """An element-wise update rule.

    hyper: the hyperparameters, in the column order of every hyperparameter table (float64, `[G, H]` for G
        parameter groups). They are run-time values of each step.
    slots: the tensors of optimizer state beside the parameters, each of the parameters' shape and dtype.
    """

    name: str
    hyper: tuple[str, ...]
    slots: tuple[str, ...]
    nesterov: bool = False

    def column(self, name: str) -> int:
        return self.hyper.index(name)

    def wanted(self, columns: Collection[int]) -> Wanted:
        """What has to be computed for the cotangents of these columns."""
        return "none" if not columns else "rates" if set(columns) <= {0, 1} else "all"


ADAM = Rule(
    "adam",
    hyper=("lr", "weight_decay", "l2", "beta1", "beta2", "eps", "eps_root"),
    slots=("exp_avg", "exp_avg_sq"),
)

_SGD_HYPER = ("lr", "weight_decay", "l2", "momentum", "dampening")
SGD_PLAIN = Rule("sgd", hyper=_SGD_HYPER, slots=())
SGD_MOMENTUM = Rule("sgd", hyper=_SGD_HYPER, slots=("momentum_buffer",))
SGD_NESTEROV = Rule("sgd", hyper=_SGD_HYPER, slots=("momentum_buffer",), nesterov=True)
