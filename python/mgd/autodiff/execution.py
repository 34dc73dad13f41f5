"""How a captured graph is run, and whether it repeats the evaluation that it was captured from."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import _get_qualified_name

from mgd.step.agreement import agree
from mgd.step.evaluator import Derivatives, Evaluation, Tangents

# Relative, of losses where one evaluation rounds differently. Another dropout mask or batch moves a loss by far more
# than the rounding of a float32 mean, about 1e-6.
LOSS_TOLERANCE = 1e-4


def compiled(module: fx.GraphModule) -> Callable[..., tuple]:
    """By Inductor, at the first call; torch keeps what it has compiled on disk (TORCHINDUCTOR_CACHE_DIR) for later
    processes. Shapes and dtypes of a graph never change, so that tensors need none of Dynamo's guards, which take as
    long as a small graph."""
    # Random operators keep torch's eager streams, so that a compiled step draws the masks of the first sweep.
    options: dict[str, Any] = {"fallback_random": True}
    found: Callable[..., tuple] | None = None

    def run(*inputs: Any) -> tuple:
        nonlocal found
        if found is None:
            if all(isinstance(x, Tensor) for x in inputs):
                from torch._inductor import compile  # which takes a second to import

                found = compile(copy.deepcopy(module), list(inputs), options=options)
            else:  # a number may be another one at the next call
                found = torch.compile(module, fullgraph=True, dynamic=False, options=options)
        return tuple(found(*inputs))

    return run


def direct(module: fx.GraphModule) -> Callable[..., tuple]:
    """The module's code with the operators' C++ functions in it: their Python objects add a fifth to a small operator's
    time."""
    code = module.graph.python_code("self")
    source, names = code.src, dict(code.globals)
    targets = {node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    for i, target in enumerate(targets):
        source = source.replace(f"{_get_qualified_name(target)}(", f"_operator_{i}(")
        names[f"_operator_{i}"] = target._op
    exec(source, names)
    return functools.partial(names["forward"], module)


def below_autograd(skipped: bool = True) -> contextlib.AbstractContextManager:
    """Operators inside go past autograd's bookkeeping, where `skipped`; what they are given needs no gradient."""
    return torch._C._AutoDispatchBelowAutograd() if skipped else contextlib.nullcontext()


def same_loss(loss: Tensor, expected: Tensor, compiled: bool) -> bool:
    """Whether a graph's loss is that of the evaluation: bit by bit, or up to rounding where operators are fused."""
    loss, expected = loss.double().cpu(), expected.double().cpu()
    return torch.allclose(loss, expected, rtol=LOSS_TOLERANCE) if compiled else torch.equal(loss, expected)


def same_bits(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Whether two sets of tensors are equal; None stands for zeros."""

    def same(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return all(tensor is None or not tensor.any() for tensor in (x, y))
        return torch.equal(x, y)

    return all(map(same, found, expected))


def same_evaluation(x: Evaluation, y: Evaluation) -> bool:
    """Whether two evaluations are equal: bit by bit in what trains, up to rounding in derivatives of metaparameters."""
    buffers = [(x.buffers[name], y.buffers[name]) for name in x.buffers]
    return (
        torch.equal(x.loss, y.loss)
        and same_bits(x.gradients, y.gradients)
        and agree(x.influence, y.influence)
        and all(a.equal(b) for a, b in buffers)
    )


def same_tangents(x: Tangents, y: Tangents, rounds: bool) -> bool:
    """Whether two evaluations are equal, and their derivatives along directions up to rounding. rounds: whether the
    evaluations may differ by rounding, too."""
    sides = [[*t.losses, *chain.from_iterable(t.gradients), *chain.from_iterable(t.buffers)] for t in (x, y)]
    same = same_up_to_rounding if rounds else same_evaluation
    return same(x.evaluation, y.evaluation) and agree(*sides)


def same_up_to_rounding(x: Evaluation, y: Evaluation) -> bool:
    """Whether two evaluations differ by rounding at most."""
    sides = [[*e.gradients, *(b for b in e.buffers.values() if b.is_floating_point())] for e in (x, y)]
    return same_loss(x.loss, y.loss, True) and agree(*sides)


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def derivatives_of(results: Sequence[Sequence[Tensor | None]]) -> Derivatives:
    """From what a graph gives for each direction: second derivatives, and last `<gradient, direction>`."""
    return Derivatives([list(result[:-1]) for result in results], [present(result[-1]) for result in results])


def present(x: Tensor | None) -> Tensor:
    """An output that a graph always has."""
    assert x is not None
    return x
