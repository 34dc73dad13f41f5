"""Rewriting traced graphs: removing what is never read, and computing once what all directions share."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def clean(module: fx.GraphModule) -> fx.GraphModule:
    """Remove views and sums that change nothing, and results that are never read, including those of convolutions and
    of losses without logits."""
    graph = module.graph
    for node in graph.nodes:
        if node.target is aten.add.Tensor:
            _drop_zeros(node)
        elif node.target in (aten.alias.default, aten.detach.default):
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.t.default and getattr(node.args[0], "target", None) is aten.t.default:
            node.replace_all_uses_with(node.args[0].args[0])
    _join_losses(graph)
    _drop_unread(graph)
    module.recompile()
    return module


def _join_losses(graph: fx.Graph) -> None:
    """Losses without logits and their gradients become one operator, which computes the logits once, where the
    cotangents of the losses do not depend on these: weights of tokens, say."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for forward in [node for node in graph.nodes if str(node.target) == f"{_LOSSES}.default"]:
        parts = {user.args[1]: user for user in forward.users}
        readers = parts[1].users if 1 in parts else ()  # of the statistics
        gradients = [node for node in readers if str(node.target) == f"{_LOSSES}_backward.default"]
        if not gradients:
            continue
        backward = min(gradients, key=order.__getitem__)
        needed = ancestors([backward.args[0]])
        for node in needed:
            _free_of_its_input(node)
        needed = ancestors([backward.args[0]])
        later = [node for node in graph.nodes if node in needed and order[node] > order[forward]]
        if forward in needed or any(draws(node) or _changes(node) for node in later):
            continue
        for node in later:
            forward.prepend(node)
        gl, *tensors = backward.args[:5]
        with graph.inserting_before(forward):
            both = graph.call_function(
                torch.ops.mgd_kernels.linear_cross_entropy_with_gradients.default,
                (gl, *tensors, *backward.args[6:]),
            )
            results = [graph.call_function(operator.getitem, (both, i)) for i in range(5)]
        users = {**parts, **{2 + user.args[1]: user for user in backward.users}}
        both.meta["val"] = (*forward.meta["val"], *backward.meta["val"])
        for i, user in users.items():
            results[i].meta = dict(user.meta)
            user.replace_all_uses_with(results[i])


_LOSSES = "mgd_kernels.linear_cross_entropy"


def _free_of_its_input(node: fx.Node) -> None:
    """The cotangent 1 of a loss depends on it in form alone."""
    x = node.meta.get("val")
    if node.target is aten.ones_like.default and isinstance(x, Tensor) and x.ndim == 0:
        node.target, node.args = aten.ones.default, ([],)
        node.kwargs = {"dtype": x.dtype, "layout": x.layout, "device": x.device, "pin_memory": False}


def _drop_unread(graph: fx.Graph) -> None:
    graph.eliminate_dead_code()
    for node in reversed(list(graph.nodes)):
        if node.target is aten.convolution_backward.default:
            *args, mask = node.args
            read = {user.args[1] for user in node.users if user.target is operator.getitem}
            node.args = (*args, [computed and i in read for i, computed in enumerate(mask)])
        elif str(node.target).startswith("mgd_kernels."):
            _drop_parameters(node)


def _drop_parameters(node: fx.Node) -> None:
    """Where the last two results of an operator, asked for as `parameters`, are not read, do not ask for them."""
    schema = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    places: dict[fx.Node, Any] = {user: user.args[1] for user in node.users if user.target is operator.getitem}
    last = [user for user, place in places.items() if place >= len(schema.returns) - 2]
    if "parameters" not in names or any(user.users for user in last):
        return
    for user in last:
        node.graph.erase_node(user)
    unread = {"parameters": False, "gw": None, "gb": None}
    node.args = tuple(unread.get(name, arg) for name, arg in zip(names, node.args, strict=True))


def _drop_zeros(add: fx.Node) -> None:
    """Replace a sum with zeros by its other summand. Torch adds zero cotangents of tensors that have no influence."""
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
    """Whether the operator may change its inputs."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def traced(function: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The graph of a function of tensors, with fake ones, without mutation as far as that can be, and cleaned."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    if not without_mutation(module):
        module = make_fx(torch.func.functionalize(module), tracing_mode="fake")(*inputs)
    clean(module)
    return module


def without_mutation(module: fx.GraphModule) -> bool:
    """Replace operators that change a tensor in place, as dropout does with a new mask, by those that return another.

    Only where the tensor is a result of the graph without views, whose dtype no other tensor changes. Returns whether
    all could be replaced; what could not needs a second trace.
    """
    graph = module.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    drawn: set[fx.Node] = set()  # views of what nothing else reads
    complete = True
    for node in [node for node in graph.nodes if _changes(node)]:
        base, other = node.args[0], _out_of_place(node.target)
        dims = _memory_order(node.meta["val"]) if draws(node) else None
        if (
            other is None
            or base.op != "call_function"
            or (is_view(base) and base not in drawn)
            or any(map(is_view, base.users.keys() - {node}))
            or any(x.meta["val"].dtype not in (base.meta["val"].dtype, torch.bool) for x in node.all_input_nodes)
            or dims == ()
            or (dims and node.target is not aten.bernoulli_.float)
        ):
            complete = False
            continue
        with graph.inserting_before(node):
            result = _called(graph, other, node, dims)
        if dims:
            drawn.add(result)
        result.meta = dict(node.meta)
        base.replace_all_uses_with(result, lambda user, since=order[node]: order.get(user, -1) > since)
        node.replace_all_uses_with(result)
        order[result] = order[node]
        graph.erase_node(node)
    module.recompile()
    return complete


def _memory_order(x: Tensor) -> tuple[int, ...] | None:
    """The dimensions as they lie in memory, the outermost first, in which random numbers are drawn in place; None where
    that is their order, () where the tensor has gaps."""
    order = tuple(sorted(range(x.ndim), key=lambda i: -x.stride()[i]))
    if not x.permute(order).is_contiguous():
        return ()
    return None if x.is_contiguous() else order


def _called(graph: fx.Graph, target: torch._ops.OpOverload, node: fx.Node, dims: tuple[int, ...] | None) -> fx.Node:
    """A call of `target` with the arguments of `node`; its first one, and the result, with dimensions in this order."""
    base, *rest = _all_arguments(node)
    if dims is None:
        return graph.call_function(target, (base, *rest), node.kwargs)
    inverse, value = [dims.index(i) for i in range(len(dims))], node.meta["val"].permute(dims)
    moved = graph.call_function(aten.permute.default, (base, list(dims)))
    drawn = graph.call_function(target, (moved, *rest), node.kwargs)
    moved.meta, drawn.meta = {**node.meta, "val": value}, {**node.meta, "val": value}
    return graph.call_function(aten.permute.default, (drawn, inverse))


def _all_arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of an operator, with those that are left to their defaults."""
    arguments = node.target._schema.arguments[len(node.args) :]  # type: ignore[union-attr]
    missing = itertools.takewhile(lambda x: not x.kwarg_only and x.name not in node.kwargs, arguments)
    return (*node.args, *(argument.default_value for argument in missing))


def _out_of_place(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """`aten::mul` of `aten::mul_`, if both take the same arguments."""
    name = target._schema.name
    packet = getattr(aten, name.removeprefix("aten::")[:-1], None) if name.endswith("_") else None

    def arguments(operator: torch._ops.OpOverload) -> list[tuple[str, str]]:
        return [(argument.name, str(argument.type)) for argument in operator._schema.arguments]

    for overload in packet.overloads() if packet else ():
        other = getattr(packet, overload)
        if not other._schema.is_mutable and arguments(other) == arguments(target):
            return other
    return None


def changes_inputs(graph: fx.Graph) -> bool:
    """Whether a functionalised graph writes to one of its inputs: it copies what it computed to it."""
    return any(
        node.target is aten.copy_.default and isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"
        for node in graph.nodes
    )


def dependents(graph: fx.Graph, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """The sources and every node that is computed from one of them."""
    nodes = set(sources)
    for node in graph.nodes:
        if any(x in nodes for x in node.all_input_nodes):
            nodes.add(node)
    return nodes


def ancestors(nodes: Iterable[object]) -> set[fx.Node]:
    """The nodes and everything that they are computed from. Entries that are not nodes are skipped."""
    result: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if isinstance(node, fx.Node) and node not in result:
            result.add(node)
            stack += node.all_input_nodes
    return result


def is_symbolic(x: Tensor) -> bool:
    """Whether a size of the tensor depends on data."""
    return any(isinstance(size, torch.SymInt) for size in x.shape)


def is_view(node: fx.Node) -> bool:
    """Whether the node's result shares memory with its first argument."""
    if node.target is operator.getitem:
        return is_view(node.args[0])  # type: ignore[arg-type]
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def draws(node: fx.Node) -> bool:
    """Whether the node takes random numbers, so that those of later nodes depend on it, whether or not it is read."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def part(
    module: fx.GraphModule, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node | None]
) -> fx.GraphModule:
    """A separate graph with these inputs, which computes these nodes, in order, and returns these outputs."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node, copy in copies.items():
        copy.meta = dict(node.meta)  # shapes and dtypes, which node_copy also keeps
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
    boundary: Sequence[fx.Node],
    then: fx.GraphModule,
) -> fx.GraphModule:
    """One graph that computes `part(module, inputs, nodes, [*outputs, *boundary])`, then `then` from the results.

    then: a graph whose inputs are a prefix of `inputs`, followed by `boundary`. The outputs of the whole are `outputs`
    and those of `then`.
    """
    graph = part(module, inputs, nodes, [*outputs, *boundary]).graph
    (end,) = (node for node in graph.nodes if node.op == "output")
    own, values = [node for node in graph.nodes if node.op == "placeholder"], end.args[0][len(outputs) :]
    placeholders = [node for node in then.graph.nodes if node.op == "placeholder"]
    count = len(placeholders) - len(boundary)
    copies = dict(zip(placeholders, [*own[:count], *values], strict=True))
    with graph.inserting_before(end):
        for node in then.graph.nodes:
            if node.op == "output":
                results = [copies[x] if isinstance(x, fx.Node) else x for x in node.args[0]]
            elif node.op != "placeholder":
                copies[node] = graph.node_copy(node, copies.__getitem__)
    end.args = ((*end.args[0][: len(outputs)], *results),)
    return fx.GraphModule(module, graph)  # with the constants that either graph reads
