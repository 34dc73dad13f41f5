"""Autograd graphs of gradients, kept from the training for the second derivatives, as unrolled backprop keeps them.

A step evaluated by autograd costs its gradient, and its gradient once more where second derivatives are wanted. If
memory allows, the graph of the first one stays, and the second evaluation begins where it ended. A training's
parameters are then again what they were, in the same memory.
"""

from __future__ import annotations

import contextlib
import math
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from mgd.autodiff.second_order import along
from mgd.step.autograd_graph import graph_of, precision_of
from mgd.step.batches import content_of, described, split_tensors
from mgd.step.evaluator import Derivatives
from mgd.step.hidden_state import HiddenState
from mgd.step.loss import BoundLoss, Microbatch
from mgd.step.metaparameters import BatchMetaparameters
from mgd.step.model import Buffers

HOOKS = "hooks of saved tensors, where an autograd graph is kept"  # an error that no caller sees
AT_FIRST, MOST_CREDIT = 4, 8  # evaluations that may be measured before any graph was kept, and after many were
SHORTEST = 3  # evaluations of a training of which a graph is kept: not of the first, nor of the last step

# Of these operators torch has another formula where gradients have a graph. Its bits may be the same by chance.
OTHER_BITS = frozenset(
    f"{name}Backward0"
    for name in "Silu Mish Logit NativeGroupNorm FusedRmsNorm WeightNormInterface MkldnnRnnLayer ThnnFusedLstmCell "
    "ThnnFusedGruCell".split()
)

Evaluated = Callable[[], "tuple[list[list[Tensor | None]], list[Tensor]]"]


@dataclass(slots=True, weakref_slot=True)
class AutogradResiduals:
    """The graph of the gradient of one microbatch, for one use.

    live: of the gradient of each parameter and the buffers after the step, in this order, those that have a graph.
    leaves: of the graph: parameters, floating-point buffers, metaparameters, and what seeded the gradient. microbatch:
    of whose batch `content` is. read: of the batch and of z, with the number of times each had been changed in place.
    after: the buffers as the model left them. around: who calls `along`.
    """

    owner: KeptGraphs
    live: Mapping[int, GradientEdge]
    leaves: list[Tensor]
    microbatch: Microbatch
    read: list[tuple[Tensor, int | None]]
    content: int
    after: Buffers
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
        if not leaves or not self.unchanged() or not all(map(_same_values, leaves, parameters)):
            return None
        try:
            with self._bound(leaves[: len(parameters)]):
                results, products = (self.around or _call)(lambda: along(live, leaves, directions, cotangents))
        except RuntimeError:  # the plain evaluation says what is wrong, or does without what was changed in place
            return None
        return Derivatives(results, products, precision=self.precision)

    def unchanged(self) -> bool:
        """Whether the batch and z are what they were: else others will not be either, where a loader fills one piece of
        memory again and again. Who writes past autograd, as NumPy does, leaves the version."""
        same = all([_version(x) == version for x, version in self.read]) and self.content == content_of(
            self.microbatch.batch
        )
        self.owner.refused |= not same
        return same

    @contextlib.contextmanager
    def _bound(self, parameters: list[Tensor]) -> Iterator[None]:
        """As where a step is evaluated: a backward function or a hook in Python may look at the model."""
        loss = self.microbatch.loss
        buffers = [self.after[name].clone() for name in loss.binding.buffer_names]
        with loss.binding.swapped(parameters, buffers):
            yield


def kept_graph(
    owner: KeptGraphs,
    microbatch: Microbatch,
    loss: Tensor,
    outputs: Sequence[Tensor | None],
    leaves: list[Tensor],
    one: Tensor,
    after: Buffers,
) -> AutogradResiduals | None:
    """What second derivatives need of this evaluation; None where it has none.

    outputs: the gradient of each parameter, and the floating-point buffers after the step. leaves: all others than
    `one`, with which the gradient was seeded.
    """
    try:
        if microbatch.loss.precision is None:
            microbatch.loss.precision = precision_of(loss)
    except NotImplementedError:
        return None
    read = [*split_tensors(microbatch.batch)[0], *microbatch.metaparameters.tensors]
    kept = AutogradResiduals(
        owner,
        {i: get_gradient_edge(x) for i, x in enumerate(outputs) if x is not None and x.requires_grad},
        [*leaves, one],
        microbatch,
        [(x, _version(x)) for x in read],
        content_of(microbatch.batch),
        after,
        [x for x in (*leaves, *read, *after.values()) if torch._C._has_storage(x)],
        microbatch.metaparameters,
        microbatch.share,
        microbatch.loss.precision or 0.0,
    )
    owner.note(kept)
    return kept


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _call(evaluate: Evaluated) -> Any:
    return evaluate()


def _same_values(leaf: Tensor, parameter: Tensor) -> bool:
    """Whether a leaf is what the parameter is now: the same memory, or a copy of it."""
    return leaf.data_ptr() == parameter.data_ptr() or torch.equal(leaf, parameter)


class KeptGraphs:
    """Which microbatches' graphs may be kept: those of which it is known what they take, and that gradients with such a
    graph have the bits of gradients without one. refused: none.

    Every graph that is kept pays for one that has to be measured; a few may be at first.
    """

    def __init__(self) -> None:
        self.refused = False
        self._known: dict[Kind, tuple[int, int]] = {}  # bytes that a graph held, and elements of its loss's graph
        self._types: frozenset[type] = frozenset()  # of nodes that were looked at
        self._missing: frozenset[type] = frozenset()  # and that should be
        self._credit, self._trainings, self._short = AT_FIRST, 0, False
        self._first: list[weakref.ref[AutogradResiduals]] = []

    def begin(self, reversals: int) -> None:
        """A training begins, of which so many evaluations will be reversed."""
        self._short = 0 < reversals < SHORTEST and not self._trainings
        self._trainings += reversals > 0

    def pays(self, held: int | None) -> bool:
        """Whether this evaluation may be measured or its graph kept. held: see `bytes`."""
        for reference in self._first if len(self._first) < AT_FIRST else ():
            if kept := reference():
                kept.unchanged()
        return not self.refused and (held is not None or not self._short)

    def note(self, kept: AutogradResiduals) -> None:
        """The first graphs are looked at before the next ones are kept."""
        if len(self._first) < AT_FIRST:
            self._first.append(weakref.ref(kept))

    def bytes(self, kind: Kind) -> int | None:
        """What the graph of such a microbatch takes at most: that of one which is no smaller; None: not known yet."""
        if self._missing:
            return None
        return min([size for known, (size, _) in self._known.items() if _fits(kind, known)], default=None)

    def covers(self, kind: Kind, loss: Tensor, leaves: Sequence[Tensor]) -> bool:
        """Whether the graph of this loss is like those that were measured. It may depend on numbers in the batch, on
        what requires gradients, or on the step."""
        found = extent_of(loss, leaves)
        if found.foreign:
            self.refused = True
            return False
        covering = [known for known in self._known if _fits(kind, known)]
        small = [known for known in covering if self._known[known][1] < found.elements]
        self._missing = found.types - self._types
        for known in small:
            del self._known[known]
        return self._pay(small or self._missing)

    def _pay(self, price: object) -> bool:
        """Whether there is nothing to pay for; if there is, and no credit, nothing is kept any more."""
        self._credit += -1 if price else self._credit < MOST_CREDIT
        self.refused |= self._credit < 0
        return not price

    @contextlib.contextmanager
    def measured(self, kind: Kind, given: Sequence[Tensor]) -> Iterator[Measured]:
        """Takes note of what the graph of the block's gradient holds, without the memory of what it was given. Nothing
        is kept where somebody else packs what is saved, as activation checkpoints do, nor where a tensor retains its
        gradient, which then would hold its own graph for ever."""
        seen = Measured({x.untyped_storage().data_ptr() for x in given if torch._C._has_storage(x)})
        with seen.saved, seen.watch:
            yield seen
        self.refused |= seen.watch.others
        self._pay(True)
        if seen.extent is not None:
            self._types |= seen.extent.types
            self._missing -= self._types
            self._known[kind] = sum(seen.saved.storages.values()), seen.extent.elements


# The structure of the batch and of z with the dtypes of their tensors, and their shapes.
Kind = tuple[str, tuple[torch.Size, ...]]


def kind_of(microbatch: Microbatch) -> Kind | None:
    """What microbatches have in common whose graphs may be alike. None for one of nested tensors, whose shapes do not
    say what they hold."""
    tensors, structure = described(microbatch.batch)
    tensors = [*tensors, *microbatch.metaparameters.tensors]
    if any([x.is_nested for x in tensors]):
        return None
    dtypes = " ".join([str(x.dtype) for x in tensors])
    return f"{structure} {microbatch.metaparameters.structure} {dtypes}", tuple([x.shape for x in tensors])


def _fits(kind: Kind, known: Kind) -> bool:
    """Whether it is of the same structure, and no tensor is larger in any dimension."""

    def fits(x: torch.Size, y: torch.Size) -> bool:
        return len(x) == len(y) and all(a <= b for a, b in zip(x, y, strict=True))

    return kind == known or (kind[0] == known[0] and all(map(fits, kind[1], known[1])))


@dataclass(frozen=True, slots=True)
class Extent:
    """Of a loss's autograd graph: the types of its nodes, and the elements of the results that they stand for.

    foreign: whether it cannot be kept: it depends on leaves that others made, as a loss does that carries a state from
    step to step, which is seen where a step is evaluated again; it has operators of other bits; or nested tensors.
    """

    types: frozenset[type]
    elements: int
    foreign: bool


def extent_of(loss: Tensor, leaves: Sequence[Tensor]) -> Extent:
    known, types, elements, foreign = {id(x) for x in leaves}, set(), 0, False
    for node in graph_of(loss):
        types.add(type(node))
        if hasattr(node, "variable"):
            foreign = foreign or id(node.variable) not in known
            continue
        try:
            for metadata in getattr(node, "_input_metadata", ()):
                elements += int(math.prod(metadata.shape))
        except (RuntimeError, TypeError):  # a nested tensor
            foreign = True
    foreign = foreign or not OTHER_BITS.isdisjoint([x.__name__ for x in types])
    return Extent(frozenset(types), elements, foreign)


class Rewind:
    """Where what a loss holds, and Python's and numpy's random generators, are now."""

    def __init__(self, loss: BoundLoss):
        self._hidden = HiddenState(loss.binding, loss.function)
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002

    def rewind(self) -> None:
        """Put them back: what is evaluated once more draws and counts what it did."""
        self._hidden.put_back()
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002


class Measured:
    """What is seen of an evaluation whose graph may be kept later. extent: of its loss's graph, where the gradient has
    the same bits with a graph as without."""

    def __init__(self, given: set[int]):
        self.saved = _Saved(given)
        self.watch = _Watch(self.saved)
        self.extent: Extent | None = None


class _Saved(saved_tensors_hooks):
    """The memory of all tensors that a graph saves, but for that of what it was given: bytes by address."""

    def __init__(self, given: set[int]) -> None:
        self.given = given
        self.storages: dict[int, int] = {}
        super().__init__(self._pack, _unpacked)

    def _pack(self, x: Tensor) -> tuple[Tensor, int]:
        if torch._C._has_storage(x):
            memory = x.untyped_storage()
            if memory.data_ptr() not in self.given:
                self.storages[memory.data_ptr()] = memory.nbytes()
        return x.detach(), x._version


def _unpacked(packed: tuple[Tensor, int]) -> Tensor:
    """Autograd itself does not look at versions under hooks."""
    x, version = packed
    if x._version != version:
        raise RuntimeError("a tensor that autograd saved was changed in place")
    return x


class _Watch(TorchFunctionMode):
    """others: whether a function was called where not `mine` packed what it saves, or a tensor retains its gradient."""

    def __init__(self, mine: _Saved):
        super().__init__()
        self.mine, self.others = mine, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self.others |= hooks is None or hooks[0] != self.mine.pack_hook or func is Tensor.retain_grad
        return func(*args, **(kwargs or {}))
