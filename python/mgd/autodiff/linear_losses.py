"""Losses whose logits need not be held: cross-entropy of a linear layer, found in a captured graph.

`F.cross_entropy(model(x).flatten(0, 1), y.flatten())` names no linear layer, but its graph has one. Where nothing else
reads the logits, both become one call, which holds a strip of them at a time (`mgd_kernels.functional`). It rounds
otherwise, so this is for captures that may.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mgd_kernels import functional

MANY_LOGITS = 1 << 24  # 64 MiB in float32: above, memory is worth a few more products

_LINEAR = (F.linear, torch._C._nn.linear)
# Of a tensor whose last dimension stays as it is: the order of its rows stays, too.
_RESHAPES = ("view", "reshape", "flatten", "contiguous", "float", torch.flatten, torch.reshape)


def without_logits(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph of torch functions, in which such losses are calls of `linear_then_cross_entropy`."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for loss in [node for node in graph.nodes if node.target is F.cross_entropy]:
        arguments = inspect.signature(F.cross_entropy).bind(*loss.args, **loss.kwargs).arguments
        logits = arguments.pop("input")
        found = _linear(logits)
        if found is None or any(arguments.pop(name, None) is not None for name in ("weight", "size_average", "reduce")):
            continue
        linear, rows = found
        hidden, weight, *bias = linear.args
        with graph.inserting_before(loss):
            if rows is not None:
                hidden = graph.call_function(operator.getitem, (hidden, rows))
            target = arguments.pop("target")
            call = graph.call_function(
                linear_then_cross_entropy, (hidden, weight, bias[0] if bias else None, target), arguments
            )
        call.meta = dict(loss.meta)
        loss.replace_all_uses_with(call)
        graph.erase_node(loss)
        while not logits.users:  # as far as the linear layer; what draws random numbers stays
            last, logits = logits, logits.args[0]
            graph.erase_node(last)
            if last is linear:
                break
    return fx.GraphModule(module, graph)


def _linear(logits: fx.Node) -> tuple[fx.Node, Any] | None:
    """The linear layer whose rows these are, and which of them, as an index; None where there is none to find."""
    node, rows, vocabulary = logits, None, _value(logits).shape[-1]
    while len(node.users) == 1:
        if node.target in _LINEAR:
            plain = not node.kwargs and _value(node).shape[-1] == vocabulary
            return (node, rows) if plain and _class_indices_follow(logits) else None
        if node.target is operator.getitem and rows is None and _leading(node):
            rows = node.args[1]
        elif node.target not in _RESHAPES or rows is not None or _value(node).shape[-1] != vocabulary:
            return None
        elif _value(node).dtype is not _value(node.args[0]).dtype:
            return None
        node = node.args[0]  # type: ignore[assignment]
    return None


def _class_indices_follow(logits: fx.Node) -> bool:
    """Whether the logits are rows: with more dimensions, the classes would stand in the second."""
    return _value(logits).ndim == 2


def _leading(node: fx.Node) -> bool:
    """Whether an index takes slices of leading dimensions alone."""
    index, source = node.args[1], _value(node.args[0])
    index = index if isinstance(index, tuple) else (index,)
    return len(index) < source.ndim and all(isinstance(x, slice) for x in index)


def _value(node: Any) -> Tensor:
    return node.meta["example_value"]


def linear_then_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int = -100, **options: Any
) -> Tensor:
    """`F.cross_entropy` of the rows of a linear layer's outputs, which are held where they are not many."""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if target.is_floating_point() or len(hidden) * len(weight) < MANY_LOGITS:
        return F.cross_entropy(F.linear(hidden, weight, bias), target, ignore_index=ignore_index, **options)
    return functional.linear_cross_entropy(hidden, weight, target, bias, ignore_index=ignore_index, **options)
