"""One graph of a whole step, cut where the direction enters, so that the reverse sweep can reuse the training's work.

The second derivatives of a step begin with the step's own forward and backward pass (2 of the 8 matrix products of a
linear layer). Here the gradient that trains comes from the same graph as the second derivatives. The graph has two
parts: loss and gradient, with everything that the other part reads; and the second derivatives in a direction. The
results of the first part are kept for the second if memory allows. If not, they are recomputed, to the same bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx

from mgd.autodiff.device_graphs import DeviceGraphs
from mgd.autodiff.device_recording import Packed
from mgd.autodiff.execution import below_autograd, compiled, direct
from mgd.autodiff.graphs import ancestors, chained, dependents, draws, is_symbolic, is_view, part
from mgd.autodiff.order import compute_late
from mgd.autodiff.sums import add_in_place
from mgd.step.evaluator import SecondDerivatives

Residuals = Sequence[Tensor] | Packed


class JointGraph:
    """A step's graph in two parts.

    graph: without mutation. Its first `fixed` inputs depend on no direction. Its outputs are the loss, its derivatives
    with respect to each parameter and each metaparameter, the buffers as the step leaves them, the second derivatives,
    and last `<gradient, direction>`. counts: the numbers of parameters, metaparameters and buffers. compile: whether to
    compile the parts. on_device: records them where they are not compiled. residual_bytes: of what `forward` leaves
    behind for the second derivatives, as far as sizes do not depend on data. graph, fixed, counts, compile: as given.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        fixed: int,
        counts: tuple[int, int, int],
        compile: bool,
        on_device: DeviceGraphs | None = None,
    ):
        nodes = list(graph.graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        outputs = list(next(node for node in nodes if node.op == "output").args[0])
        own = [node for node in nodes if node.op not in ("placeholder", "output")]
        ends = list(accumulate(counts, initial=1))
        grads, influence, buffers = (outputs[a:b] for a, b in pairwise(ends))
        results, seen, left = outputs[ends[-1] :], [outputs[0], *influence], [*influence, *buffers]
        varying = dependents(graph.graph, placeholders[fixed:])
        second = [node for node in own if node in varying]
        read = {x for node in second for x in node.all_input_nodes} | {x for x in results if isinstance(x, fx.Node)}
        random = [node for node in own if draws(node) and node not in varying]
        shared = ancestors([*seen, *grads, *buffers, *random, *(x for x in read if x not in varying)])
        first = [node for node in own if node in shared]
        second, second_reads = _with_sources(own, second, results, is_view)
        refresh, sources = _with_sources(own, [], second_reads, _is_cheap)
        if _bytes(second_reads) < _WORTHWHILE * _bytes(sources):
            refresh, sources = [], second_reads
        self.graph, self.fixed, self.counts, self.compile = graph, fixed, counts, compile
        fixed_placeholders, read = placeholders[:fixed], ancestors([*seen, *random, *second_reads])
        again = [node for node in own if node in read]
        each = compute_late(part(graph, [*placeholders, *second_reads], second, results))
        if not compile:
            add_in_place(each)

        def executable(module: fx.GraphModule, *pieces: int, packs: bool = False) -> Callable[..., Any]:
            """pieces, packs: as of `DeviceGraphs.direct`."""
            if compile or on_device is None:
                return compiled(module) if compile else direct(module)
            return on_device.direct(module, *pieces, packs=packs)

        own_outputs = [outputs[0], *grads, *left]
        # The loss is held until it is read, and derivatives until they are added up.
        own_pieces, second_pieces = (1, counts[0] + counts[1], counts[2]), (len(results) - 1, 1)
        self._forward = executable(
            part(graph, fixed_placeholders, first, [*own_outputs, *sources]), *own_pieces, len(sources), packs=True
        )

        def without_residuals(wanted: list[fx.Node | None], *pieces: int) -> Any:
            needed = ancestors([*wanted, *random])
            nodes = [node for node in own if node in needed]
            return executable(part(graph, fixed_placeholders, nodes, wanted), *pieces)

        # To compile these, too, takes as long again.
        self._bare = self._alone = None if compile else without_residuals(own_outputs, *own_pieces)
        if influence and not compile:
            self._alone = without_residuals([outputs[0], *grads, *buffers], 1, counts[0], counts[2])
        self.residual_bytes = _bytes(sources)
        # The second part, from the inputs alone (recompute) or from the residuals too (refresh). For one direction, it
        # is one graph, which frees what it has read; for several, it is two.
        self._each = executable(each, *second_pieces)
        self._recompute = executable(
            part(graph, fixed_placeholders, again, [*seen, *second_reads]), len(seen), len(second_reads)
        )
        self._recompute_once = executable(
            chained(graph, placeholders, again, seen, second_reads, each), len(seen), *second_pieces
        )
        self._refresh = executable(
            part(graph, [*fixed_placeholders, *sources], refresh, second_reads), len(second_reads)
        )
        self._refresh_once = executable(
            chained(graph, [*placeholders, *sources], refresh, [], second_reads, each), *second_pieces
        )

    def forward(
        self, parameters: list[Tensor], inputs: list[Tensor], room: int | None = None, compared: bool = True
    ) -> tuple[Tensor, Sequence[Tensor | None], Sequence[Tensor | None], list[Tensor], Residuals | None]:
        """The loss, its derivatives with respect to parameters and to metaparameters, the buffers as the step leaves
        them, and the residuals to keep; None in their place where they need not be held, since they would take more
        bytes than `room`.

        inputs: buffers, metaparameters and constants. compared: whether the derivatives with respect to metaparameters
        are wanted; where they are not, and there is no room, they are not computed, unless compiled.
        """
        if room == 0 and not compared and self._alone is not None:
            with below_autograd():
                loss, *rest = self._alone(*parameters, *inputs)
            return loss, rest[: self.counts[0]], (), rest[self.counts[0] :], None
        bare = self._bare if room is not None and self.residual_bytes > room else None
        with below_autograd(not self.compile):
            loss, *rest = (bare or self._forward)(*parameters, *inputs)
        first, second, third = accumulate(self.counts)
        kept = rest[third:]
        residuals: Residuals | None = None if bare else kept[0] if kept and type(kept[0]) is Packed else kept
        return loss, rest[:first], rest[first:second], rest[second:third], residuals

    def recompute_hvp(
        self, parameters: list[Tensor], inputs: list[Tensor], directions: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, Sequence[Tensor | None], SecondDerivatives]:
        """The loss, its derivatives with respect to metaparameters, and for each direction the second derivatives with
        respect to parameters, buffers and metaparameters, and last `<gradient, direction>`.

        directions: each a direction for the parameters, followed by cotangents of the buffers.
        """
        count = self.counts[1]
        with below_autograd(not self.compile):
            if len(directions) == 1:
                loss, *result = self._recompute_once(*parameters, *inputs, *directions[0])
                return loss, result[:count], [result[count:]]
            loss, *read = self._recompute(*parameters, *inputs)
            influence, read = read[:count], read[count:]
            return loss, influence, [list(self._each(*parameters, *inputs, *way, *read)) for way in directions]

    def hvp_from_residuals(
        self,
        parameters: list[Tensor],
        inputs: list[Tensor],
        residuals: Residuals,
        directions: Sequence[Sequence[Tensor]],
    ) -> SecondDerivatives:
        """The second derivatives of `recompute_hvp`, from the residuals of `forward` for the same tensors."""
        each = [residuals] if isinstance(residuals, Packed) else residuals
        with below_autograd(not self.compile):
            if len(directions) == 1:
                return [list(self._refresh_once(*parameters, *inputs, *directions[0], *each))]
            read = self._refresh(*parameters, *inputs, *each)
            return [list(self._each(*parameters, *inputs, *way, *read)) for way in directions]


# Operators that take about as long as reading their inputs, besides elementwise ones and those of this package.
_LIGHT = {
    f"aten::{name}"
    for name in """cat clone constant_pad_nd fill full_like zeros_like sum mean var_mean amax _softmax _log_softmax
    _softmax_backward_data avg_pool2d avg_pool2d_backward max_pool2d_with_indices_backward native_layer_norm
    native_layer_norm_backward native_group_norm native_group_norm_backward native_batch_norm
    native_batch_norm_backward""".split()
}

# Operators of this package that are made of matrix products.
_PRODUCTS = ("mgd_kernels::linear_cross_entropy", "mgd_kernels::attention", "mgd_kernels::tiled_attention")


def _is_cheap(node: fx.Node) -> bool:
    """Whether the node's result is better recomputed than kept, judged by its operator alone."""
    if node.target is operator.getitem:
        return _is_cheap(node.args[0])  # type: ignore[arg-type]
    if not isinstance(node.target, torch._ops.OpOverload) or draws(node):
        return is_view(node)
    name = node.target._schema.name
    own = name.startswith("mgd_kernels::") and not name.startswith(_PRODUCTS)
    return own or is_view(node) or torch.Tag.pointwise in node.target.tags or name in _LIGHT


# Recomputing cheap results takes time; keeping them takes memory, and the time to touch it. Recomputing paid off where
# keeping took 5 times the memory (convnets), and not where it took 2 times (transformers and MLPs; docs/speed.md).
_WORTHWHILE = 3


def _bytes(nodes: Iterable[fx.Node]) -> int:
    """Of results whose sizes do not depend on data."""
    values = [node.meta.get("val") for node in nodes]
    return sum(x.nbytes for x in values if isinstance(x, Tensor) and not is_symbolic(x))


def _with_sources(
    order: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[object], again: Callable[[fx.Node], bool]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes together with the nodes to recompute for them; and the other nodes that are then read.

    again: whether to recompute a node. It must be true for views, because a view of a parameter must not be kept: the
    parameter changes with the next step.
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
