"""Batches: pytrees of tensors, split into microbatches.

Beside torch's containers, any mapping (such as the BatchEncoding of tokenizers) and any dataclass is one. Or a batch
knows how to load a part of itself (`PartialBatch`).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_map, tree_unflatten

from mgd.errors import BadBatch, ReplayDivergence
from mgd.util.fingerprint import digest


class PartialBatch(Protocol):
    """A batch that is asked for the microbatches alone that a process evaluates.

    `len(batch)`: its examples. `load(start, stop)`: a pytree of tensors with the examples `start` to `stop - 1`, the
    same each time.
    """

    def __len__(self) -> int: ...

    def load(self, start: int, stop: int) -> Any: ...


def is_partial(batch: Any) -> bool:
    return callable(getattr(type(batch), "load", None)) and hasattr(type(batch), "__len__")


def loaded(batch: Any) -> Any:
    """The whole of a batch, as a pytree."""
    return batch.load(0, len(batch)) if is_partial(batch) else batch


def microbatches(batch: Any, count: int, step: int, wanted: range | None = None) -> list[tuple[Any, float]]:
    """Of `count` slices of the batch along its first dimension those wanted, each with its share of the examples.

    The shares sum to 1, so the weighted sum of the means over microbatches is the mean over the batch, even if the
    slices differ in length. Tensors without dimensions go to every microbatch.

    Raises BadBatch if a tensor is empty, or if `count` > 1 and the tensors have no common length of at least `count`.
    """
    wanted = range(count) if wanted is None else wanted
    if is_partial(batch):
        return _loaded_microbatches(batch, count, step, wanted)
    batch, leaves, spec = _of_autograd(batch)
    odd = [leaf for leaf in leaves if isinstance(leaf, Tensor) and (leaf.is_nested or leaf.layout is not torch.strided)]
    if odd and count > 1:
        raise BadBatch(
            f"expected dense tensors for microbatches={count}; batch {step} has one that is nested or sparse"
        )
    if not odd and any([isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == 0 for leaf in leaves]):
        raise BadBatch(f"expected at least one example in a batch; batch {step} has a tensor of length 0")
    if count == 1:
        return [(batch, 1.0)]
    lengths = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    if len(lengths) != 1:
        raise BadBatch(
            f"expected tensors with one common first dimension for microbatches={count}; batch {step} has "
            f"{sorted(lengths)}"
        )
    length = lengths.pop()
    _check_length(length, count, step)
    split = [leaf.tensor_split(count) if isinstance(leaf, Tensor) and leaf.ndim else [leaf] * count for leaf in leaves]
    sizes = [stop - start for start, stop in slices(length, count)]
    return [(tree_unflatten([parts[i] for parts in split], spec), sizes[i] / length) for i in wanted]


def _loaded_microbatches(batch: PartialBatch, count: int, step: int, wanted: range) -> list[tuple[Any, float]]:
    length, found = len(batch), []
    _check_length(length, count, step)
    stretches = slices(length, count)
    for start, stop in (stretches[i] for i in wanted):
        part, leaves, _ = _of_autograd(batch.load(start, stop))
        sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
        if sizes != {stop - start}:
            raise BadBatch(
                f"expected batches[{step}].load({start}, {stop}) to return tensors with {stop - start} examples; got "
                f"{sorted(sizes) or 'none'}"
            )
        found.append((part, (stop - start) / length))
    return found


def _of_autograd(batch: Any) -> tuple[Any, list[Any], Any]:
    """A batch, its leaves, and its structure, with copies of tensors of inference mode, which autograd refuses."""
    leaves, spec = flatten(batch)
    if any([isinstance(leaf, Tensor) and leaf.is_inference() for leaf in leaves]):
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        batch = tree_unflatten(leaves, spec)
    return batch, leaves, spec


def _check_length(length: int, count: int, step: int) -> None:
    if length < count:
        raise BadBatch(f"expected at least {count} examples for {count} microbatches; batch {step} has {length}")


def shares(batch: Any, count: int) -> list[float]:
    """The share of the examples that each of `count` microbatches of the batch has."""
    if count == 1:
        return [1.0]
    leaves = [] if is_partial(batch) else flatten(batch)[0]
    lengths = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    length = lengths[0] if lengths else len(batch)
    return [(stop - start) / length for start, stop in slices(length, count)]


def slices(length: int, count: int) -> list[tuple[int, int]]:
    """First and last example of each of `count` slices of so many; the longer ones come first."""
    small, longer = divmod(length, count)
    starts = [i * small + min(i, longer) for i in range(count + 1)]
    return list(itertools.pairwise(starts))


def fingerprints(batch: Any, count: int, step: int) -> list[int]:
    """A number for each of `count` slices of the batch, which tells examples apart, not their order: int64. Of a batch
    that loads parts of itself: of its length."""
    if is_partial(batch):
        return [len(batch)] * count
    found = []
    for part, _ in microbatches(batch, count, step):
        number = 0
        for leaf in flatten(part)[0]:
            number = number * 1_000_003 + (_bits(leaf) if isinstance(leaf, Tensor) else int(digest(leaf)[:15], 16))
        found.append((number + (1 << 63)) % (1 << 64) - (1 << 63))
    return found


def _bits(x: Tensor) -> int:
    """The sum of a tensor's bytes, taken as numbers of its width, and of what its shape says."""
    flat = x.detach().contiguous().resolve_conj().resolve_neg().reshape(-1)
    raw = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(x.element_size(), torch.int64))
    return int(raw.sum()) + 31 * x.numel() + 37 * x.ndim


def flatten(batch: Any) -> tuple[list[Any], Any]:
    """The leaves of a batch and its structure. A tuple of tensors, the common case, avoids torch's slow recursion."""
    if _is_plain(batch):
        return list(batch), _tuple_spec(len(batch))
    leaves, spec = tree_flatten(batch)
    if any(map(_is_container, leaves)):
        return tree_flatten(tree_map(_opened, batch))
    return leaves, spec


def _is_plain(batch: Any) -> bool:
    return type(batch) is tuple and all([type(leaf) is Tensor for leaf in batch])


@cache
def _tuple_spec(length: int) -> Any:
    return tree_flatten((0,) * length)[1]


# --- containers that torch's pytrees do not know ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How a container is built. template: one such container, which lends what is not a field of it."""

    kind: type
    keys: tuple[Any, ...]
    template: Any = dataclasses.field(compare=False, repr=False)


class _Opened:
    """Stands for a container in a tree, so that torch looks inside; taken out of the tree again, it is a container."""

    def __init__(self, kind: _Kind, values: list[Any]):
        self.kind, self.values = kind, values


def _is_container(x: Any) -> bool:
    return isinstance(x, Mapping) or (dataclasses.is_dataclass(x) and not isinstance(x, type))


def _opened(x: Any) -> Any:
    if not _is_container(x):
        return x
    mapping = isinstance(x, Mapping)
    keys = tuple(x) if mapping else tuple(field.name for field in dataclasses.fields(x))
    values = [x[key] if mapping else getattr(x, key) for key in keys]
    return _Opened(_Kind(type(x), keys, x), [tree_map(_opened, value) for value in values])


def _closed(values: Any, kind: _Kind) -> Any:
    """A container of this kind with these values."""
    values = dict(zip(kind.keys, values, strict=True))
    if not issubclass(kind.kind, Mapping):
        made = copy.copy(kind.template)
        for name, value in values.items():
            object.__setattr__(made, name, value)  # the dataclass may be frozen
        return made
    if issubclass(kind.kind, MutableMapping):
        made = copy.copy(kind.template)  # with its attributes
        for key, value in values.items():
            made[key] = value
        return made
    try:
        return kind.kind(values)  # type: ignore[call-arg]
    except TypeError:
        raise BadBatch(
            f"expected a mapping that can be made from a dict; {kind.kind.__name__} cannot: use a dict, a tuple or a "
            "dataclass for the batch"
        ) from None


register_pytree_node(_Opened, lambda opened: (opened.values, opened.kind), _closed)


def split_tensors(batch: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors of a batch, and a function that rebuilds a batch from such tensors."""
    if _is_plain(batch):
        return list(batch), tuple
    leaves, spec = flatten(batch)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: list[Tensor]) -> Any:
        contents = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            contents[i] = tensor
        return tree_unflatten(contents, spec)

    return [leaves[i] for i in places], rebuild


def described(batch: Any) -> tuple[list[Tensor], str]:
    """The tensors of a batch, and how it is built: containers, keys and types, without the values."""
    if _is_plain(batch):
        return list(batch), f"{len(batch)} tensors"
    leaves, spec = flatten(batch)
    return [x for x in leaves if isinstance(x, Tensor)], f"{spec} {[type(x).__name__ for x in leaves]}"


def same(first: Any, second: Any) -> bool:
    """Whether two batches hold the same bits."""
    a, spec_a = flatten(loaded(first))
    b, spec_b = flatten(loaded(second))
    return spec_a == spec_b and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y
        for x, y in zip(a, b, strict=True)
    )


def to_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating-point tensors in `dtype`."""
    leaves, spec = flatten(loaded(batch))
    return tree_unflatten([x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves], spec)


_LANES, _SHORT = 64, 1 << 16


def content_of(batch: Any) -> int:
    """A number that tells the bits of a batch apart, as far as they are in the host's memory: who writes past autograd,
    as NumPy does, leaves the version of a tensor."""
    return hash(tuple([_sums(x) for x in flatten(batch)[0] if isinstance(x, Tensor | np.ndarray)]))


def exact_content_of(tensors: list[Tensor]) -> int:
    """Of the bits of tensors on the CPU; the same within a process. A fifth of the time of a digest of small ones."""
    try:
        return hash(tuple([(x.dtype, x.shape, x.numpy().tobytes()) for x in tensors]))
    except (RuntimeError, TypeError):  # one that numpy does not have
        return hash(digest(tensors))


class BatchNumbers:
    """Hashes of the integers and booleans that batches hold on the CPU, such as indices and labels: these have to stay
    the same, and the loss need not show others, where weights are equal. To copy them from a GPU would wait for it."""

    def __init__(self) -> None:
        self._hashes: dict[tuple[int, int], set[int]] = {}  # of each step's microbatches, by their numbers

    def check(self, t: int, own: Iterable[int], batches: Iterable[Any]) -> dict[int, list[Tensor]]:
        """Those of microbatches of step `t`. Raises ReplayDivergence where they were others before."""
        numbers: dict[int, list[Tensor]] = {}
        for i, batch in zip(own, batches, strict=True):
            tensors = split_tensors(batch)[0]
            numbers[i] = [x for x in tensors if not x.is_floating_point() and x.device.type == "cpu"]
            if numbers[i]:
                found = exact_content_of(numbers[i])
                if found not in self._hashes.setdefault((t, i), {found}):
                    raise ReplayDivergence(
                        t,
                        f"batches[{t}] has other indices or labels than when it was read before; expected the same "
                        "ones (fix the order of the examples and their augmentation).",
                    )
        return numbers

    def note(self, t: int, numbers: dict[int, list[Tensor]]) -> None:
        """What the loss has left of them: it may mask labels in place, to the same end each time."""
        for i, tensors in numbers.items():
            if any([not x.is_inference() and x._version for x in tensors]):
                self._hashes[t, i].add(exact_content_of(tensors))


def _sums(x: Tensor | np.ndarray) -> int:
    """The hash of a short one; of a long one that of the sums of its words, which takes a tenth of the time."""
    try:
        if isinstance(x, Tensor):
            if x.device.type != "cpu" or x.layout is not torch.strided:
                return 0
            if x.dtype is not torch.bfloat16 and x.nbytes <= _SHORT:
                return hash(x.numpy(force=True).tobytes())
            x = x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
        raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    except (RuntimeError, TypeError, ValueError):  # one that NumPy does not have
        return 0
    whole = 0 if raw.size <= _SHORT else raw.size // (8 * _LANES) * 8 * _LANES
    sums = raw[:whole].view(np.uint64).reshape(-1, _LANES).sum(0, dtype=np.uint64)
    return hash((raw.size, sums.tobytes(), raw[whole:].tobytes()))
