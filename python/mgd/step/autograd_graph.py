"""A look at the autograd graph behind a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# The code of what @once_differentiable makes of a backward function.
_ONCE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__


def precision_of(loss: Tensor) -> float:
    """The machine epsilon of the coarsest dtype in the autograd graph of a loss.

    Raises where the loss went through an autograd.Function that is only once differentiable: torch does so in
    `.backward()`, but silently leaves the terms out of `torch.autograd.grad`.
    """
    precision = 0.0
    for node in graph_of(loss):
        function: Any = getattr(node, "_forward_cls", None)
        if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE:
            raise NotImplementedError(f"derivative for {function.__name__} is not implemented: once_differentiable")
        for metadata in getattr(node, "_input_metadata", ()):
            if metadata.dtype.is_floating_point:
                precision = max(precision, torch.finfo(metadata.dtype).eps)
    return precision


def graph_of(loss: Tensor) -> Iterator[Any]:
    """The nodes of the autograd graph behind a tensor."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [following for following, _ in node.next_functions]
