"""Does the loss depend on the metaparameters as it did when it trained? Neither loss nor gradient need show it.

A loss may look the same and differentiate otherwise: `z["w"].detach()` during a warm-up that is counted in Python has
the same value and the same gradient of the parameters. So every evaluation of a step also gives the derivatives of the
loss with respect to the metaparameters, and a few projections of those are compared with the first evaluation's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mgd.errors import ReplayDivergence
from mgd.step.metaparameters import Metaparameters

PROBES = 4  # projections of each derivative: that a difference escapes all of them is out of the question
_PERIOD = 1021  # of the vectors projected on
_MOST = 8  # leaves with numbers of their own; more of them share
_STORED = 1e-6  # relative error, well above that of float32
_RELATIVE_TO_LARGEST = 1e-2  # a derivative that is 0 in exact arithmetic is the rounding of larger ones


class Influence:
    """Projections of dL/dz of every microbatch's first evaluation, `values`: float32 `[T, V, rows, PROBES]`.

    NaN where there was none yet.
    """

    def __init__(self, steps: int, microbatches: int):
        self._shape = steps, microbatches
        self._keys: list[str] = []
        self._scale: Tensor | None = None  # of each row, at its largest step
        self.values = torch.empty(0, device="cpu")

    def prepare(self, meta: Metaparameters) -> None:
        """Make room for the metaparameters that the loss may read."""
        if self._keys or not meta.owner:
            return
        self._keys = meta.owner
        self.values = torch.full((*self._shape, min(len(self._keys), _MOST), PROBES), math.nan, device="cpu")

    def compared(self, t: int, values: list[float], epsilon: float) -> None:
        """Take note of what step `t` has at first, `[V, rows, PROBES]` as a flat list. Later, raise ReplayDivergence if
        it has something else."""
        own = range(self._shape[1])
        if math.isnan(float(self.values[t, 0, 0, 0])):
            self.values[t], self._scale = torch.tensor(values, device="cpu").view(self.values.shape[1:]), None
        elif key := self.differing(t, own, values, epsilon):
            raise self.diverged(t, key)

    def differing(self, t: int, microbatches: Sequence[int], values: list[float], epsilon: float) -> str | None:
        """The key of a metaparameter on which the loss of one of these microbatches does not depend as it did at
        first. values: `[len(microbatches), rows, PROBES]` as a flat list. epsilon: of the arithmetic."""
        first = self.values[t, list(microbatches)].double()
        if self._scale is None:
            self._scale = self.values.nan_to_num().double().norm(dim=-1).amax((0, 1))
        now = torch.tensor(values, dtype=torch.float64, device="cpu").view(first.shape)
        limit = max(math.sqrt(epsilon), _STORED) * (first.norm(dim=-1) + _RELATIVE_TO_LARGEST * self._scale)
        wrong = ~((now - first).norm(dim=-1) <= limit)
        return self._keys[int(wrong.any(0).nonzero()[0])] if wrong.any() else None

    @staticmethod
    def diverged(t: int, key: str) -> ReplayDivergence:
        return ReplayDivergence(
            t,
            f"its loss and the gradient of the parameters are the same, but the derivative with respect to z[{key!r}] "
            "is another one. The loss treats it by something that changes from one evaluation to the next: a counter, "
            "a hook, random numbers that do not come from torch's generators. Make it a function of the model, the "
            "batch and z, for instance by a number in the batch.",
        )


def projections(derivatives: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Of dL/dz, float64 `[rows, PROBES]`; None stands for zeros."""
    rows: list[Tensor | None] = [None] * min(len(derivatives), _MOST)
    for i, x in enumerate(derivatives):
        if x is not None:
            row, own = i % _MOST, _projected(x.detach())
            before = rows[row]
            rows[row] = own if before is None else before + (1 + i // _MOST) * own
    zeros = torch.zeros(PROBES, dtype=torch.float64, device=device)
    return torch.stack([zeros if row is None else row for row in rows])


def _projected(x: Tensor) -> Tensor:
    """On fixed vectors, which repeat themselves after `_PERIOD` elements."""
    x = x.reshape(-1)
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    if (n := len(x)) > _PERIOD:
        whole = n - n % _PERIOD
        folded = x[:whole].view(-1, _PERIOD).sum(0)
        folded[: n - whole] += x[whole:]
        x = folded
    return torch.mv(_probes(x.dtype, x.device)[:, : len(x)], x).double()


@functools.cache
def _probes(dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(PROBES, _PERIOD, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)
