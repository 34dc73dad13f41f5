"""Sums of products in a traced graph, accumulated by the products themselves.

A double backward adds up products: the cotangent of a linear layer's output is `c Wᵀ + x cᵂ + cᵇ`. A matrix product can
add to the contents of its output at no cost (beta = 1 in BLAS), which saves a pass over three tensors for each sum.
Other sums, of convolutions and elementwise operators, are written into the memory of a summand that is read nowhere
else: if the system has to provide new memory page by page, it costs more than the addition.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mgd.autodiff.graphs import ancestors, is_symbolic

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default)
_INTO = {aten.mm.default: aten.addmm_.default, aten.bmm.default: aten.baddbmm_.default}
# Operators each of whose outputs has its own memory.
_FRESH = (
    *_INTO,
    *_INTO.values(),
    aten.addmm.default,
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.mul.Tensor,
    aten.addcmul.default,
    aten.addcmul_.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.avg_pool2d.default,
    aten.avg_pool2d_backward.default,
)

# The backward pass of an activation, `gy slope`.
_SLOPE = "mgd_kernels.activation_backward.default"


def accumulate_products(module: fx.GraphModule, exact: int = 1) -> fx.GraphModule:
    """Replace sums with products by operators that accumulate; changes `module` in place and returns it.

    `x + a @ b` becomes `x.addmm_(a, b)` if nothing else reads x or the product. `v + a @ b`, with a vector v that is
    added to every row, becomes `addmm(v, a, b)`. The same is done for batches of matrices, and for the product of a
    cotangent and the slope of an activation (`mgd_kernels.functional`).

    exact: the number of first outputs that keep their bits (the loss). What they are computed from is not changed.
    """
    graph = module.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    unchanged = ancestors(output.args[0][:exact])
    for add in list(graph.nodes):
        if add.target is not aten.add.Tensor or add in unchanged or add.kwargs or not _alike(add, *add.args):
            continue
        for x, y in (add.args, add.args[::-1]):
            if _accumulate(graph, add, x, y):
                break
        else:
            _add_in_place(add)
    for node in reversed(graph.nodes):
        # By hand, because eliminate_dead_code keeps in-place operators and their inputs.
        if not node.users and (node.target in _VIEWS or node.target in _INTO or node.target is aten.expand.default):
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    return module


def _accumulate(graph: fx.Graph, add: fx.Node, x: fx.Node, y: fx.Node) -> bool:
    """Let the product behind y add to x, if both may be overwritten. Returns whether that was done."""
    if str(y.target) == _SLOPE and len(y.users) == 1 and _shape(x) == _shape(y):
        operands: list[Any] = [x, *y.args[:2]]  # the other summand, the cotangent, the slope
        if all(operand.meta["val"].is_contiguous() for operand in operands):
            alone = len(x.users) == 1 and _is_fresh(x)
            with graph.inserting_before(add):
                total = graph.call_function(
                    aten.addcmul_.default if alone else aten.addcmul.default, tuple(operands)
                )  # fmt: skip
            total.meta["val"] = add.meta["val"]
            add.replace_all_uses_with(total)
            graph.erase_node(add)
            graph.erase_node(y)
            return True
    product = _only_view_of(y)
    if product is None or product.target not in _INTO or _shape(y) != _shape(add):
        return False
    shape = _shape(product)
    if x.target is aten.expand.default and _shape(_source(x)) == shape[-1:] and product.target is aten.mm.default:
        with graph.inserting_before(add):
            total = graph.call_function(aten.addmm.default, (_source(x), *product.args))
    else:
        base = _only_view_of(x)
        if base is None or base is product or _shape(x) != _shape(add) or not _is_fresh(base):
            return False
        with graph.inserting_before(add):
            if _shape(base) != shape:
                base = graph.call_function(aten.view.default, (base, list(shape)))
            total = graph.call_function(_INTO[product.target], (base, *product.args))
    total.meta["val"] = product.meta["val"]
    result = total
    if shape != _shape(add):
        with graph.inserting_before(add):
            result = graph.call_function(aten.view.default, (total, list(_shape(add))))
        result.meta["val"] = add.meta["val"]
    add.replace_all_uses_with(result)
    graph.erase_node(add)
    return True


def _add_in_place(add: fx.Node) -> None:
    """Write a sum into the memory of a summand with the same layout, if nothing else reads that summand."""
    summands: list[Any] = [*add.args]
    for x, y in (summands, summands[::-1]):
        same = _shape(x) == _shape(y) and x.meta["val"].stride() == add.meta["val"].stride()
        if same and len(x.users) == 1 and _is_fresh(x):
            add.target, add.args = aten.add_.Tensor, (x, y)
            return


def _alike(*nodes) -> bool:
    """Whether all are tensors of the same dtype, and of sizes that do not depend on data."""
    values: list[Any] = [node.meta.get("val") if isinstance(node, fx.Node) else None for node in nodes]
    return all(isinstance(x, torch.Tensor) and x.dtype == values[0].dtype and not is_symbolic(x) for x in values)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _only_view_of(node: fx.Node) -> fx.Node | None:
    """The node that this one is a view of, if nothing else reads it or the views in between; None otherwise."""
    while len(node.users) == 1:
        if node.target not in _VIEWS:
            return node
        node = _source(node)
    return None


def _source(node: fx.Node) -> fx.Node:
    """The source of a view; the tuple of a `getitem`."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _is_fresh(node: fx.Node) -> bool:
    """Whether the node's result is contiguous and has its own memory."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_contiguous():
        return False
    if node.target is operator.getitem:
        node = _source(node)
    return node.target in _FRESH or str(node.target).startswith("mgd_kernels.")
