"""One graph of a whole step, cut where the direction enters: what the training computes, the reverse sweep need not.

The second derivatives of a step begin with the step's own forward and backward pass (2 of the 8 matrix products of a
linear layer). Here the gradient that trains comes from the same graph as the second derivatives, in three parts: the
loss and what the others read; the gradients of the weights; the second derivatives in a direction. What the first part
has computed is kept for the third where memory allows, and computed again, to the same bits, where it does not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx

from mgd.autodiff.accumulation import accumulate_products
from mgd.autodiff.execution import below_autograd, compiled
from mgd.autodiff.graphs import ancestors, chained, dependents, is_symbolic, is_view, part
from mgd.step.evaluator import SecondDerivatives


class JointGraph:
    """The graph in its parts.

    graph: without mutation; its first `fixed` inputs depend on no direction, its outputs are the loss, the gradient of
    each parameter, the buffers left behind (`counts` of both), and what depends on directions: the second derivatives
    and `<gradient, direction>`.
    """

    def __init__(self, graph: fx.GraphModule, fixed: int, counts: tuple[int, int], compile: bool):
        nodes = list(graph.graph.nodes)
        places = [node for node in nodes if node.op == "placeholder"]
        outputs = list(next(node for node in nodes if node.op == "output").args[0])
        own = [node for node in nodes if node.op not in ("placeholder", "output")]
        grads = outputs[1 : 1 + counts[0]]
        left, results = outputs[1 + counts[0] : 1 + sum(counts)], outputs[1 + sum(counts) :]
        varying = dependents(graph.graph, places[fixed:])
        third = [node for node in own if node in varying]
        read = {x for node in third for x in node.all_input_nodes} | {x for x in results if isinstance(x, fx.Node)}
        needed = ancestors([outputs[0], *left, *(x for x in read if x not in varying)])
        for_grads = ancestors(grads)
        # An operator with several results belongs to one part, with all of them.
        needed |= {n for n in for_grads if n.target is operator.getitem and n.args[0] in needed}
        second = [node for node in own if node in for_grads and node not in needed]
        first = [node for node in own if node in needed]
        second, second_reads = _with_sources(own, second, grads, is_view)
        third, third_reads = _with_sources(own, third, results, is_view)
        refresh, sources = _with_sources(own, [], third_reads, _is_cheap)
        if _bytes(third_reads) < _WORTHWHILE * _bytes(sources):
            refresh, sources = [], third_reads
        kept = list(dict.fromkeys([*second_reads, *sources]))
        self.counts, self.compile = counts, compile
        # A tensor that only the gradients of the weights read need not be kept for the third part.
        self._sources = [kept.index(node) for node in sources]
        fixed_places, read = places[:fixed], ancestors([outputs[0], *third_reads])
        again = [node for node in own if node in read]
        each = part(graph, [*places, *third_reads], third, results)
        if not compile:
            accumulate_products(each, 0)
        finished = compiled if compile else operator.attrgetter("forward")
        self._forward = finished(part(graph, fixed_places, first, [outputs[0], *left, *kept]))
        self._weights = finished(part(graph, [*fixed_places, *kept], second, grads))
        # The third part, from the inputs and from what was kept: in one graph, which frees what it has read, for one
        # direction, and in two for several.
        self._each = finished(each)
        self._recompute = finished(part(graph, fixed_places, again, [outputs[0], *third_reads]))
        self._recompute_once = finished(chained(graph, places, again, outputs[:1], third_reads, each))
        self._refresh = finished(part(graph, [*fixed_places, *sources], refresh, third_reads))
        self._refresh_once = finished(chained(graph, [*places, *sources], refresh, [], third_reads, each))

    def forward(
        self, parameters: list[Tensor], given: list[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor | None], list[Tensor], list[Tensor]]:
        """The loss, its gradient, the buffers left behind, and the residuals to keep.

        given: buffers, metaparameters and constants.
        """
        with below_autograd(not self.compile):
            loss, *rest = self._forward(*parameters, *given)
            left, residuals = rest[: self.counts[1]], rest[self.counts[1] :]
            grads = self._weights(*parameters, *given, *residuals)
        return loss, grads, left, [residuals[i] for i in self._sources]

    def recompute_hvp(
        self, parameters: list[Tensor], given: list[Tensor], directions: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, SecondDerivatives]:
        """The loss, and for each direction (and cotangents of the buffers) the second derivatives over parameters,
        buffers and metaparameters, and last `<gradient, direction>`."""
        with below_autograd(not self.compile):
            if len(directions) == 1:
                loss, *result = self._recompute_once(*parameters, *given, *directions[0])
                return loss, [result]
            loss, *read = self._recompute(*parameters, *given)
            return loss, [list(self._each(*parameters, *given, *way, *read)) for way in directions]

    def hvp_from_residuals(
        self,
        parameters: list[Tensor],
        given: list[Tensor],
        residuals: Sequence[Tensor],
        directions: Sequence[Sequence[Tensor]],
    ) -> SecondDerivatives:
        """The second derivatives of `recompute_hvp`, from the residuals of `forward` at the same tensors."""
        with below_autograd(not self.compile):
            if len(directions) == 1:
                return [list(self._refresh_once(*parameters, *given, *directions[0], *residuals))]
            read = self._refresh(*parameters, *given, *residuals)
            return [list(self._each(*parameters, *given, *way, *read)) for way in directions]


# Beside elementwise and this package's own ones, operators that take about as long as reading what they read.
_LIGHT = {
    f"aten::{name}"
    for name in """cat clone constant_pad_nd fill full_like zeros_like sum mean var_mean amax _softmax _log_softmax
    _softmax_backward_data avg_pool2d avg_pool2d_backward max_pool2d_with_indices_backward native_layer_norm
    native_layer_norm_backward native_group_norm native_group_norm_backward native_batch_norm
    native_batch_norm_backward""".split()
}


def _is_cheap(node: fx.Node) -> bool:
    """Whether the node's result is better computed again than kept, as far as its operator tells."""
    if node.target is operator.getitem:
        return _is_cheap(node.args[0])  # type: ignore[arg-type]
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
        return is_view(node)
    name = node.target._schema.name
    return (
        is_view(node) or torch.Tag.pointwise in node.target.tags or name in _LIGHT or name.startswith("mgd_kernels::")
    )


# To compute cheap results again takes time; to keep them takes memory, and the time to touch it. Computing again paid
# at 5 times the memory (convnets), and not at 2 (transformers and MLPs; docs/speed.md).
_WORTHWHILE = 3


def _bytes(nodes: Iterable[fx.Node]) -> int:
    """Of results whose sizes do not depend on data."""
    values = [node.meta.get("val") for node in nodes]
    return sum(x.nbytes for x in values if isinstance(x, Tensor) and not is_symbolic(x))


def _with_sources(
    order: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[object], again: Callable[[fx.Node], bool]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes, with those that they read and that are to be computed again; and the others that are read then.

    again: true of views in any case. A view of a parameter must not be kept: the parameter moves on.
    """
    own, read = set(nodes), dict[fx.Node, None]()
    stack = [x for node in nodes for x in node.all_input_nodes] + [x for x in outputs if isinstance(x, fx.Node)]
    while stack:
        node = stack.pop()
        if node in own or node.op == "placeholder":
            continue
        if node.op == "get_attr" or again(node):
            own.add(node)
            stack += node.all_input_nodes
        else:
            read[node] = None
    return [node for node in order if node in own], [node for node in order if node in read]
