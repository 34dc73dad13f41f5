"""Does the loss depend on the metaparameters as it did when it trained? Neither loss nor gradient need show it.

A loss may look the same and differentiate otherwise: `z["w"].detach()` during a warm-up that is counted in Python has
the same value and the same gradient of the parameters. So every evaluation of a step also gives the derivatives of the
loss with respect to the metaparameters, and a few projections of those are compared with the first evaluation's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgd.errors import ReplayDivergence
from mgd.step.metaparameters import Metaparameters

PROBES = 4  # projections of each derivative: that a difference escapes all of them is out of the question
_PERIOD = 1021  # of the vectors projected on
_MOST = 8  # leaves with numbers of their own; more of them share
_RELATIVE_TO_TYPICAL = 1e-2  # a derivative that is 0 in exact arithmetic is the rounding of larger ones
_SMALLEST = 1e-35  # below, float32 has fewer digits


class Influence:
    """Projections of dL/dz of every microbatch's first evaluation, `values`: float64 `[T, V, rows, PROBES]`.

    NaN where there was none yet.
    """

    def __init__(self, steps: int, microbatches: int):
        self._shape = steps, microbatches
        self._keys: list[str] = []
        self._scale: np.ndarray | None = None  # of each row, at a typical step that reads it
        self.values = torch.empty(0, dtype=torch.float64, device="cpu")
        self._first = self.values.numpy()

    def prepare(self, meta: Metaparameters) -> None:
        """Make room for the metaparameters that the loss may read."""
        if self._keys or not meta.owner:
            return
        self._keys = meta.owner
        shape = *self._shape, min(len(self._keys), _MOST), PROBES
        self.values = torch.full(shape, math.nan, dtype=torch.float64, device="cpu")
        self._first = self.values.numpy()  # of the same memory; to write a few numbers through torch takes 5 µs

    def compared(self, t: int, values: Any, epsilon: float) -> None:
        """Take note of what step `t` has at first, `[V, rows, PROBES]` as an array or a flat list. Later, raise
        ReplayDivergence if it has something else."""
        first = self._first[t]
        if math.isnan(first.item(0)):
            first[:], self._scale = np.asarray(values).reshape(first.shape), None
        elif key := self.differing(t, range(self._shape[1]), values, epsilon):
            raise self.diverged(t, key)

    def differing(self, t: int, microbatches: Sequence[int], values: Any, epsilon: float) -> str | None:
        """The key of a metaparameter on which the loss of one of these microbatches does not depend as it did at
        first. values: `[len(microbatches), rows, PROBES]` as an array or a flat list. epsilon: of the arithmetic."""
        first = self._first[t, list(microbatches)]
        now = np.asarray(values).reshape(first.shape)
        if (now == first).all():  # as of every graph that repeats itself
            return None
        if self._scale is None:
            norms = _norms(self._first).reshape(-1, first.shape[-2])
            self._scale = np.array([np.median(row[row > 0]) if (row > 0).any() else 0.0 for row in norms.T])
        limit = math.sqrt(epsilon) * (_norms(first) + _RELATIVE_TO_TYPICAL * self._scale) + _SMALLEST
        with np.errstate(all="ignore"):
            wrong = ~((now == first).all(-1) | (_norms(now - first) <= limit))
        return self._keys[int(wrong.any(0).argmax())] if wrong.any() else None

    @staticmethod
    def diverged(t: int, key: str) -> ReplayDivergence:
        return ReplayDivergence(
            t,
            f"its loss and the gradient of the parameters are the same, but the derivative with respect to z[{key!r}] "
            "is another one. The loss treats it by something that changes from one evaluation to the next: a counter, "
            "a hook, random numbers that do not come from torch's generators. Make it a function of the model, the "
            "batch and z, for instance by a number in the batch.",
        )


def _norms(x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.sqrt(np.square(x).sum(-1))


def projections(derivatives: Sequence[Tensor | None], device: torch.device) -> np.ndarray | Tensor:
    """Of dL/dz, float64 `[rows, PROBES]`: an array on the CPU, else a tensor. None stands for zeros."""
    count = min(len(derivatives), _MOST)
    if device.type == "cpu":  # by NumPy, whose calls take a third of the time
        total = np.zeros((count, PROBES))
        with np.errstate(all="ignore"):  # what is not finite is told of elsewhere
            for i, x in enumerate(derivatives):
                if x is not None:
                    own = _projected(_plain(x.detach()).reshape(-1).numpy(), _probes(device, as_numpy=True))
                    total[i % _MOST] += own if i < _MOST else (1 + i // _MOST) * own
        return total
    rows: list[Tensor] = [torch.zeros(PROBES, dtype=torch.float64, device=device)] * count
    for i, x in enumerate(derivatives):
        if x is not None:
            own = _projected(_plain(x.detach()).reshape(-1).double(), _probes(device))
            rows[i % _MOST] = rows[i % _MOST] + (1 + i // _MOST) * own
    return torch.stack(rows)


def _plain(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _projected(x: Any, probes: Any) -> Any:
    """On fixed vectors `[PROBES, _PERIOD]`, which repeat themselves. Of tensors as of arrays."""
    if (n := len(x)) > _PERIOD:
        whole = n - n % _PERIOD
        folded = x[:whole].reshape(-1, _PERIOD).sum(0)
        folded[: n - whole] += x[whole:]
        x = folded
    return probes[:, : len(x)] @ x


@functools.cache
def _probes(device: torch.device, as_numpy: bool = False) -> Any:
    probes = np.random.default_rng(0).standard_normal((PROBES, _PERIOD))
    return probes if as_numpy else torch.from_numpy(probes).to(device)
