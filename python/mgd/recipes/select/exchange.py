"""Counts under a budget: the worst examples in use are exchanged for the best that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mgd.errors import BadArgument


class Exchange(torch.optim.Optimizer):
    """Of the examples with a gradient, lower the counts of those with the highest and raise as many of those with the
    lowest, pair by pair, as long as the one that leaves has the higher gradient. The sum of the counts stays.

    share: of the examples with a gradient, at most how many are exchanged, half of them out and half in.
    highest: the largest count. memory: gradients are averaged over the steps with this factor, 0 for none; each
        step's are first divided by their root mean square.
    """

    def __init__(self, params: Iterable[Tensor], share: float, highest: int = 1, memory: float = 0.0):
        if not 0 < share <= 1:
            raise BadArgument(f"expected a share of the examples in (0, 1]; got {share}")
        if highest < 1:
            raise BadArgument(f"expected the highest count to be at least 1; got {highest}")
        if not 0 <= memory < 1:
            raise BadArgument(f"expected memory in [0, 1); got {memory}")
        super().__init__(params, {"share": share, "highest": highest, "memory": memory, "shrinks": "share"})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    self._exchange(x, x.grad, group)
        return loss

    def _exchange(self, x: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        seen = gradient.nonzero()[:, 0]
        if len(seen) == 0:
            return
        g = gradient[seen] / gradient[seen].square().mean().sqrt()
        if group["memory"]:
            state = self.state[x]
            if not state:
                state["sum"], state["weight"] = torch.zeros_like(x), torch.zeros_like(x)
            for name, value in (("sum", g), ("weight", torch.ones_like(g))):
                state[name][seen] = group["memory"] * state[name][seen] + value
            g = state["sum"][seen] / state["weight"][seen]
        most = max(1, round(group["share"] * len(seen) / 2))
        kept, free = seen[x[seen] >= 1], seen[x[seen] <= group["highest"] - 1]
        score = torch.zeros_like(x).index_put_((seen,), g)
        out = kept[score[kept].argsort(descending=True, stable=True)][:most]
        into = free[score[free].argsort(stable=True)][:most]
        pairs = min(len(out), len(into))
        better = score[out[:pairs]] > score[into[:pairs]]  # sorted, so that these come first
        x[out[:pairs][better]] -= 1
        x[into[:pairs][better]] += 1
