"""Second derivatives traced once into a graph of torch operators, cleaned, and replayed at every step.

Replaying a graph leaves out autograd's bookkeeping, and dead code can be eliminated: the gradient of the weights, for
one, is part of the graph of the gradient but not needed by its derivative (one matmul in nine for a linear layer).

A trace freezes whatever Python computed on the way. So nothing rests on it alone: training gradients are never
traced, every replayed loss is compared with the one of the eager first sweep, and a graph that differs is given up.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Hashable
from itertools import accumulate, pairwise

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mgd.derivatives import Evaluate, Gradients, Point, SecondDerivative

aten = torch.ops.aten

# Relative. Another dropout mask or batch moves a loss by far more than the rounding of a float32 mean, about 1e-6.
COMPILED_TOLERANCE = 1e-4


class Traces:
    """The graphs of one training function, by what they depend on. refused: why tracing was given up, if it was."""

    def __init__(self, compile: bool = False):
        self.compile = compile
        self.graphs: dict[Hashable, Callable[..., tuple[Tensor | None, ...]]] = {}
        self.refused: str | None = None

    def __call__(
        self, second: SecondDerivative, evaluate: Evaluate, point: Point, restart: Callable[[], None], key: Hashable
    ) -> tuple[Tensor, Gradients] | None:
        """As `second(evaluate, point, restart)`, from a graph; None where it cannot be traced.

        key: everything but the shapes of the point's tensors that the evaluation depends on.
        """
        if self.refused:
            return None
        inputs, sizes = _flat(point)
        key = (key, sizes, tuple((x.shape, x.stride(), x.dtype) for x in inputs))
        if key not in self.graphs:
            try:
                self.graphs[key] = self._trace(second, evaluate, point, restart)
            except Exception as error:  # whatever stops a trace does not stop the eager evaluation
                self.refused = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                return None
            finally:
                restart()
        loss, *flat = self.graphs[key](*inputs)
        width = len(flat) // len(point.directions)
        return loss, [flat[i : i + width] for i in range(0, len(flat), width)]

    def describe(self) -> str:
        """How second derivatives are executed, for the report."""
        if self.refused:
            return f"eager, since tracing was given up: {self.refused}"
        return "compiled" if self.compile else "traced"

    def accepts(self, loss: Tensor, expected: Tensor, step: int) -> bool:
        """Whether a replayed loss is that of the first sweep, bit by bit; if not, no graph is used any more.

        A compiled graph rounds differently, since it fuses operators: there the loss may differ by rounding.
        """
        same = torch.allclose(loss, expected, rtol=COMPILED_TOLERANCE) if self.compile else torch.equal(loss, expected)
        if not same:
            self.refused = f"the replayed loss of step {step} is {float(loss.detach())!r}, that of training {float(expected)!r}"
        return same

    def _trace(self, second: SecondDerivative, evaluate: Evaluate, point: Point, restart: Callable[[], None]):
        inputs, sizes = _flat(point)

        def function(*tensors: Tensor) -> tuple[Tensor | None, ...]:
            loss, results = second(evaluate, _point(tensors, sizes, len(point.directions)), restart)
            return (loss, *(tensor for result in results for tensor in result))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = clean(make_fx(function)(*inputs))
        if self.compile:
            # Random operators keep torch's eager streams, so that a compiled step draws the masks of the first sweep.
            return torch.compile(graph, fullgraph=True, dynamic=False, options={"fallback_random": True})
        return graph


def _flat(point: Point) -> tuple[list[Tensor], tuple[int, ...]]:
    """The point's tensors in a row, and how many of each kind."""
    kinds = (point.parameters, point.buffers, point.metaparameters, point.constants)
    kinds += (*point.directions, *point.cotangents)
    return [tensor for kind in kinds for tensor in kind], tuple(map(len, kinds))


def _point(tensors: tuple[Tensor, ...], sizes: tuple[int, ...], objectives: int) -> Point:
    bounds = pairwise(accumulate(sizes, initial=0))
    kinds = [list(tensors[start:stop]) for start, stop in bounds]
    return Point(*kinds[:4], directions=kinds[4 : 4 + objectives], cotangents=kinds[4 + objectives :])


def clean(module: fx.GraphModule) -> fx.GraphModule:
    """Drop views that change nothing, results that nobody reads, and the outputs of convolutions that nobody reads."""
    graph = module.graph
    for node in graph.nodes:
        if node.target in (aten.alias.default, aten.detach.default):
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.t.default and getattr(node.args[0], "target", None) is aten.t.default:
            node.replace_all_uses_with(node.args[0].args[0])
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.target is aten.convolution_backward.default:
            *args, mask = node.args
            read = {user.args[1] for user in node.users if user.target is operator.getitem}
            node.args = (*args, [wanted and i in read for i, wanted in enumerate(mask)])
    module.recompile()
    return module
