"""Where examples are drawn from, and which of them are kept by their ratings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mgd.errors import BadArgument

Sampler = Callable[[int, torch.Generator], Any]


def sampler(source: Any, what: str) -> Sampler:
    """`source` as a function `(n, generator) -> examples`, a pytree of tensors `[n, ...]`; if it is none, it is such a
    pytree itself, from which examples are drawn with replacement. what: its name in errors."""
    if callable(source):

        def checked(n: int, generator: torch.Generator) -> Any:
            examples = source(n, generator)
            if (found := lengths(examples)) != {n}:
                raise BadArgument(f"expected {what}({n}, generator) to give {n} examples; got {sorted(found)}")
            return examples

        return checked
    found = lengths(source)
    if len(found) != 1:
        raise BadArgument(f"expected {what} to hold tensors with one common first dimension; got {sorted(found)}")
    total = found.pop()
    if total < 1:
        raise BadArgument(f"expected {what} to hold examples; it is empty")

    def draw(n: int, generator: torch.Generator) -> Any:
        index = torch.randint(total, (n,), generator=generator)
        return tree_map(lambda x: x[index.to(x.device)], source)

    return draw


def lengths(examples: Any) -> set[int]:
    """The first dimensions of the tensors of a pytree."""
    return {leaf.shape[0] if leaf.ndim else 0 for leaf in tree_leaves(examples) if isinstance(leaf, Tensor)}


def keep_best(ratings: Tensor, share: float) -> Tensor:
    """The indices of the best rated `share` of the examples, best first; at least one."""
    if ratings.ndim != 1 or not len(ratings) or not bool(torch.isfinite(ratings).all()):
        raise BadArgument(f"expected finite ratings [n] of at least one example; got {list(ratings.shape)}")
    if not 0 < share <= 1:
        raise BadArgument(f"expected a share in (0, 1]; got {share}")
    return ratings.argsort(descending=True, stable=True)[: max(1, round(share * len(ratings)))]


def acceptance(quantile: Tensor, keep: int, batch: int) -> Tensor:
    """The chance that an example is among the best `keep` of a batch of `batch` random ones, by the quantile of its
    rating among all: filtering batch by batch, with each example decided on alone (arXiv 2505.17895).

    At most `keep - 1` of the others, each better with probability `1 - quantile`, may be better.
    """
    if not 1 <= keep <= batch:
        raise BadArgument(f"expected 1 <= keep <= batch; got {keep}, {batch}")
    q = quantile.double()
    terms = [math.comb(batch - 1, s) * (1 - q) ** s * q ** (batch - 1 - s) for s in range(keep)]
    return torch.stack(terms).sum(0)
