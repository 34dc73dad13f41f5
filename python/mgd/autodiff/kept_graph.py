"""Autograd graphs of gradients, kept from the training for the second derivatives, as unrolled backprop keeps them.

A step evaluated by autograd costs its gradient, and its gradient once more where second derivatives are wanted. If
memory allows, the graph of the first one stays, and the second evaluation begins where it ended. A training's
parameters are then again what they were, in the same memory.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from mgd.autodiff.second_order import along, graph_of, precision_of
from mgd.step.batches import described, split_tensors
from mgd.step.evaluator import Derivatives
from mgd.step.loss import Microbatch
from mgd.step.metaparameters import BatchMetaparameters
from mgd.step.model import numbers_of, put_back

Evaluated = Callable[[], "tuple[list[list[Tensor | None]], list[Tensor]]"]


@dataclass(slots=True)
class AutogradResiduals:
    """The graph of the gradient of one microbatch, for one use.

    live: of the gradient of each parameter and the buffers after the step, in this order, those that have a graph.
    leaves: of the graph: parameters, floating-point buffers, metaparameters, and what seeded the gradient. read: of the
    batch and of z, with the number of times each had been changed in place. around: who calls `along`.
    """

    live: Mapping[int, GradientEdge]
    leaves: list[Tensor]
    read: list[tuple[Tensor, int | None]]
    given: list[Tensor]
    metaparameters: BatchMetaparameters
    share: float
    precision: float
    held: int = 0
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
        unchanged = all([_version(x) == version for x, version in self.read])
        if not leaves or not unchanged or not all(map(_same_values, leaves, parameters)):
            return None
        try:
            results, products = (self.around or _call)(lambda: along(live, leaves, directions, cotangents))
        except RuntimeError:  # the plain evaluation says what is wrong, or does without what was changed in place
            return None
        return Derivatives(results, products, precision=self.precision)


def kept_graph(
    microbatch: Microbatch, loss: Tensor, outputs: Sequence[Tensor | None], leaves: list[Tensor], one: Tensor
) -> AutogradResiduals | None:
    """What second derivatives need of this evaluation. None where it has no second derivatives, and where the loss
    depends on what was differentiated elsewhere, as one does that carries a state from step to step: evaluated again,
    it shows.

    outputs: the gradient of each parameter, and the floating-point buffers after the step. leaves: all others than
    `one`, with which the gradient was seeded.
    """
    try:
        if microbatch.loss.precision is None:
            microbatch.loss.precision = precision_of(loss)
    except NotImplementedError:
        return None
    known = {id(x) for x in leaves}
    if any([id(node.variable) not in known for node in graph_of(loss) if hasattr(node, "variable")]):
        return None
    read = [*split_tensors(microbatch.batch)[0], *microbatch.metaparameters.tensors]
    return AutogradResiduals(
        {i: get_gradient_edge(x) for i, x in enumerate(outputs) if x is not None and x.requires_grad},
        [*leaves, one],
        [(x, _version(x)) for x in read],
        [x for x in (*leaves, *read) if torch._C._has_storage(x)],
        microbatch.metaparameters,
        microbatch.share,
        microbatch.loss.precision or 0.0,
    )


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


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
        self._known: dict[_Kind, int] = {}

    def bytes(self, microbatch: Microbatch) -> int | None:
        """What the graph of this microbatch takes at most: that of one which is no smaller; None: not known yet."""
        kind = _kind(microbatch)
        found = [size for known, size in self._known.items() if _fits(kind, known)]
        return min(found, default=None)

    @contextlib.contextmanager
    def measured(self, microbatch: Microbatch) -> Iterator[None]:
        """Takes note of what the graph of the block's gradient holds. Nothing is kept where somebody else packs what is
        saved, as activation checkpoints do: they would call the model again, which is bound no longer."""
        seen = _Saved()
        with seen, _Watch(seen) as watch:
            yield
        self.refused |= watch.others
        self._known[_kind(microbatch)] = sum(seen.storages.values())


_Kind = tuple[str, tuple[torch.Size, ...]]  # the structure of the batch and of z, and the batch's shapes


def _kind(microbatch: Microbatch) -> _Kind:
    tensors, structure = described(microbatch.batch)
    return structure + microbatch.metaparameters.structure, tuple([x.shape for x in tensors])


def _fits(kind: _Kind, known: _Kind) -> bool:
    """Whether it is of the same structure, and no tensor is larger in any dimension."""

    def fits(x: torch.Size, y: torch.Size) -> bool:
        return len(x) == len(y) and all(a <= b for a, b in zip(x, y, strict=True))

    return kind == known or (kind[0] == known[0] and all(map(fits, kind[1], known[1])))


class Rewind:
    """Where numbers that a model holds, and Python's and numpy's random generators, are now."""

    def __init__(self, model: nn.Module):
        self._numbers = numbers_of(model)
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002

    def rewind(self) -> None:
        """Put them back: what is evaluated once more draws and counts what it did."""
        put_back(self._numbers)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002


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
