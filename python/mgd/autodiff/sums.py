"""Sums in a traced graph, written into the memory of a summand that nothing else reads.

New memory that the system has to provide page by page costs more than the addition. The bits are those of the sum. A
matrix product could add to the contents of its output (beta = 1 in BLAS), which saves 3% more on transformers, but it
rounds differently, and captured steps would no longer have the bits of eager ones.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mgd.autodiff.graphs import is_symbolic

aten = torch.ops.aten

# Operators each of whose outputs has its own memory.
_FRESH = (
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.mul.Tensor,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.avg_pool2d.default,
    aten.avg_pool2d_backward.default,
)
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def add_in_place(module: fx.GraphModule) -> fx.GraphModule:
    """Write each sum into the memory of a summand with its layout, where nothing else reads that summand.

    Changes `module` in place and returns it.
    """
    for add in module.graph.nodes:
        if add.target is not aten.add.Tensor or add.kwargs or not _alike(add, *add.args):
            continue
        for x, y in (add.args, add.args[::-1]):
            if _is_fresh(x):
                add.target, add.args = aten.add_.Tensor, (x, y)
                break
    module.recompile()
    return module


def _alike(*nodes: Any) -> bool:
    """Whether all are tensors of the same dtype, shape and strides, and of sizes that do not depend on data."""
    values = [node.meta.get("val") if isinstance(node, fx.Node) else None for node in nodes]
    return all(isinstance(x, torch.Tensor) and not is_symbolic(x) for x in values) and (
        len({(x.dtype, x.shape, x.stride()) for x in values if x is not None}) == 1
    )


def _is_fresh(node: fx.Node) -> bool:
    """Whether the node's result is contiguous and has its own memory, which nothing else reads."""
    if not node.meta["val"].is_contiguous():
        return False
    while len(node.users) == 1 and node.target in _VIEWS:
        node = _source(node)
    target = _source(node).target if node.target is operator.getitem else node.target
    return len(node.users) == 1 and (target in _FRESH or str(target).startswith("mgd_kernels."))


def _source(node: fx.Node) -> fx.Node:
    """The source of a view; the tuple of a `getitem`."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source
