"""The order of a graph's operators, as far as it decides what is held: large results are computed where they are read.

Second derivatives by reverse over reverse go through the layers twice. On their way up they compute one of the two
products that a weight's derivative is the sum of, and read it on their way down: all weights' worth of memory, held for
half of the time, where what the product is made of is often smaller and held anyway.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from mgd.autodiff.graphs import draws, is_symbolic, is_view


def compute_late(module: fx.GraphModule) -> fx.GraphModule:
    """Move each operator to its first reader, where the result takes more bytes than what has to be held for it; views,
    which take none, always.

    Changes the order of `module`, a graph without mutation, in place and returns it. No result changes a bit.
    """
    for node in reversed(list(module.graph.nodes)):
        if not _can_wait(node):
            continue
        first = min(node.users)  # nodes compare by where they stand
        if first.op != "output" and (is_view(node) or _bytes(node) > _held_for(node, first)):
            first.prepend(node)
    module.recompile()
    return module


def _can_wait(node: fx.Node) -> bool:
    """Whether nothing but its readers depends on where the operator stands."""
    plain = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
    return plain and bool(node.users) and not draws(node)


def _held_for(node: fx.Node, place: fx.Node) -> int:
    """Bytes of what the node reads and nothing else from `place` on."""
    sources = {source for source in map(_memory, node.all_input_nodes) if source.op == "call_function"}
    return sum(_bytes(x) for x in sources if max(reader for reader in _readers(x) if reader is not node) < place)


def _bytes(node: fx.Node) -> int:
    """Of a result whose size does not depend on data; 0 of several, which are not moved."""
    value = node.meta.get("val")
    return value.nbytes if isinstance(value, Tensor) and not is_symbolic(value) else 0


def _memory(node: fx.Node) -> fx.Node:
    """The node whose result a chain of views shows."""
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads the node's memory, and the node itself."""
    yield node
    for user in node.users:
        yield user
        if is_view(user):
            yield from _readers(user)
