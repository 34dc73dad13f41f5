"""Drawing examples, and selecting them by their ratings."""

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
    """A function `(n, generator) -> examples`, a pytree of tensors `[n, ...]`.

    source: such a function, or a pytree of tensors `[N, ...]` from which to draw with replacement. what: the name of
    the source in errors.

    Raises BadArgument if the tensors have no common length, or there are none; the function, if it returns another
    number of examples.
    """
    if callable(source):

        def checked(n: int, generator: torch.Generator) -> Any:
            examples = source(n, generator)
            if (sizes := lengths(examples)) != {n}:
                raise BadArgument(f"expected {what}({n}, generator) to return {n} examples; got {sorted(sizes)}")
            return examples

        return checked
    sizes = lengths(source)
    if len(sizes) != 1:
        raise BadArgument(f"expected {what} to hold tensors with one common first dimension; got {sorted(sizes)}")
    (total,) = sizes
    if total < 1:
        raise BadArgument(f"expected {what} to hold examples; it is empty")

    def draw(n: int, generator: torch.Generator) -> Any:
        index = torch.randint(total, (n,), generator=generator, device="cpu")
        return tree_map(lambda x: x[index.to(x.device)], source)

    return draw


def lengths(examples: Any) -> set[int]:
    """The different lengths of the first dimension among the tensors of a pytree; 0 for a tensor without dimensions."""
    return {leaf.shape[0] if leaf.ndim else 0 for leaf in tree_leaves(examples) if isinstance(leaf, Tensor)}


def keep_best(ratings: Tensor, share: float) -> Tensor:
    """int64 `[m]`: the indices of the `share` of examples with the highest ratings, best first; at least one.

    ratings: `[n]`, finite. Raises BadArgument if they are not, or if the share is not in (0, 1].
    """
    if ratings.ndim != 1 or not len(ratings) or not bool(torch.isfinite(ratings).all()):
        raise BadArgument(f"expected finite ratings [n] of at least one example; got {list(ratings.shape)}")
    if not 0 < share <= 1:
        raise BadArgument(f"expected a share in (0, 1]; got {share}")
    return ratings.argsort(descending=True, stable=True)[: max(1, round(share * len(ratings)))]


def acceptance(quantile: Tensor, keep: int, batch: int) -> Tensor:
    """The probability that an example is among the best `keep` of a batch of `batch` random examples.

    This filters batch by batch while each example is decided on its own (arXiv 2505.17895). At most `keep - 1` of the
    others may be better, and each is better with probability `1 - quantile`.

    quantile: the quantile of the example's rating among all, any shape. Returns float64 of the same shape. Raises
    BadArgument unless 1 <= keep <= batch.
    """
    if not 1 <= keep <= batch:
        raise BadArgument(f"expected 1 <= keep <= batch; got keep={keep} and batch={batch}")
    q = quantile.double()
    terms = [math.comb(batch - 1, s) * (1 - q) ** s * q ** (batch - 1 - s) for s in range(keep)]
    return torch.stack(terms).sum(0)
