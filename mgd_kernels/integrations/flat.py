"""`update` and `update_vjp` of `backends.interface.LeafBackend`, on a backend that only steps flat buffers.

The update `p' - p` itself is computed, never by subtraction: a rule is `p' = decay * p - lr * direction`, so the kernel
runs on a buffer that holds `-rate * p` (`rate = lr * weight_decay`) in the place of the parameters, without weight
decay in its table, and leaves the update there, as precise as the step itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mgd_kernels import buffers
from mgd_kernels.arena import Segments
from mgd_kernels.backends.interface import Backend, Leaves
from mgd_kernels.memory import wrote
from mgd_kernels.rules import Rule


def views(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Tensors that lie one behind the other in `flat`, each with its own version counter."""
    storage, offset, pieces = flat.untyped_storage(), flat.storage_offset(), []
    for shape in shapes:
        pieces.append(flat.new_empty(0).set_(storage, offset, shape))  # type: ignore[call-overload]  # strides may be left out
        offset += shape.numel()
    return pieces


def flatten(leaves: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """The elements of the leaves as `[n]`, and whether that is a copy: leaves that `views` made need none."""
    first = leaves[0]
    storage, start = first.untyped_storage().data_ptr(), first.storage_offset()
    end = start
    for leaf in leaves:
        if leaf.storage_offset() != end or not leaf.is_contiguous() or leaf.untyped_storage().data_ptr() != storage:
            flat = buffers.empty(sum(leaf.numel() for leaf in leaves), first.dtype, first.device)
            return torch.cat([leaf.detach().reshape(-1) for leaf in leaves], out=flat), True
        end += leaf.numel()
    return first.detach().as_strided((end - start,), (1,), start), False


def update(
    backend: Backend,
    rule: Rule,
    params: Leaves,
    slots: Sequence[Leaves],
    grads: Leaves,
    hyper: Tensor,
    k: int,
    groups: Sequence[int],
    updates: Sequence[Tensor],
    new_slots: Sequence[Sequence[Tensor]],
) -> None:
    """As `LeafBackend.update`."""
    update, apart = flatten(updates)
    pieces = views(update, [leaf.shape for leaf in updates])
    for piece, leaf, rate in zip(pieces, params, _rates(rule, hyper, groups), strict=True):
        piece.zero_() if leaf is None or not rate else torch.mul(leaf, -rate, out=piece)
    flats = []
    for old, new in zip(slots, new_slots, strict=True):
        flat, copied = flatten(new)
        if any(a is not b for a, b in zip(old, new, strict=True)):
            fill(flat, old, [leaf.shape for leaf in new])
        flats.append((flat, copied))
    grad = _joined(grads, updates)
    table = hyper.clone()
    table[:, rule.column("weight_decay")] = 0
    segments = _segments(updates, groups, len(hyper))
    if (table == table[0]).all():  # the rows differed in weight decay alone: one stretch
        table, segments = table[:1], Segments.single(update.numel())
    backend.step_(rule, update, [flat for flat, _ in flats], grad, table, k, segments)
    for leaves, flat, copied in ((updates, update, apart), *zip(new_slots, *zip(*flats, strict=True), strict=True)):
        if copied:
            torch._foreach_copy_(list(leaves), views(flat, [leaf.shape for leaf in leaves]))
        else:
            wrote(leaves)


def update_vjp(
    backend: Backend,
    rule: Rule,
    params: Leaves,
    slots: Sequence[Leaves],
    grads: Leaves,
    hyper: Tensor,
    k: int,
    groups: Sequence[int],
    adjoint_updates: Leaves,
    adjoint_slots: Sequence[Leaves],
    new_adjoint_params: Leaves,
    new_adjoint_slots: Sequence[Leaves],
    u: Sequence[Tensor],
    hyper_wanted: bool = True,
) -> Tensor | None:
    """As `LeafBackend.update_vjp`."""
    shapes = [leaf.shape for leaf in u]
    adjoints = [_joined(adjoint_updates, u, new=True)]
    cotangent, copied = flatten(u)
    # What the kernel leaves in a buffer of its own.
    apart: list[tuple[Leaves, Tensor]] = [(u, cotangent)] if copied else []
    for row, wanted in zip(adjoint_slots, new_adjoint_slots, strict=True):
        there = [leaf for leaf in wanted if leaf is not None]
        flat, copied = flatten(there) if len(there) == len(u) else (cotangent, True)
        adjoints.append(_joined(row, u, new=True) if copied else fill(flat, row, shapes))
        if copied:
            apart.append((wanted, adjoints[-1]))
    for leaf, adjoint, rate in zip(
        new_adjoint_params, views(adjoints[0], shapes), _rates(rule, hyper, groups), strict=True
    ):
        if leaf is not None:
            torch.mul(adjoint, -rate, out=leaf)
    old = [_joined(row, u) for row in (params, *slots)]
    segments = _segments(u, groups, len(hyper))
    cotangents = backend.vjp_(
        rule, old[0], old[1:], _joined(grads, u), hyper, k, segments, adjoints[0], adjoints[1:], cotangent
    )
    wrote([leaf for leaf in itertools.chain(*new_adjoint_slots, u) if leaf is not None])
    for row, flat in apart:
        for leaf, piece in zip(row, views(flat, shapes), strict=True):
            if leaf is not None:
                leaf.copy_(piece)
    return cotangents


def fill(flat: Tensor, leaves: Leaves, shapes: Sequence[torch.Size]) -> Tensor:
    """Copy the leaves into `flat`, one behind the other."""
    for piece, leaf in zip(views(flat, shapes), leaves, strict=True):
        piece.zero_() if leaf is None else piece.copy_(leaf)
    return flat


def _joined(leaves: Leaves, like: Sequence[Tensor], new: bool = False) -> Tensor:
    """The leaves as `[n]`; `new`: in memory of its own."""
    present = [leaf for leaf in leaves if leaf is not None]
    if len(present) == len(leaves) and not new:
        return flatten(present)[0]
    first = present[0] if present else like[0]
    flat = buffers.empty(sum(leaf.numel() for leaf in like), first.dtype, first.device)
    return fill(flat, leaves, [leaf.shape for leaf in like])


def _segments(leaves: Sequence[Tensor], groups: Sequence[int], count: int) -> Segments:
    ends = list(itertools.accumulate(leaf.numel() for leaf in leaves))
    return Segments.merged(list(zip([0, *ends[:-1]], ends, groups, strict=True)), count)


def _rates(rule: Rule, hyper: Tensor, groups: Sequence[int]) -> list[float]:
    rates = (hyper[:, rule.column("lr")] * hyper[:, rule.column("weight_decay")]).tolist()
    return [rates[group] for group in groups]
