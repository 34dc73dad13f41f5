"""Autograd graphs of gradients, kept from the training for the second derivatives, as unrolled backprop keeps them.

A step evaluated by autograd costs its gradient, and its gradient once more where second derivatives are wanted. If
memory allows, the graph of the first one stays, and the second evaluation begins where it ended. A training's
parameters are then again what they were, in the same memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from mgd.autodiff.second_order import along
from mgd.step.batches import described
from mgd.step.evaluator import Derivatives
from mgd.step.loss import Microbatch
from mgd.step.metaparameters import BatchMetaparameters

Evaluated = Callable[[], "tuple[list[list[Tensor | None]], list[Tensor]]"]


@dataclass(slots=True)
class AutogradResiduals:
    """The graph of the gradient of one microbatch, for one use.

    live: of the gradient of each parameter and the buffers after the step, in this order, those that have a graph.
    leaves: of the graph: parameters, floating-point buffers, metaparameters, and what seeded the gradient. given: what
    the caller, or another step, may hold as well, of `versions` when it was read. around: who calls `along`.
    """

    live: Mapping[int, GradientEdge]
    leaves: list[Tensor]
    given: list[Tensor]
    versions: list[int]
    metaparameters: BatchMetaparameters
    share: float
    precision: float
    held: int
    around: Callable[[Evaluated], Any] | None = None
    tensors: Sequence[Any] = ()

    def second_derivatives(
        self,
        step: int,
        parameters: list[Tensor],
        directions: Sequence[Sequence[Tensor]],
        cotangents: Sequence[Sequence[Tensor]],
    ) -> Derivatives | None:
        leaves, live = self.leaves, self.live
        self.leaves, self.live = [], {}  # a graph is read once
        if not leaves or [x._version for x in self.given] != self.versions:
            return None
        if not all(map(_same_values, leaves, parameters)):
            return None
        try:
            results, products = (self.around or _call)(lambda: along(live, leaves, directions, cotangents))
        except RuntimeError:  # the plain evaluation says what is wrong, or does without what was changed in place
            return None
        return Derivatives(results, products, precision=self.precision)


def _call(evaluate: Evaluated) -> Any:
    return evaluate()


def _same_values(leaf: Tensor, parameter: Tensor) -> bool:
    """Whether a leaf is what the parameter is now: the same memory, or a copy of it."""
    return leaf.data_ptr() == parameter.data_ptr() or torch.equal(leaf, parameter)


class KeptGraphs:
    """Which microbatches' graphs may be kept: those of which it is known what they take, and that gradients with such a
    graph have the bits of gradients without one. refused: none."""

    def __init__(self) -> None:
        self.refused = False
        self._known: list[tuple[str, list[torch.Size], int]] = []

    def bytes(self, microbatch: Microbatch) -> int | None:
        """What the graph of this microbatch takes at most: that of one which is no smaller; None: not known yet."""
        structure, shapes = _kind(microbatch)
        found = [size for known, largest, size in self._known if known == structure and _fits(shapes, largest)]
        return min(found, default=None)

    @contextlib.contextmanager
    def measured(self, microbatch: Microbatch) -> Iterator[None]:
        """Takes note of what the graph of the block's gradient holds. Nothing is kept where somebody else packs what is
        saved, as activation checkpoints do: they would call the model again, which is bound no longer."""
        seen = _Saved()
        with seen, _Watch(seen) as watch:
            yield
        self.refused |= watch.others
        self._known.append((*_kind(microbatch), sum(seen.storages.values())))


def _kind(microbatch: Microbatch) -> tuple[str, list[torch.Size]]:
    tensors, structure = described(microbatch.batch)
    return structure + microbatch.metaparameters.structure, [x.shape for x in tensors]


def _fits(shapes: list[torch.Size], largest: list[torch.Size]) -> bool:
    return len(shapes) == len(largest) and all(
        len(x) == len(y) and all(a <= b for a, b in zip(x, y, strict=True))
        for x, y in zip(shapes, largest, strict=True)
    )


class _Saved(saved_tensors_hooks):
    """The memory of all tensors that a graph saves: bytes by address."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        super().__init__(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        if torch._C._has_storage(x):
            memory = x.untyped_storage()
            self.storages[memory.data_ptr()] = memory.nbytes()
        return x.detach()


class _Watch(TorchFunctionMode):
    """others: whether a function was called where not `mine` packed what it saves."""

    def __init__(self, mine: _Saved):
        super().__init__()
        self.mine, self.others = mine, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self.others |= hooks is None or hooks[0] != self.mine.pack_hook
        return func(*args, **(kwargs or {}))
