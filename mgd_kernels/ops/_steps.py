"""What the operators of every rule do: check, choose a backend, step in place or out of place, and differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgd_kernels import buffers, dispatch
from mgd_kernels.arena import Segments
from mgd_kernels.backends import reference
from mgd_kernels.errors import BadArgument
from mgd_kernels.rules import Rule


@lru_cache(maxsize=256)
def _segments_of(content: bytes, groups: int) -> Segments:
    return Segments(torch.from_numpy(np.frombuffer(content, dtype=np.int64).reshape(-1, 3).copy()), groups)


def _segments(table: Tensor, groups: int) -> Segments:
    """The same object for the same table, so that backends find what they cached with it."""
    shape = list(table.shape)
    if table.device.type != "cpu" or table.dtype != torch.int64 or shape[1:] != [3] or shape[0] == 0:
        raise BadArgument(
            f"expected segments int64 [R, 3], R > 0, on the CPU; got {table.dtype} {shape} on {table.device}"
        )
    return _segments_of(table.contiguous().numpy().tobytes(), groups)


def _check(rule: Rule, params: Tensor, others: Sequence[Tensor], grad: Tensor, hyper: Tensor, k: int) -> None:
    for tensor in (params, *others):
        if tensor.shape != grad.shape or tensor.ndim != 1 or tensor.dtype != params.dtype:
            raise BadArgument(
                f"expected params, slots and adjoints of one dtype and the gradient's flat shape "
                f"{list(grad.shape)}; got {tensor.dtype} {list(tensor.shape)}"
            )
    if hyper.dtype != torch.float64 or hyper.ndim != 2 or hyper.shape[1] != len(rule.hyper):
        raise BadArgument(
            f"expected hyper float64 [groups, {len(rule.hyper)}] with the columns {list(rule.hyper)}; "
            f"got {hyper.dtype} {list(hyper.shape)}"
        )
    if k < 1:
        raise BadArgument(f"expected the number of the step, 1, 2, ...; got k={k}")


def step_(rule: Rule, params: Tensor, slots: Sequence[Tensor], grad, hyper, k: int, segments) -> None:
    """One step in place."""
    _check(rule, params, slots, grad, hyper, k)
    backend = dispatch.choose(rule, params, grad)
    backend.step_(rule, params, slots, grad, hyper, k, _segments(segments, len(hyper)))


def _out_of_place(rule: Rule, params: Tensor, grad: Tensor) -> bool:
    return getattr(dispatch.choose(rule, params, grad), "OUT_OF_PLACE", False)


def _like(tensor: Tensor, segments: Tensor) -> Tensor:
    """A new tensor with the elements of `tensor` outside every segment; the others are the kernel's to write."""
    new = buffers.empty(tensor.numel(), tensor.dtype, tensor.device)
    ends = [0, *segments[:, 1].tolist()]
    for start, stop in zip(ends, [*segments[:, 0].tolist(), tensor.numel()], strict=True):
        if start < stop:
            new[start:stop] = tensor[start:stop]
    return new


def step(rule: Rule, params: Tensor, slots: Sequence[Tensor], grad, hyper, k: int, segments) -> list[Tensor]:
    """The new `[params, *slots]`."""
    if not _out_of_place(rule, params, grad):
        new = [tensor.clone() for tensor in (params, *slots)]
        step_(rule, new[0], new[1:], grad, hyper, k, segments)
        return new
    _check(rule, params, slots, grad, hyper, k)
    new = [_like(tensor, segments) for tensor in (params, *slots)]
    backend: Any = dispatch.choose(rule, params, grad)  # one that takes `out`
    backend.step_(rule, params, slots, grad, hyper, k, _segments(segments, len(hyper)), out=new)
    return new


def vjp_(rule: Rule, params, slots, grad, hyper, k: int, segments, adjoints, u: Tensor, **options) -> Tensor:
    """The adjoints and u in place; returns the cotangent of hyper."""
    _check(rule, params, [*slots, *adjoints], grad, hyper, k)
    backend = dispatch.choose(rule, params, grad)
    out = backend.vjp_(
        rule, params, slots, grad, hyper, k, _segments(segments, len(hyper)), adjoints[0], adjoints[1:], u, **options
    )
    return out[:, :-1].to(hyper.device).contiguous()  # the last column belongs to a gradient scale


def vjp(rule: Rule, params, slots, grad, hyper, k: int, segments, adjoints, hyper_wanted: bool) -> list[Tensor]:
    """The new adjoints, the cotangent of grad, and that of hyper."""
    if not _out_of_place(rule, params, grad):
        new, u = [tensor.clone() for tensor in adjoints], torch.zeros_like(params)
        return [*new, u, vjp_(rule, params, slots, grad, hyper, k, segments, new, u)]
    new, u = [_like(tensor, segments) for tensor in adjoints], _like(params.new_zeros(()).expand_as(params), segments)
    options = {"out": new, "wanted": "all" if hyper_wanted else "none"}
    return [*new, u, vjp_(rule, params, slots, grad, hyper, k, segments, adjoints, u, **options)]


def fake_vjp(params: Tensor, hyper: Tensor, adjoints: Sequence[Tensor]) -> list[Tensor]:
    return [
        *map(torch.empty_like, adjoints),
        torch.empty_like(params),
        torch.empty_like(hyper, memory_format=torch.contiguous_format),
    ]


def differentiable_vjp(
    rule: Rule, k: int, segments: Tensor, state: Sequence[Tensor], grad: Tensor, hyper: Tensor, adjoints
) -> list[Tensor]:
    """What `vjp` computes, by autograd through the reference step; every element looks up its own row of hyper."""
    wanted = [
        tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
        for tensor in (*state, grad, hyper)
    ]
    *old, g, table = wanted
    place = torch.arange(grad.shape[0])
    row = torch.searchsorted(segments[:, 1].contiguous(), place, right=True).clamp(max=segments.shape[0] - 1)
    inside = (place >= segments[row, 0]) & (place < segments[row, 1])
    h = table[segments[row, 2].to(hyper.device)].to(grad.device).unbind(1)
    stepped = reference.step(rule, old[0], old[1:], g.to(old[0].dtype), h, k)
    new = [
        torch.where(inside.to(grad.device), after.to(before.dtype), before)
        for before, after in zip(old, stepped, strict=True)
    ]
    *dstate, u, dhyper = torch.autograd.grad(new, wanted, list(adjoints), create_graph=True, materialize_grads=True)
    return [*dstate, u.to(dstate[0].dtype), dhyper]


def differentiate(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of `function(*inputs)`, themselves differentiable where grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that one tensor that stands in two places gets two gradients.
        inputs = [tensor.view_as(tensor) for tensor in inputs]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        pairs = [
            (out, cotangent)
            for out, cotangent in zip(function(*inputs), cotangents, strict=True)
            if cotangent is not None and out.requires_grad
        ]
        if not wanted or not pairs:
            return [None] * len(inputs)
        outputs, seeds = zip(*pairs, strict=True)
        gradients = iter(torch.autograd.grad(outputs, wanted, seeds, create_graph=create_graph, allow_unused=True))
    return [next(gradients) if tensor.requires_grad else None for tensor in inputs]


def zeros_for_none(cotangents: Sequence[Tensor | None], outputs_like: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(like) if cotangent is None else cotangent.contiguous()
        for cotangent, like in zip(cotangents, outputs_like, strict=True)
    ]
