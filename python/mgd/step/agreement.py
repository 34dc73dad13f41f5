"""Do a step's second derivatives belong to the gradient that trained? Equal losses do not prove it.

Every evaluation of second derivatives gives `<gradient, direction>` with its own gradient. In exact arithmetic that is
the inner product of the logged gradient and the direction; in floating point it differs by about 1e-9 of the product of
their norms in float32. So a change of the gradient by 1e-5 is seen at every step, for one pass over two vectors; on an
accelerator, where most comparisons are read after their step, one by 1e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mgd.errors import NotDifferentiable, ReplayDivergence
from mgd.ranks.blocks import Blocks
from mgd.ranks.shards import Shards
from mgd.step.evaluator import Derivatives
from mgd.step.influence import projections
from mgd.step.metaparameters import BatchMetaparameters
from mgd.step.model import Buffers, differentiable
from mgd.step.reads import LookCloser, Reads

Tensors = Sequence["Tensor | None"]
Summands = list["Tensor | None"]

# Relative, of each second derivative of a graph and of a plain evaluation, which run the same operators.
REPLAY_TOLERANCE = 1e-3
CONFIRMED = 8  # steps of the reverse sweep that are compared at once, to learn what is rounding
SLIGHT = 4  # tolerances: a discrepancy that deep models show (30 layers: 1.6)
ROUNDED = 8  # machine epsilons that a graph's discrepancy may be, where autograd has none
LATE = 2  # machine epsilons that pass where the comparison is read after its step
ROUNDING = 1e-6  # relative to the largest one: what a derivative that is 0 in exact arithmetic may come out as


class Terms:
    """The second derivatives of a step, summed over microbatches, before they are added to the adjoint.

    with_parameters: for each direction. with_metaparameters: of each microbatch, last one first, what the loss saw of
    z, and for each direction the derivatives. with_buffers: of each microbatch, first one first, for each direction the
    adjoints of the floating-point buffers that it began with, or None for zero. products: likewise,
    `<gradient, direction>`. gradient: of this evaluation, where it has it. influence: of each microbatch, by its index,
    the loss's derivatives with respect to z, where they may be other ones than those of the gradient's evaluation.
    """

    def __init__(self, directions: int):
        self.with_buffers: list[list[Tensors]] = []
        self.with_parameters: list[Blocks[Summands]] = [Blocks(_sum) for _ in range(directions)]
        self.with_metaparameters: list[tuple[BatchMetaparameters, list[list[Tensor | None]]]] = []
        self.products: list[list[Tensor]] = []
        self.influence: dict[int, np.ndarray | Tensor] = {}
        self.gradient: Blocks[Summands] | None = Blocks(_sum)
        self.precision = 0.0

    def append(
        self,
        index: int,
        derivatives: Derivatives,
        parameters: int,
        before: Buffers,
        metaparameters: BatchMetaparameters,
    ) -> None:
        """Add those of microbatch `index`, which are taken out of `derivatives`. parameters: how many there are.
        before: the buffers that it began with."""
        p, b = parameters, parameters + len(differentiable(before))
        results = derivatives.results
        self.with_buffers.insert(0, [each[p:b] for each in results])
        self.with_metaparameters.append((metaparameters, [each[b:] for each in results]))
        for total, each in zip(self.with_parameters, results, strict=True):
            terms = each[:p]
            each.clear()
            total.add(index, terms)
        self.products.insert(0, list(derivatives.products))
        self.precision = max(self.precision, derivatives.precision)
        if derivatives.influence:
            self.influence[index] = projections(derivatives.influence, metaparameters.tensors[0].device)
        if derivatives.gradient is None:
            self.gradient = None
        elif self.gradient is not None:
            terms, derivatives.gradient = list(derivatives.gradient), None
            self.gradient.add(index, terms)

    def agree(self, other: Terms) -> bool:
        """Whether both are the same up to rounding."""
        pairs = zip(self.with_metaparameters, other.with_metaparameters, strict=True)
        return (
            all(map(_agree_in_blocks, self.with_parameters, other.with_parameters))
            and all(all(map(agree, *rows)) for rows in zip(self.with_buffers, other.with_buffers, strict=True))
            and all(all(map(agree, mine, others)) for (_, mine), (_, others) in pairs)
        )


def _agree_in_blocks(mine: Blocks[Summands], others: Blocks[Summands]) -> bool:
    return all(agree(x, y) for (_, x), (_, y) in zip(mine.items(), others.items(), strict=True))


def _sum(x: Summands, y: Summands) -> Summands:
    """The sum, in x; y is empty then. A pair at a time is let go of, so that two of three are held at most."""
    y.reverse()
    for i, a in enumerate(x):
        b = y.pop()
        x[i] = b if a is None else a if b is None else a + b
    return x


class Agreement:
    """Compares the gradients of the two evaluations of a step.

    scale: the norm of the first gradient. tolerance: of the discrepancy, below which it passes at once. It grows to the
    rounding that was seen and confirmed. seen: steps that were compared at once.
    """

    def __init__(self, shards: Shards):
        self.shards, self.seen = shards, 0
        self._eps = torch.finfo(shards.arena.gradient_dtype).eps
        self.tolerance = self._eps / 6
        self.scale = 0.0

    def note(self, gradient: Tensor) -> None:
        """The gradient of a step, of which the first gives the scale."""
        self.scale = self.scale or math.sqrt(self.shards.dots([(gradient, gradient)])[0])

    def discrepancy(self, gradient: Tensor, directions: Sequence[Tensor], terms: Terms, noise: float = 0.0) -> float:
        """The largest `|<own gradient, u> - <gradient, u>|` over the directions u, relative to `|gradient| |u|`.

        noise: an error of the gradient, as a norm, that is not counted.
        """
        self.seen += 1
        count, products = len(directions), [[float(x) for x in row] for row in terms.products]
        sums = self.shards.dots([(gradient, direction) for direction in directions], beside=products)

        def squares(i: int) -> list[float]:
            return self.shards.dots([(directions[i], directions[i]), (gradient, gradient)])

        return self._largest(sums[:count], sums[count:], squares, noise)

    def discrepancies(self, gradients: Tensor, directions: Tensor, products: Tensor) -> list[float]:
        """The discrepancies of several trainings, of whose gradients and directions each is a row, `[B, n]`. products:
        `<gradient, direction>` of the evaluations of the second derivatives, `[B]`."""
        rows = list(zip(gradients.unbind(), directions.unbind(), strict=True))
        expected, dots = self.shards.dots(rows), self.shards.dots

        def of(i: int, product: float) -> float:
            g, u = rows[i]
            return self._largest([expected[i]], [product], lambda _: dots([(u, u), (g, g)]))

        return [of(i, product) for i, product in enumerate(products.tolist())]

    def _largest(
        self,
        expected: Sequence[float],
        products: Sequence[float],
        squares: Callable[[int], Sequence[float]],
        noise: float = 0.0,
    ) -> float:
        """The discrepancy, from inner products. squares: of a direction and of the gradient."""
        largest = 0.0
        for i, (x, product) in enumerate(zip(expected, products, strict=True)):
            difference = abs(product - x)
            if difference <= 8 * self._eps * abs(x):  # the norms are larger still
                continue
            square, whole = squares(i)
            length = math.sqrt(square)
            difference = max(0.0, difference - noise * length)
            scale = math.sqrt(whole) * length
            largest = max(largest, difference / scale if scale else math.inf if difference else 0.0)
            if math.isnan(difference):
                return math.inf
        return largest

    def later(self, gradient: Tensor, directions: Sequence[Tensor], terms: Terms, reads: Reads) -> None:
        """Raises LookCloser, once the numbers are read, where the discrepancy is more than what was confirmed."""
        count = len(directions)
        pairs = [(gradient, x) for x in directions] + [(x, x) for x in directions] + [(gradient, gradient)]

        def look(values: list[float]) -> None:
            expected, own, (whole, *products) = values[:count], values[count : 2 * count], values[2 * count :]
            # To confirm takes what only the step has. So rounding that small models show now and then passes at once.
            if self._largest(expected, products, lambda i: (own[i], whole)) > max(self.tolerance, LATE * self._eps):
                raise LookCloser

        reads.later(self.shards.products(pairs, beside=terms.products), look)

    def widen(self, discrepancy: float) -> None:
        """A discrepancy was rounding: let those of its size pass, within limits, if it is more than what passes."""
        if discrepancy > self.tolerance:
            self.tolerance = min(4 * discrepancy, math.sqrt(self._eps))

    def confirm(self, step: int, gradient: Tensor, directions: Sequence[Tensor], terms: Terms) -> None:
        """Raises ReplayDivergence where the evaluation has another gradient than the logged one, tensor by tensor, and
        NotDifferentiable where it has that gradient, and the graph of it does not."""
        assert terms.gradient is not None
        limit = math.sqrt(max(terms.precision, torch.finfo(gradient.dtype).eps))
        shards, found = self.shards, torch.zeros_like(gradient)
        shards.add_(found, terms.gradient)
        flat, arena = shards.whole(gradient), shards.arena
        whole, differing = float(flat.double().norm()), []
        for name, x, own in zip(arena.names, arena.slices(flat), arena.slices(shards.whole(found)), strict=True):
            difference = float((x.double() - own.double()).norm())
            if not difference <= limit * float(x.double().norm()) + limit * 1e-2 * whole:
                differing.append((difference, name))
        if differing:
            names = ", ".join(name for _, name in sorted(differing, reverse=True)[:3])
            raise ReplayDivergence(
                step,
                f"its loss is the same, but the gradient of {names} is another one. The loss reads something that "
                "changes from one evaluation to the next: a counter, a hook, random numbers that do not come from "
                "torch's generators. Make it a function of the model, the batch and z, for instance by a number in "
                "the batch.",
            )
        # At the end of a training a gradient may be nothing but the rounding of the terms that cancel in it.
        if self.discrepancy(gradient, directions, terms, noise=64 * self._eps * self.scale) > limit:
            raise NotDifferentiable(
                "an operator",
                f"at step {step} the derivative of its backward pass is incomplete (does a backward detach what it "
                "computes with, or run without gradients?).",
            )


def agree(replayed: Sequence[Tensor | None], evaluated: Sequence[Tensor | None]) -> bool:
    """Whether two sets of derivatives are the same up to rounding, tensor by tensor; None stands for zeros."""
    # A tensor at a time: all of them in float64 would be the largest thing in memory.
    present = [(x, y) for x, y in zip(replayed, evaluated, strict=True) if x is not None and y is not None]
    norms = [_norm(y) for _, y in present]
    noise = ROUNDING * max(norms, default=0.0)
    single = [x if y is None else y for x, y in zip(replayed, evaluated, strict=True) if (x is None) != (y is None)]
    return all(
        _norm(x, y) <= REPLAY_TOLERANCE * norm + noise for (x, y), norm in zip(present, norms, strict=True)
    ) and all(x is None or _norm(x) <= noise for x in single)


def _norm(x: Tensor, y: Tensor | None = None) -> float:
    """Of x, or of x - y, in float64."""
    double = x.detach().double()
    return float((double if y is None else double - y.detach().double()).norm())
