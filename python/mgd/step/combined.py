"""Buffers that a step of several microbatches changes.

Each microbatch begins with the buffers from before the step. A floating-point buffer becomes the mean of what they
leave of it, each weighted by its share of the examples; any other is what all of them leave. So it does not count who
evaluates which, and in which order, and running statistics move once a step, whatever the number of microbatches.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mgd.errors import BadArgument
from mgd.ranks.shards import Shards
from mgd.step.model import Buffers, differentiable
from mgd.step.reads import Reads

AVERAGED = "running_mean", "running_var"  # torch's norms, of which a mean is what anybody expects


def changed(before: Buffers, left: Iterable[Buffers]) -> list[str]:
    """The names of the buffers that some of these evaluations replaced or wrote to."""
    found = list(left)
    return [name for name, tensor in before.items() if any([each[name] is not tensor for each in found])]


def after_step(
    shards: Shards,
    before: Buffers,
    left: Sequence[Buffers],
    shares: Sequence[float],
    names: Sequence[str],
    reads: Reads,
    first: bool,
) -> Buffers:
    """The buffers after a step.

    left: what each own microbatch leaves. shares: of all microbatches. names: of the buffers that any of them changed.
    first: whether to warn of a mean that perhaps nobody expects. Raises BadArgument where the buffers of microbatches
    cannot be combined.
    """
    if not names:
        return before
    if shards.microbatches == 1:
        return left[0]
    for name in names:
        for each in left:
            if each[name].shape != before[name].shape or each[name].dtype != before[name].dtype:
                raise BadArgument(
                    f"expected buffers that keep shape and dtype, with microbatches={shards.microbatches}; a step "
                    f"changes those of {name!r}. Use microbatches=1"
                )
    rows = shards.of_all([[each[name] for name in names] for each in left])
    floats, combined = set(differentiable(before)), dict(before)
    for i, name in enumerate(names):
        found = [row[i] for row in rows]
        combined[name] = _mean(found, shares) if name in floats else found[0]
        if name not in floats:
            reads.later(_differ(found), functools.partial(_refuse, name))
        elif first and name.rpartition(".")[2] not in AVERAGED:
            reads.later(_differ(found), functools.partial(_warn, name))
    return combined


def after_tangents(shards: Shards, left: Sequence[Sequence[Tensor]], shares: Sequence[float]) -> list[Tensor]:
    """The tangents of the floating-point buffers after a step that changes some buffers, from those that each own
    microbatch leaves."""
    if shards.microbatches == 1 or not left[0]:
        return list(left[0])
    return [_mean(each, shares) for each in zip(*shards.of_all(left), strict=True)]


def _mean(each: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean. What all have is that very number."""
    total, alike = each[0] * shares[0], torch.ones_like(each[0], dtype=torch.bool)
    for x, share in zip(each[1:], shares[1:], strict=True):
        total, alike = total + x * share, alike & (x == each[0])
    return torch.where(alike, each[0], total)


def _differ(each: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x != each[0]).any() for x in each[1:]])


def _refuse(name: str, differ: list[float]) -> None:
    if any(differ):
        raise BadArgument(
            f"expected all microbatches of a step to leave {name!r} alike, since it has no mean: it is not "
            "floating-point. Count what they have in common, such as steps, or use microbatches=1"
        )


def _warn(name: str, differ: list[float]) -> None:
    if any(differ):
        warnings.warn(
            f"the microbatches of a step leave the buffer {name!r} differently: each begins with what the step before "
            "left, and the step leaves their mean, weighted by examples",
            RuntimeWarning,
            stacklevel=2,
        )
