"""Rewriting traced graphs: what nobody reads goes, and what all directions share is computed once."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def clean(module: fx.GraphModule) -> fx.GraphModule:
    """Drop views and sums that change nothing, and results that nobody reads, of convolutions among others."""
    graph = module.graph
    for node in graph.nodes:
        if node.target is aten.add.Tensor:
            _drop_zeros(node)
        elif node.target in (aten.alias.default, aten.detach.default):
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.t.default and getattr(node.args[0], "target", None) is aten.t.default:
            node.replace_all_uses_with(node.args[0].args[0])
    _drop_unread(graph)
    module.recompile()
    return module


def _drop_unread(graph: fx.Graph) -> None:
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.target is aten.convolution_backward.default:
            *args, mask = node.args
            read = {user.args[1] for user in node.users if user.target is operator.getitem}
            node.args = (*args, [wanted and i in read for i, wanted in enumerate(mask)])


def _drop_zeros(add: fx.Node) -> None:
    """Let the sum with a tensor of zeros be the other summand: torch adds the cotangents of what has no influence."""
    for zeros, x in (add.args, add.args[::-1]):
        if not (isinstance(zeros, fx.Node) and isinstance(x, fx.Node)) or zeros.target not in _ZEROS or add.kwargs:
            continue
        (a, b), readers = (node.meta.get("val") for node in (add, x)), [*add.users, *x.users, *zeros.users]
        if a is None or b is None or any(map(_changes, readers)):
            continue
        if (a.shape, a.stride(), a.dtype) != (b.shape, b.stride(), b.dtype):
            continue
        add.replace_all_uses_with(x)
        return


_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)


def _changes(node: fx.Node) -> bool:
    """Whether the operator may change what it is given."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def without_mutation(module: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The same computation with every in-place operator made one that returns its result."""
    return clean(make_fx(torch.func.functionalize(module))(*inputs))


class PerDirection:
    """A graph in two parts: what depends on no direction, run once, and the rest, run for each direction.

    module: a graph without mutation whose first `shared` inputs depend on no direction and whose first output is the
    loss. Of the 8 matmuls that a linear layer's Hessian-vector product costs, 2 are shared.
    optimized(part, exact): makes each part faster; the first `exact` outputs, the loss, keep their bits.
    """

    def __init__(
        self, module: fx.GraphModule, shared: int, optimized: Callable[[fx.GraphModule, int], Callable[..., tuple]]
    ):
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        varying = dependents(module.graph, placeholders[shared:])
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        loss, *results = output.args[0]
        nodes = [node for node in module.graph.nodes if node.op != "output"]
        own = [node for node in nodes if node in varying and node.op != "placeholder"]
        read = {x for node in own for x in node.all_input_nodes} | {x for x in results if isinstance(x, fx.Node)}
        boundary = [node for node in nodes if node in read and node not in varying]
        once = [node for node in nodes if node not in varying and node.op != "placeholder"]
        self.once = optimized(part(module, placeholders[:shared], once, [loss, *boundary]), 1)
        self.each = optimized(part(module, [*boundary, *placeholders[shared:]], own, results), 0)

    def __call__(self, inputs: Sequence[Tensor], directions: Iterable[Sequence[Tensor]]) -> tuple[Tensor, list[tuple]]:
        loss, *boundary = self.once(*inputs)
        return loss, [self.each(*boundary, *direction) for direction in directions]


def dependents(graph: fx.Graph, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """The sources and every node that is computed from one."""
    found = set(sources)
    for node in graph.nodes:
        if any(x in found for x in node.all_input_nodes):
            found.add(node)
    return found


def ancestors(nodes: Iterable[object]) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if isinstance(node, fx.Node) and node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


def is_symbolic(x: Tensor) -> bool:
    """Whether a size of the tensor depends on data."""
    return any(isinstance(size, torch.SymInt) for size in x.shape)


def is_view(node: fx.Node) -> bool:
    """Whether the node's result shares memory with its first argument's."""
    if node.target is operator.getitem:
        return is_view(node.args[0])  # type: ignore[arg-type]
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def part(
    module: fx.GraphModule, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node | None]
) -> fx.GraphModule:
    """A graph of its own with these inputs, computing these nodes, in order, and returning these outputs."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node, copy in copies.items():
        copy.meta = dict(node.meta)  # shapes and dtypes, as node_copy keeps them
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] if isinstance(node, fx.Node) else node for node in outputs))
    _drop_unread(graph)
    return fx.GraphModule(module, graph)


def chained(
    module: fx.GraphModule,
    inputs: Sequence[fx.Node],
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    handed: Sequence[fx.Node],
    then: fx.GraphModule,
) -> fx.GraphModule:
    """`part(module, inputs, nodes, [*outputs, *handed])`, and `then` on its inputs and what it hands on, in one graph.

    then: a graph of the inputs, of which there may be fewer, and of `handed`. Returns `outputs` and its results.
    """
    graph = part(module, inputs, nodes, [*outputs, *handed]).graph
    (end,) = (node for node in graph.nodes if node.op == "output")
    own, given = [node for node in graph.nodes if node.op == "placeholder"], end.args[0][len(outputs) :]
    places = [node for node in then.graph.nodes if node.op == "placeholder"]
    count = len(places) - len(handed)
    copies = dict(zip(places, [*own[:count], *given], strict=True))
    with graph.inserting_before(end):
        for node in then.graph.nodes:
            if node.op == "output":
                results = [copies[x] if isinstance(x, fx.Node) else x for x in node.args[0]]
            elif node.op != "placeholder":
                copies[node] = graph.node_copy(node, copies.__getitem__)
    end.args = ((*end.args[0][: len(outputs)], *results),)
    return fx.GraphModule(module, graph)  # with the constants that either of them reads
