"""One differentiable fused update over a list of tensors: what the optimizers of other libraries are built from.

The update `p' - p` itself is computed, never by subtraction: a rule is `p' = decay * p - lr * direction`, so the kernel
runs on a buffer that holds `-rate * p` (weight decay, `rate = lr * weight_decay`; zero without) in the place of the
parameters, and leaves the update there, as precise as the step itself.

The graph keeps references to what the VJP reads and nothing else: for Adam the gradients and the old moments, for SGD
nothing at all unless a hyperparameter is differentiated (the rule is linear). The backward pass is one VJP kernel;
under `create_graph=True` it is the operator of `mgd_kernels.ops`, which is differentiable in its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgd_kernels import dispatch, ops
from mgd_kernels.arena import Segments
from mgd_kernels.integrations import buffers
from mgd_kernels.rules import ADAM, Rule


@dataclass(frozen=True)
class Call:
    """What a fused update is, beside its tensors.

    k: the number of the step, 1, 2, ... dtype: of the state. decayed: which leaves have weight decay; the tensors of a
    call are its gradients, its slots, and the parameters of these leaves. moving: more than weight decay is to be
    differentiated. keep: the VJP reads gradients and slots. inplace: the slots are overwritten.
    """

    rule: Rule
    k: int
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device
    decayed: tuple[int, ...]
    moving: bool
    keep: bool
    inplace: bool

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    @property
    def numel(self) -> int:
        return sum(self.sizes)

    def split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Sequence[Tensor]], Sequence[Tensor]]:
        """Gradients, slots by slot, and parameters out of one list."""
        n = len(self.shapes)
        end = n * (1 + len(self.rule.slots))
        return tensors[:n], [tensors[i : i + n] for i in range(n, end, n)], tensors[end:]

    def views(self, flat: Tensor) -> list[Tensor]:
        return views(flat, self.shapes)

    def parts(self, flat: Tensor) -> list[Tensor]:
        """The leaves in a flat tensor, in the graph where it is."""
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]

    def join_cotangents(self, leaves: Sequence[Tensor | None]) -> Tensor:
        """The elements of the leaves in a new tensor `[n]` of the state's dtype, 0 for leaves without a cotangent."""
        if torch.is_grad_enabled():
            zero = torch.zeros((), dtype=self.dtype, device=self.device)
            given = [zero.expand(s) if c is None else c for c, s in zip(leaves, self.shapes, strict=True)]
            return join(given).to(self.dtype)
        flat = buffers.empty(self.numel, self.dtype, self.device)
        for out, leaf in zip(self.views(flat), leaves, strict=True):
            out.zero_() if leaf is None else out.copy_(leaf)
        return flat


def state_dtype(leaf: Tensor) -> torch.dtype:
    """The dtype of the optimizer state of a tensor: its own, and float32 for the 16-bit ones."""
    return leaf.dtype if leaf.dtype.itemsize >= 4 else torch.float32


def views(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Tensors that lie one behind the other in `flat`, each with a version counter of its own."""
    storage, offset, found = flat.untyped_storage(), flat.storage_offset(), []
    for shape in shapes:
        found.append(flat.new_empty(0).set_(storage, offset, shape))  # type: ignore[call-overload]  # strides may be left out
        offset += shape.numel()
    return found


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


def join(leaves: Sequence[Tensor]) -> Tensor:
    """A new tensor `[n]` with the elements of the leaves; differentiable."""
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def zeros(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Zero tensors like the leaves, of the dtype of their state, those of one dtype and device in one buffer."""
    kinds = [(leaf.device, state_dtype(leaf)) for leaf in leaves]
    found: dict[int, Tensor] = {}
    for device, dtype in dict.fromkeys(kinds):
        of_kind = [i for i, kind in enumerate(kinds) if kind == (device, dtype)]
        shapes = [leaves[i].shape for i in of_kind]
        flat = torch.zeros(sum(shape.numel() for shape in shapes), dtype=dtype, device=device)
        parts = flat.split([shape.numel() for shape in shapes])
        found.update((i, part.view(shape).detach()) for i, part, shape in zip(of_kind, parts, shapes, strict=True))
    return [found[i] for i in range(len(leaves))]


def fused_update(
    rule: Rule,
    k: int,
    hyper: Tensor,
    rate: Tensor,
    grads: Sequence[Tensor],
    slots: Sequence[Sequence[Tensor]],
    params: Sequence[Tensor],
    decayed: Sequence[int],
    inplace: bool,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The updates (in the gradients' dtype) and the new slots of step `k`, all leaves in one kernel.

    hyper: float64 `[H]` in the rule's columns, `weight_decay` and `l2` being 0. rate: float64 `[]`, learning rate times
    decoupled weight decay. decayed: the indices of the leaves that decay, and params: these leaves' parameters. All
    leaves share a device and a dtype. Differentiable in every tensor. With `inplace`, where neither gradients nor slots
    nor hyperparameters are tracked, the slots are overwritten and the parameters count as constants, as in TorchOpt.
    """
    every = [*grads, *(leaf for slot in slots for leaf in slot)]
    moving = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hyper, rate, *every))
    inplace = inplace and not moving
    call = Call(
        rule=rule,
        k=k,
        shapes=tuple(leaf.shape for leaf in grads),
        dtype=state_dtype(grads[0]),
        device=grads[0].device,
        decayed=tuple(decayed),
        moving=moving,
        keep=moving and (rule is ADAM or hyper.requires_grad),
        inplace=inplace,
    )
    function = _update if inplace else FusedUpdate.apply
    out = function(call, hyper, rate, *every, *params)
    updates, new, _ = call.split(out)
    return list(updates), [list(slot) for slot in new]


@torch.no_grad()
def _update(call: Call, hyper: Tensor, rate: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    grads, slots, params = call.split(tensors)
    grad, _ = flatten(grads)
    update = buffers.empty(call.numel, call.dtype, call.device)
    decayed, rate_value = dict(zip(call.decayed, params, strict=True)), rate.item()
    for i, out in enumerate(call.views(update)):
        torch.mul(decayed[i].to(call.dtype), -rate_value, out=out) if i in decayed else out.zero_()
    flats = []
    for slot in slots:
        flat, copied = flatten(slot)
        flats.append(flat if copied or call.inplace else buffers.clone(flat))
    segments = Segments.single(call.numel)
    dispatch.choose(call.rule, update, grad).step_(call.rule, update, flats, grad, hyper[None], call.k, segments)
    new = [leaf for flat in flats for leaf in call.views(flat)]
    if call.inplace:
        old = [leaf for slot in slots for leaf in slot]
        if any(a.data_ptr() != b.data_ptr() for a, b in zip(old, new, strict=True)):
            torch._foreach_copy_(old, new)
        for leaf in old:  # the kernel writes past autograd: a graph that saved the leaf must hear of it
            torch.autograd.graph.increment_version(leaf)
        new = old
    return *call.views(update.to(grad.dtype)), *new


class FusedUpdate(torch.autograd.Function):
    """`apply(call, hyper, rate, *tensors)`: gradients, slots and parameters in, updates and new slots out."""

    @staticmethod
    def forward(call: Call, hyper: Tensor, rate: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _update(call, hyper, rate, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, hyper, rate, *tensors = inputs
        grads, slots, params = ctx.call.split(tensors)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        kept = [*grads, *(leaf for slot in slots for leaf in slot)] if ctx.call.keep else []
        ctx.kept = len(kept)
        ctx.save_for_backward(hyper, rate, *kept, *(params if rate.requires_grad else ()))
        ctx.set_materialize_grads(False)
        if not ctx.call.moving:  # the slots do not depend on the parameters: no chain of graphs through them
            ctx.mark_non_differentiable(*output[len(grads) :])

    @staticmethod
    def backward(ctx, *cotangents):
        call = ctx.call
        hyper, rate, *saved = ctx.saved_tensors
        if not call.moving:
            given = [cotangents[i] for i in call.decayed]
            dtypes = ctx.dtypes[len(ctx.dtypes) - len(given) :]
            dparams = [None if c is None else (-rate * c).to(dtype) for c, dtype in zip(given, dtypes, strict=True)]
            return *[None] * (3 + len(ctx.dtypes) - len(given)), *dparams
        updates, slots, _ = call.split(cotangents)
        adjoints = [call.join_cotangents(leaves) for leaves in (updates, *slots)]
        at_leaves = call.parts(adjoints[0]) if call.decayed else []
        at_update = [at_leaves[i] for i in call.decayed]
        drate = None
        if rate.requires_grad and call.decayed:
            terms = zip(at_update, saved[ctx.kept :], strict=True)
            drate = -torch.stack([(a.double() * p.double()).sum() for a, p in terms]).sum().to(rate.device)
        if torch.is_grad_enabled():
            u, new, dhyper = _differentiable_vjp(call, hyper, saved[: ctx.kept], adjoints)
            dparams = [-rate * a for a in at_update]
        else:
            u, new, dhyper = _vjp(call, hyper, saved[: ctx.kept], adjoints)
            # The cotangent of the update comes out of the kernel as it went in, since the table has no weight decay.
            if call.decayed:
                adjoints[0].mul_(-rate.item())
            dparams = at_update
        parts = [part for flat in (u, *new) for part in call.parts(flat)]
        found = zip(ctx.needs_input_grad[3:], ctx.dtypes, [*parts, *dparams], strict=True)
        dtensors = [part.to(dtype) if needed else None for needed, dtype, part in found]
        return None, dhyper if hyper.requires_grad else None, drate, *dtensors


def _kept(call: Call, kept: Sequence[Tensor], like: Tensor, join) -> tuple[Tensor, list[Tensor]]:
    """The gradient and the slots, flat; where the VJP does not need them, zeros in their place."""
    if not kept:
        zero = torch.zeros_like(like)
        return zero, [zero for _ in call.rule.slots]
    grads, slots, _ = call.split(kept)
    return join(grads), [join(slot) for slot in slots]


def _vjp(call: Call, hyper: Tensor, kept: Sequence[Tensor], adjoints: list[Tensor]):
    """Cotangents of the gradient `[n]`, of the slots `[n]` and of hyper `[H]`, in place on `adjoints`."""
    grad, slots = _kept(call, kept, adjoints[0], lambda leaves: flatten(leaves)[0])
    u = buffers.empty(call.numel, call.dtype, call.device)
    # Without weight decay in the table the parameters have no part in these cotangents: any buffer will do.
    params = slots[0] if slots else torch.zeros_like(u)
    segments = Segments.single(u.numel())
    dhyper = dispatch.choose(call.rule, params, grad).vjp_(
        call.rule, params, slots, grad, hyper[None], call.k, segments, adjoints[0], adjoints[1:], u
    )
    return u, adjoints[1:], dhyper[0, :-1].to(hyper.device)


def _differentiable_vjp(call: Call, hyper: Tensor, kept: Sequence[Tensor], adjoints: list[Tensor]):
    """As `_vjp`, out of place and in the graph."""
    grad, slots = _kept(call, kept, adjoints[0], join)
    params = torch.zeros_like(adjoints[0])
    segments = Segments.single(params.numel()).table
    if call.rule is ADAM:
        _, *new, u, dhyper = ops.adam_step_vjp(params, *slots, grad, hyper[None], call.k, segments, *adjoints)
    else:
        nesterov = call.rule.nesterov
        _, *new, u, dhyper = ops.sgd_step_vjp(params, slots, grad, hyper[None], call.k, segments, nesterov, adjoints)
    return u, new, dhyper[0]
