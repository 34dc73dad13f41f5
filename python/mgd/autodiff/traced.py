"""Second derivatives traced once into a graph of torch operators, cleaned, and replayed at every step.

Replaying a graph leaves out autograd's bookkeeping, and dead code can be eliminated: the gradient of the weights, for
one, is part of the graph of the gradient but not needed by its derivative (one matmul in nine for a linear layer).

A trace freezes whatever Python computed on the way. So nothing rests on it alone: training gradients are never
traced, every replayed loss is compared with the one of the eager first sweep, and a graph that differs is given up.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mgd.autodiff.accumulation import accumulate_products
from mgd.autodiff.graphs import PerDirection, clean, without_mutation
from mgd.autodiff.second_order import Evaluate, Gradients, Point, SecondDerivative

# Relative. Another dropout mask or batch moves a loss by far more than the rounding of a float32 mean, about 1e-6.
COMPILED_TOLERANCE = 1e-4
# Relative, of each second derivative; the graph runs the operators of the evaluation, so that most agree to the bit.
REPLAY_TOLERANCE = 1e-3
ROUNDING = 1e-6  # relative to the largest one: what a derivative that is 0 in exact arithmetic may come out as

# graph(fixed inputs, directions) -> (loss, the second derivatives for each direction)
Graph = Callable[[Sequence[Tensor], Sequence[Sequence[Tensor]]], tuple[Tensor, Sequence[Sequence["Tensor | None"]]]]


class Traces:
    """The graphs of one training function, by what they depend on. refused: why tracing was given up, if it was."""

    def __init__(self, compile: bool = False):
        self.compile = compile
        self.graphs: dict[Hashable, Graph] = {}
        self.refused: str | None = None

    def __call__(
        self, second: SecondDerivative, evaluate: Evaluate, point: Point, reseed: Callable[[], None], key: Hashable
    ) -> tuple[Tensor, Gradients] | None:
        """As `second(evaluate, point, reseed)`, from a graph; None where it cannot be traced.

        key: everything that the evaluation depends on, but for the number of directions and the tensors' values.
        """
        if self.refused:
            return None
        inputs = [x for kind in point.fixed() for x in kind]
        key = key, len(point.directions) > 1
        if key not in self.graphs:
            try:
                self.graphs[key] = self._trace(second, evaluate, point, reseed)
            except Exception as error:  # whatever stops a trace does not stop the eager evaluation
                self.refused = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                return None
            finally:
                reseed()
        directions = [(*d, *c) for d, c in zip(point.directions, point.cotangents, strict=True)]
        with below_autograd(not self.compile):
            loss, results = self.graphs[key](inputs, directions)
        return loss, [list(result) for result in results]

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
            self.refused = (
                f"the replayed loss of step {step} is {float(loss.detach())!r}, that of training {float(expected)!r}"
            )
        return same

    def _trace(self, second: SecondDerivative, evaluate: Evaluate, point: Point, reseed: Callable[[], None]) -> Graph:
        """The graph of the point's first direction, as a function of fixed inputs and of any number of directions."""
        kinds = [*point.fixed(), point.directions[0], point.cotangents[0]]
        bounds = list(pairwise(accumulate(map(len, kinds), initial=0)))
        inputs = [x for kind in kinds for x in kind]
        shared = bounds[3][1]

        def function(*tensors: Tensor) -> tuple[Tensor | None, ...]:
            p, b, z, constants, direction, cotangent = (list(tensors[start:stop]) for start, stop in bounds)
            loss, (result,) = second(evaluate, Point(p, b, z, constants, [direction], [cotangent]), reseed)
            return loss, *result

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = clean(make_fx(function)(*inputs))
            replay: Graph
            if len(point.directions) > 1:
                replay = PerDirection(without_mutation(graph, inputs), shared, self._optimized)
            else:
                replay = self._whole(graph)
            reseed()
            _, (replayed,) = replay(inputs[:shared], [inputs[shared:]])
        reseed()
        if not agree(replayed, function(*inputs)[1:]):
            raise RuntimeError("the replayed graph has other second derivatives than the evaluation that it traced")
        return replay

    def _optimized(self, graph: fx.GraphModule, exact: int) -> Callable[..., tuple]:
        """exact: the number of first outputs that keep their bits, unless they are compiled."""
        return compiled(graph) if self.compile else accumulate_products(graph, exact)

    def _whole(self, graph: fx.GraphModule) -> Graph:
        """The graph for a single direction."""
        whole = self._optimized(graph, exact=1)

        def replay(fixed: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]):
            loss, *result = whole(*fixed, *directions[0])
            return loss, [result]

        return replay


def compiled(module: Callable[..., tuple]) -> Callable[..., tuple]:
    """By torch.compile; torch keeps what it has compiled on disk (TORCHINDUCTOR_CACHE_DIR) for later processes."""
    # Random operators keep torch's eager streams, so that a compiled step draws the masks of the first sweep.
    return torch.compile(module, fullgraph=True, dynamic=False, options={"fallback_random": True})


def below_autograd(skipped: bool) -> contextlib.AbstractContextManager:
    """Operators inside go past autograd's bookkeeping, where `skipped`; what they are given needs no gradient."""
    return torch._C._AutoDispatchBelowAutograd() if skipped else contextlib.nullcontext()


def agree(replayed: Sequence[Tensor | None], evaluated: Sequence[Tensor | None]) -> bool:
    """Whether a graph repeats the second derivatives of an evaluation up to rounding, tensor by tensor.

    The loss alone would not tell: activation checkpointing puts random generators back for its recomputation, which a
    graph does not, so that other dropout masks would enter the derivatives only.
    """
    if [x is None for x in replayed] != [x is None for x in evaluated]:
        return False
    pairs = [
        (x.detach().double(), y.detach().double())
        for x, y in zip(replayed, evaluated, strict=True)
        if x is not None and y is not None
    ]
    noise = ROUNDING * max((float(y.norm()) for _, y in pairs), default=0.0)
    return all(float((x - y).norm()) <= REPLAY_TOLERANCE * float(y.norm()) + noise for x, y in pairs)
