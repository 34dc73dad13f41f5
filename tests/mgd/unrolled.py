"""The reference of the exactness tests: training unrolled as one autograd graph, naively.

Nothing of the sweep is shared with it: parameters are a dictionary, the model is called by
`torch.func.functional_call`, every step's gradient keeps its graph, and one backward pass through all of it gives the
metagradient. Only definitions are taken from the package: the seed of each step's random stream, and the update as a
differentiable function.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mgd.step.rng import seed_of
from mgd_kernels import Optimizer
from mgd_kernels.backends import reference
from mgd_kernels.fused import FusedOptimizer


@dataclass
class Unrolled:
    """value: `[]` or `[k]`. grads: as `Metagradient.grads`. parameters, slots, buffers: at the end of training."""

    value: Tensor
    grads: dict[str, Any]
    parameters: dict[str, Tensor]
    slots: dict[str, dict[str, Tensor]]
    buffers: dict[str, Tensor]
    losses: list[float]
    clipped: list[bool]


class _Call(nn.Module):
    """`function(model, *args)`, and the buffers as it leaves them, for `functional_call`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Tensor], *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value = function(self.model, *args)
        return value, dict(self.model.named_buffers())


class _BatchNorm(nn.BatchNorm2d):
    """Batch normalisation from its definition, out of place, so that autograd sees the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean = x.mean(dims)
            var = ((x - mean.view(shape)) ** 2).mean(dims)
            n = x.numel() // x.shape[1]
            self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
            self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var * n / (n - 1)
            self.num_batches_tracked = self.num_batches_tracked + 1
        normal = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return normal * self.weight.view(shape) + self.bias.view(shape)


def unrolled(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batches: Sequence[Any],
    z: Mapping[str, Any],
    *,
    optimizer: Optimizer,
    objective: Callable[[nn.Module], Tensor],
    max_grad_norm: float | None = None,
    microbatches: int = 1,
    seed: int = 0,
    per_example: Mapping[str, Callable[[Any], Tensor]] | None = None,
    autocast: torch.dtype | None = None,
) -> Unrolled:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = _BatchNorm
    call, steps = _Call(model), len(batches)

    z = {key: tree_map(_tensor, value) for key, value in z.items()}
    leaves, spec = tree_flatten(z)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    z = tree_unflatten(leaves, spec)

    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dtypes = {name: p.dtype for name, p in own.items()}
    master = torch.float64 if torch.float64 in dtypes.values() else torch.float32
    params = {name: p.detach().clone().to(master) for name, p in own.items()}
    params = {
        n: p.requires_grad_() for n, p in (params | {n: v.to(master) for n, v in z.get("init", {}).items()}).items()
    }
    slots = {slot: {name: torch.zeros_like(p) for name, p in params.items()} for slot in optimizer.slots}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    seen = {key: value for key, value in z.items() if key not in (*optimizer.hyper_names, "init")}
    counts = dict.fromkeys(params, 0)
    losses, clipped = [], []

    def run(function: Callable[..., Tensor], *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        tensors = {f"model.{name}": p.to(dtypes[name]) for name, p in params.items()}
        tensors |= {f"model.{name}": b for name, b in buffers.items()}
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.functional_call(call, tensors, (function, *args))

    for t in range(steps):
        grads = {name: torch.zeros_like(p) for name, p in params.items()}
        total, left, reached = 0.0, [], set()
        for i, (batch, share) in enumerate(_parts(batches[t], microbatches)):
            view = dict(seen)
            for key, index in (per_example or {}).items():
                if key in view:
                    view[key] = view[key][index(batch)]
            torch.manual_seed(seed_of(seed, t, i))
            cast = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
            with cast:
                value, after = run(loss, batch, view)
            value = value * share
            left.append((after, share))
            total += value.item()
            part = torch.autograd.grad(value, list(params.values()), create_graph=True, allow_unused=True)
            reached |= {n for n, d in zip(grads, part, strict=True) if d is not None}
            grads = {n: g if d is None else g + d for (n, g), d in zip(grads.items(), part, strict=True)}
        losses.append(total)
        buffers = {name: _mean([(after[name], share) for after, share in left]) for name in buffers}
        if max_grad_norm is not None:
            norm = torch.stack([(g.double() ** 2).sum() for g in grads.values()]).sum().sqrt()
            clipped.append(bool(norm + 1e-6 > max_grad_norm))
            if clipped[-1]:
                grads = {n: g * (max_grad_norm / (norm + 1e-6)) for n, g in grads.items()}
        # As torch.optim: a parameter without a gradient stays as it is, and so does its count of steps.
        counts = {name: count + (name in reached) for name, count in counts.items()}
        params, slots = _update(optimizer, params, slots, grads, reached, counts, z, t, steps)

    torch.manual_seed(seed_of(seed, steps))
    trained = {name: b.detach().clone() for name, b in buffers.items()}
    value, _ = run(objective)
    found = [
        torch.autograd.grad(v, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for v in value.reshape(-1)
    ]
    grads = [
        torch.stack(g).reshape((*value.shape, *leaf.shape))
        for g, leaf in zip(zip(*found, strict=True), leaves, strict=True)
    ]
    return Unrolled(
        value.detach(),
        tree_unflatten(grads, spec),
        {n: p.detach() for n, p in params.items()},
        {slot: {n: s.detach() for n, s in named.items()} for slot, named in slots.items()},
        trained,
        losses,
        clipped,
    )


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _mean(each: list[tuple[Tensor, float]]) -> Tensor:
    """The weighted mean of what microbatches leave of a buffer."""
    return sum(x * share for x, share in each) if each[0][0].is_floating_point() else each[0][0]


def _parts(batch: Any, count: int) -> list[tuple[Any, float]]:
    """Contiguous parts of a batch, the longer ones first, with their share of the examples."""
    leaves, spec = tree_flatten(batch)
    length = len(leaves[0])
    small, longer = divmod(length, count)
    parts, start = [], 0
    for i in range(count):
        stop = start + small + (i < longer)
        parts.append((tree_unflatten([leaf[start:stop] for leaf in leaves], spec), (stop - start) / length))
        start = stop
    return parts


def _hyper(optimizer: Optimizer, z: Mapping[str, Any], name: str, group: int, t: int, steps: int) -> Any:
    """The value of one hyperparameter for one group at step t: from `z`, the group, or the defaults."""
    if name in z:
        value, groups = z[name], optimizer.groups
        if value.ndim == 0:
            return value
        if value.shape == (steps,):
            return value[t]
        return value[group] if value.shape == (groups,) else value[t, group]
    overrides = {} if group == 0 else optimizer.param_groups[group - 1]
    return torch.tensor(overrides.get(name, optimizer.defaults[name]), dtype=torch.float64)


def _group(optimizer: Optimizer, name: str) -> int:
    for i, group in enumerate(optimizer.param_groups, 1):
        wanted = group["params"]
        if wanted(name) if callable(wanted) else fnmatchcase(name, wanted):
            return i
    return 0


def _update(optimizer, params, slots, grads, reached, counts, z, t, steps):
    new_params, new_slots = dict(params), {slot: dict(named) for slot, named in slots.items()}
    for name, p in params.items():
        if name not in reached:
            continue
        group = _group(optimizer, name)
        hyper = {key: _hyper(optimizer, z, key, group, t, steps) for key in optimizer.hyper_names}
        mine = [slots[slot][name] for slot in optimizer.slots]
        if isinstance(optimizer, FusedOptimizer):
            row = [0.0] * optimizer.width
            for key, value in hyper.items():
                row[optimizer.column(key)] = value
            new = reference.step(optimizer.rule, p, mine, grads[name], row, counts[name])
        else:
            named = dict(zip(optimizer.slots, mine, strict=True))
            value, left = optimizer.update(p, named, grads[name], hyper, counts[name])
            new = value, *(left[slot] for slot in optimizer.slots)
        new_params[name] = new[0]
        for slot, value in zip(optimizer.slots, new[1:], strict=True):
            new_slots[slot][name] = value
    return new_params, new_slots
