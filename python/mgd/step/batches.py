"""Batches: pytrees of tensors, split into microbatches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mgd.errors import BadBatch


def microbatches(batch: Any, count: int, step: int) -> list[tuple[Any, float]]:
    """`count` slices of the batch along its first dimension, each with its share of the examples.

    The shares sum to 1, so the weighted sum of the means over microbatches is the mean over the batch, even if the
    slices differ in length. Tensors without dimensions go to every microbatch.

    Raises BadBatch if a tensor is empty, or if `count` > 1 and the tensors have no common length of at least `count`.
    """
    leaves, spec = flatten(batch)
    if any([isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == 0 for leaf in leaves]):
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
    if length < count:
        raise BadBatch(f"expected at least {count} examples for {count} microbatches; batch {step} has {length}")
    split = [leaf.tensor_split(count) if isinstance(leaf, Tensor) and leaf.ndim else [leaf] * count for leaf in leaves]
    sizes = [len(part) for part in torch.arange(length).tensor_split(count)]
    return [(tree_unflatten([parts[i] for parts in split], spec), size / length) for i, size in enumerate(sizes)]


def flatten(batch: Any) -> tuple[list[Any], Any]:
    """The leaves of a batch and its structure. A tuple of tensors, the common case, avoids torch's slow recursion."""
    return (list(batch), _tuple_spec(len(batch))) if _is_plain(batch) else tree_flatten(batch)


def _is_plain(batch: Any) -> bool:
    return type(batch) is tuple and all([type(leaf) is Tensor for leaf in batch])


@cache
def _tuple_spec(length: int) -> Any:
    return tree_flatten((0,) * length)[1]


def split_tensors(batch: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors of a batch, and a function that rebuilds a batch from such tensors."""
    if _is_plain(batch):
        return list(batch), tuple
    leaves, spec = tree_flatten(batch)
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
    leaves, spec = tree_flatten(batch)
    kinds = [f"{type(x).__name__}{list(x) if isinstance(x, Mapping) else ''}" for x in leaves]
    return [x for x in leaves if isinstance(x, Tensor)], f"{spec} {kinds}"


def same(first: Any, second: Any) -> bool:
    """Whether two batches hold the same bits."""
    a, spec_a = tree_flatten(first)
    b, spec_b = tree_flatten(second)
    return spec_a == spec_b and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y
        for x, y in zip(a, b, strict=True)
    )


def to_dtype(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating-point tensors in `dtype`."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, batch)
