"""The mean over many trainings of what they share, such as initial weights (MAML, arXiv 1703.03400)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mgd.errors import BadArgument, BadMetaparameter
from mgd.function import TrainingFunction
from mgd.sweep.node import first_derivatives
from mgd.tasks.together import results


def mean_over(tasks: Iterable[TrainingFunction], z: Mapping[str, Any]) -> Tensor:
    """The mean objective, float64 `[]`, of trainings with the same `z`, as a node of the autograd graph: `backward`
    fills the gradients of the tensors in `z`, once (no `create_graph`).

    Each training, or group of them, is differentiated before the next one begins, so memory grows neither with their
    number nor with their length, as it would where `f(z)` of all of them waits for `backward`. No gradient is taken
    where no tensor in `z` requires one, or under `torch.no_grad`.

    Tasks that differ in their batches and objectives alone run together as soon as that pays, as many at once as fit
    into the memory of a short training (256 MB, or the budget): small ones in a fraction of the time. Results are then
    those of one by one up to the rounding of batched matrix products. Graphs for it take some seconds. They are made
    once what it would have saved so far, in this call and those before, and will save in the rest of a list, exceeds
    that (`mgd.tasks.account`). So clocks decide when results round otherwise. With `trace=True` tasks run together from
    the first one on; with `trace=False` one by one, to the bits of single trainings.

    Together run tasks with `SGD`, `Adam` or `AdamW` on a CPU, and no `max_grad_norm`, `microbatches`, `since`,
    `autocast`, `compile`, nor several processes. One by one run those whose loss draws random numbers, reads numbers
    out of tensors, keeps state in Python, changes buffers, or leaves parameters without a gradient. With `trace=True` a
    warning says so.

    Of a list, no objective may change what a later task reads past autograd (`.data`, NumPy), where no one sees it.

    tasks: training functions of one objective each. A generator may make them one by one; those that `replaced` makes
        of one function share its graphs, as do all with one model and one loss. An objective that reads its own
        tensors, as a function made for each task does, is evaluated with the others.

    Raises BadArgument where there are no tasks, or one has several objectives.
    """
    if not isinstance(z, Mapping):
        raise BadMetaparameter(f"expected z to map names to tensors; got {type(z).__name__}")
    if isinstance(tasks, TrainingFunction) or not isinstance(tasks, Iterable):
        raise BadArgument(f"expected tasks to be several training functions; got {type(tasks).__name__}")
    leaves, spec = tree_flatten(dict(z))
    wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
    return _MeanOver.apply(tasks, spec, wanted, *leaves)


class _MeanOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tasks: Iterable[TrainingFunction], spec: Any, wanted: bool, *leaves: Any) -> Tensor:
        z, count, total = tree_unflatten(leaves, spec), 0, None
        ctx.gradients = None
        for found in results(tasks, z, wanted):
            total, count = found.value if total is None else total + found.value, count + found.count
            if found.gradients is not None:
                grads = tree_flatten({key: found.gradients[key] for key in z})[0]
                ctx.gradients = grads if ctx.gradients is None else torch._foreach_add(ctx.gradients, grads)
        if total is None:
            raise BadArgument("expected at least one training; got no tasks")
        ctx.tensors = [isinstance(x, Tensor) for x in leaves]
        ctx.count = count
        return total / count

    @staticmethod
    @first_derivatives
    def backward(ctx, cotangent: Tensor):
        pairs = zip(ctx.tensors, ctx.gradients, strict=True)
        return None, None, None, *(g * (cotangent / ctx.count).to(g) if is_tensor else None for is_tensor, g in pairs)
