"""One differentiable fused update over a list of tensors: what the optimizers of other libraries are built from.

The graph keeps references to what the VJP reads and nothing else: for Adam the gradients and the old moments, for SGD
nothing at all unless a hyperparameter is differentiated (the rule is linear). The backward pass is one VJP kernel;
under `create_graph=True` it is the operator of `mgd_kernels.ops`, which is itself differentiable.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mgd_kernels import buffers, dispatch, ops
from mgd_kernels.arena import Segments
from mgd_kernels.backends.interface import Leaves
from mgd_kernels.integrations import flat
from mgd_kernels.rules import ADAM, Rule


@dataclass(frozen=True)
class Call:
    """What a fused update is, beside its tensors.

    k: the number of the step, 1, 2, ... dtype: of the state. decayed: which leaves have weight decay; the tensors of a
    call are its gradients, its slots, and the parameters of these leaves. moving: more than weight decay is to be
    differentiated. keep: the VJP reads gradients and slots. keep_params: it reads parameters. inplace: the slots are
    overwritten.
    """

    rule: Rule
    k: int
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device
    decayed: tuple[int, ...]
    moving: bool
    keep: bool
    keep_params: bool
    inplace: bool

    @property
    def groups(self) -> list[int]:
        """The row of each leaf in the table of hyperparameters."""
        decayed = set(self.decayed)
        return [0 if i in decayed else 1 for i in range(len(self.shapes))]

    def table(self, hyper: Tensor) -> Tensor:
        """`[2, H]`: with weight decay and without."""
        without = torch.ones_like(hyper)
        without[self.rule.column("weight_decay")] = 0
        return torch.stack([hyper, hyper * without])

    def rate(self, hyper: Tensor) -> Tensor:
        return hyper[self.rule.column("lr")] * hyper[self.rule.column("weight_decay")]

    def split(self, tensors: Sequence) -> tuple[Sequence, list[Sequence], Sequence]:
        """Gradients, slots by slot, and parameters out of one list."""
        n = len(self.shapes)
        end = n * (1 + len(self.rule.slots))
        return tensors[:n], [tensors[i : i + n] for i in range(n, end, n)], tensors[end:]

    def at_leaves(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Parameters of decayed leaves, each at its leaf."""
        leaves: list[Tensor | None] = [None] * len(self.shapes)
        for i, leaf in zip(self.decayed, params, strict=False):  # none where they are not saved
            leaves[i] = leaf
        return leaves

    def ready(self, leaves: Leaves, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """The leaves as kernels read them."""
        return [
            leaf
            if leaf is None or (leaf.dtype == (dtype or leaf.dtype) and leaf.is_contiguous())
            else leaf.to(dtype or leaf.dtype).contiguous()
            for leaf in leaves
        ]

    def empty(self) -> list[Tensor]:
        """Leaves of the state's dtype, in one buffer."""
        numel = sum(shape.numel() for shape in self.shapes)
        return flat.views(buffers.empty(numel, self.dtype, self.device), self.shapes)

    def kernel(self, name: str, grads: Leaves) -> Callable:
        """`update` or `update_vjp` of the backend that serves this call."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        grad = grads[0] if grads and grads[0] is not None else like
        backend = dispatch.choose(self.rule, like, grad.reshape(-1))
        return getattr(backend, name, None) or partial(getattr(flat, name), backend)


def state_dtype(leaf: Tensor) -> torch.dtype:
    """The dtype of the optimizer state of a tensor: its own, and float32 for the 16-bit ones."""
    return leaf.dtype if leaf.dtype.itemsize >= 4 else torch.float32


def zeros(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Zero tensors like the leaves, of the dtype of their state, those of one dtype and device in one buffer."""
    kinds = [(leaf.device, state_dtype(leaf)) for leaf in leaves]
    zeros_at: dict[int, Tensor] = {}
    for device, dtype in dict.fromkeys(kinds):
        of_kind = [i for i, kind in enumerate(kinds) if kind == (device, dtype)]
        shapes = [leaves[i].shape for i in of_kind]
        buffer = torch.zeros(sum(shape.numel() for shape in shapes), dtype=dtype, device=device)
        parts = buffer.split([shape.numel() for shape in shapes])
        zeros_at.update((i, part.view(shape).detach()) for i, part, shape in zip(of_kind, parts, shapes, strict=True))
    return [zeros_at[i] for i in range(len(leaves))]


def fused_update(
    rule: Rule,
    k: int,
    hyper: Tensor,
    grads: Sequence[Tensor],
    slots: Sequence[Sequence[Tensor]],
    params: Sequence[Tensor],
    decayed: Sequence[int],
    inplace: bool,
    decay_moves: bool,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The updates (in the gradients' dtype) and the new slots of step `k`, all leaves in one kernel.

    hyper: float64 `[H]` in the rule's columns, `l2` being 0. decayed: the indices of the leaves that have weight decay,
    and params: these leaves' parameters. All leaves share a device and a dtype. Differentiable in every tensor;
    decay_moves: the learning rate or the weight decay requires a gradient. With `inplace`, where neither gradients nor
    slots nor hyperparameters are tracked, the slots are overwritten and the parameters count as constants, as in
    TorchOpt.
    """
    every = [*grads, *(leaf for slot in slots for leaf in slot)]
    moving = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hyper, *every))
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
        keep_params=moving and decay_moves,
        inplace=inplace,
    )
    function = _update if inplace else FusedUpdate.apply
    out = function(call, hyper, *every, *params)
    updates, new, _ = call.split(out)
    return list(updates), [list(slot) for slot in new]


@torch.no_grad()
def _update(call: Call, hyper: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    grads, old, params = call.split(tensors)
    grads, slots = call.ready(grads), [call.ready(slot) for slot in old]
    updates = call.empty()
    new = slots if call.inplace else [call.empty() for _ in slots]
    params = call.ready(call.at_leaves(params), call.dtype)
    call.kernel("update", grads)(call.rule, params, slots, grads, call.table(hyper), call.k, call.groups, updates, new)
    out: list[Tensor] = list(itertools.chain(*new))
    if call.inplace:
        for leaf, stepped in zip(itertools.chain(*old), out, strict=True):
            if leaf is not stepped:
                leaf.copy_(stepped)
        out = list(itertools.chain(*old))
    if call.dtype != tensors[0].dtype:
        updates = [update.to(tensors[0].dtype) for update in updates]
    return *updates, *out


class FusedUpdate(torch.autograd.Function):
    """`apply(call, hyper, *tensors)`: gradients, slots and parameters in, updates and new slots out."""

    @staticmethod
    def forward(call: Call, hyper: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _update(call, hyper, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, hyper, *tensors = inputs
        grads, slots, params = ctx.call.split(tensors)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        saved_leaves = [*grads, *itertools.chain(*slots)] if ctx.call.keep else []
        ctx.save_for_backward(hyper, *saved_leaves, *(params if ctx.call.keep_params else ()))
        ctx.set_materialize_grads(False)
        if not ctx.call.moving:  # the slots do not depend on the parameters: no chain of graphs through them
            ctx.mark_non_differentiable(*output[len(grads) :])

    @staticmethod
    def backward(ctx, *cotangents):
        call = ctx.call
        hyper, *saved = ctx.saved_tensors
        updates, slots, _ = call.split(cotangents)
        if not call.moving:
            rate = call.rate(hyper)
            at_update = [None if updates[i] is None else -rate * updates[i] for i in call.decayed]
            at_inputs = [*[None] * (len(ctx.dtypes) - len(call.decayed)), *at_update]
            dhyper = None
        else:
            saved_leaves = saved if call.keep else [*[None] * (len(ctx.dtypes) - len(call.decayed)), *saved]
            vjp = _differentiable_vjp if torch.is_grad_enabled() else _vjp
            at_inputs, dhyper = vjp(call, hyper, saved_leaves, updates, slots, ctx.needs_input_grad)
        gradients = [
            cotangent if cotangent is None or cotangent.dtype == dtype else cotangent.to(dtype)
            for dtype, cotangent in zip(ctx.dtypes, at_inputs, strict=True)
        ]
        return None, dhyper if hyper.requires_grad else None, *gradients


def _vjp(
    call: Call, hyper: Tensor, saved_leaves: Leaves, updates: Leaves, slots: Sequence[Leaves], needs: Sequence[bool]
):
    """The cotangents of gradients, slots and parameters in one list, and that of hyper `[H]`."""
    grads, old, params = call.split(saved_leaves)
    grads = call.ready(grads)
    _, need_slots, need_params = call.split(needs[2:])
    nothing: list[Tensor | None] = [None] * len(call.shapes)
    new_slots = [call.empty() if any(needed) else nothing for needed in need_slots]
    new_params = nothing
    if any(need_params):
        every = call.empty()
        new_params = call.at_leaves([every[i] for i in call.decayed])
    u = call.empty()
    sums = call.kernel("update_vjp", grads)(
        call.rule,
        call.ready(call.at_leaves(params), call.dtype),
        [call.ready(slot) for slot in old],
        grads,
        call.table(hyper),
        call.k,
        call.groups,
        call.ready(updates, call.dtype),
        [call.ready(slot, call.dtype) for slot in slots],
        new_params,
        new_slots,
        u,
        hyper.requires_grad,
    )
    dhyper = sums[:, :-1].sum(0).to(hyper.device) if hyper.requires_grad else None
    return [*u, *itertools.chain(*new_slots), *(new_params[i] for i in call.decayed)], dhyper


def _differentiable_vjp(
    call: Call, hyper: Tensor, saved_leaves: Leaves, updates: Leaves, slots: Sequence[Leaves], _needs
):
    """As `_vjp`, in the graph."""
    sizes = [shape.numel() for shape in call.shapes]
    zero = torch.zeros((), dtype=call.dtype, device=call.device)

    def join(leaves: Leaves, dtype: torch.dtype | None = None) -> Tensor:
        present = [zero.expand(s) if leaf is None else leaf for leaf, s in zip(leaves, call.shapes, strict=True)]
        joined = torch.cat([leaf.reshape(-1) for leaf in present])
        return joined if dtype is None else joined.to(dtype)

    def parts(joined: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(joined.split(sizes), call.shapes, strict=True)]

    grads, old, params = call.split(saved_leaves)
    grad = join(grads)
    state = [join(call.at_leaves(params), call.dtype), *(join(slot) for slot in old)]
    adjoints = [join(row, call.dtype) for row in (updates, *slots)]
    ends = list(itertools.accumulate(sizes))
    segments = Segments.merged(list(zip([0, *ends[:-1]], ends, call.groups, strict=True)), 2).table
    if call.rule is ADAM:
        _, *new, u, dtable = ops.adam_step_vjp(*state, grad, call.table(hyper), call.k, segments, *adjoints)
    else:
        nesterov = call.rule.nesterov
        _, *new, u, dtable = ops.sgd_step_vjp(
            state[0], state[1:], grad, call.table(hyper), call.k, segments, nesterov, adjoints
        )
    rate, at_update = call.rate(hyper), parts(adjoints[0])
    dparams = [-rate * at_update[i] for i in call.decayed]
    return [*parts(u), *itertools.chain(*map(parts, new)), *dparams], dtable.sum(0)
