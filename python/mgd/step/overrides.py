"""Functions of torch that are replaced inside a step: by forms with complete derivatives, or with fused second ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mgd.step import class_weights, norms, written_out
from mgd_kernels import functional

_DIFFERENTIATE = (torch.autograd.grad, torch.Tensor.backward)
_WATCHED = {*_DIFFERENTIATE, *written_out.LOOKS, *written_out.EXPOSES, written_out.NODE}
# Of a tensor itself, not of its values.
_OF_ITSELF = {
    *[getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")],
    *[getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "__len__")],
}
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


class FunctionOverrides(TorchFunctionMode):
    """Inside this mode, calls of torch's functions go to their replacements in `OVERRIDES`, and if `plain` in `PLAIN`.

    BatchNorm and InstanceNorm: torch updates the running mean and variance inside the normalisation kernel, where
    autograd does not see it, and it has no derivative with respect to them if it normalises by them. Here the update is
    computed outside the kernel, and normalisation by running statistics is plain arithmetic. Weight normalisation: the
    second derivative of torch's fused kernel treats the norm as a constant (torch 2.13; `gradgradcheck` fails). Grouped
    matrix products: what transformers takes in place of torch's, in a capture among others, is only once
    differentiable.

    formulas: whether formulas that models write out are replaced as well (`mgd.step.written_out`).

    plain: for a loss that differentiates the model itself, as a gradient penalty does. The metagradient then needs
    third derivatives, in which torch holds the statistics of its norms constant: there they are plain arithmetic, and
    formulas stay as they are written. differentiates: whether a graph of a gradient was made while `in_loss`, or a
    gradient inside of such a formula asked for.

    opened: tensors whose memory was asked for while `in_loss`, where it may be written unseen: the memory, held so that
    no other tensor gets it, the tensor, and its values then.

    carried: tensors that earlier calls left in the model. read: the ids of those whose values a function was given.
    """

    def __init__(self, plain: bool = False, formulas: bool = True):
        super().__init__()
        self.plain, self.formulas = plain, formulas and not plain
        self.in_loss = self.differentiates = self.replaced = False
        self.opened: list[tuple[torch.UntypedStorage, torch.Tensor, torch.Tensor]] = []
        self.carried: list[torch.Tensor] = []
        self.read: set[int] = set()

    def written(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether one of these tensors was changed past autograd, as `.data` allows. What changes a tensor otherwise
        counts its version."""
        if not self.opened:
            return False
        known = {id(tensor) for tensor in tensors} | {tensor.untyped_storage()._cdata for tensor in tensors}
        return any(
            (memory._cdata in known or id(tensor) in known)
            and not torch.allclose(tensor, before, rtol=0, atol=0, equal_nan=True)
            for memory, tensor, before in self.opened
        )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.carried and self.in_loss and func not in _OF_ITSELF:
            given = {id(x) for x in tree_leaves((args, kwargs))}
            self.read |= {id(x) for x in self.carried if id(x) in given}
        if self.in_loss and func in _WATCHED:
            self._watch(func, args, kwargs)
        if func is torch.autograd.grad and not kwargs.get("is_grads_batched"):
            return _grad(self, *args, **kwargs)
        if func in PLAIN and (self.plain or torch._C._are_functorch_transforms_active()):
            return PLAIN[func](*args, **kwargs)
        if isinstance(func, _OPERATORS):
            func = OPERATORS.get(str(func).removesuffix(".default"), func)
        result = OVERRIDES.get(func, func)(*args, **kwargs)
        if not self.formulas:
            return result
        exposed = [memory for memory, _, _ in self.opened] if self.opened else ()
        found = written_out.replaced(func, args, kwargs, result, exposed)
        self.replaced |= found is not result
        return found

    def _watch(self, func, args, kwargs):
        if func in _DIFFERENTIATE:
            self.differentiates |= bool(
                kwargs.get("create_graph") or (func is torch.Tensor.backward and args[3:4] == (True,))
            )
        if func in written_out.LOOKS:
            self.differentiates |= written_out.looks((args, kwargs))
        elif func == written_out.NODE:
            self.differentiates |= written_out.looks(args) or (self.replaced and written_out.walks(args[0]))
        elif func in written_out.EXPOSES:
            tensors = [x for x in args if isinstance(x, torch.Tensor) and torch._C._has_storage(x)]
            self.opened += [(x.untyped_storage(), x, x.detach().clone()) for x in tensors]


def _grad(
    mode,
    outputs,
    inputs,
    grad_outputs=None,
    retain_graph=None,
    create_graph=False,
    only_inputs=True,
    allow_unused=None,
    is_grads_batched=False,
    materialize_grads=False,
):
    """`torch.autograd.grad` for tuples, past the dispatch to modes, which would switch `mode` off inside."""
    allow_unused = materialize_grads if allow_unused is None else allow_unused
    retain_graph = create_graph if retain_graph is None else retain_graph
    seeds = (grad_outputs,) if isinstance(grad_outputs, torch.Tensor) else grad_outputs or (None,) * len(outputs)
    seeds = torch.autograd._make_grads(outputs, tuple(seeds), is_grads_batched=False)
    with mode:  # an activation checkpoint calls the model again in here
        grads = _engine_run_backward(
            outputs, seeds, retain_graph, create_graph, inputs, allow_unused, accumulate_grad=False
        )
    if materialize_grads:
        return tuple(
            torch.zeros_like(x, requires_grad=create_graph) if g is None else g
            for g, x in zip(grads, inputs, strict=True)
        )
    return grads


def _torch_grouped_mm(mat_a, mat_b, offs=None, bias=None, out_dtype=None):
    """As in a capture, to the same bits."""
    plain = offs is not None and bias is None and out_dtype is None and mat_a.dtype == mat_b.dtype
    if plain and mat_a.device.type == "cpu" and (mat_a.ndim, mat_b.ndim) == (2, 3):
        return functional.grouped_mm(mat_a, mat_b, offs)
    return torch._grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)


OVERRIDES: dict[Any, Callable] = {
    **functional.REPLACEMENTS,
    F.cross_entropy: class_weights.cross_entropy,
    F.nll_loss: class_weights.nll_loss,
    F.batch_norm: norms.fused_batch_norm,
    F.instance_norm: norms.instance_norm,
    torch._weight_norm: norms.weight_norm,
    **({torch._grouped_mm: _torch_grouped_mm} if hasattr(torch, "_grouped_mm") else {}),
}


def _grouped_mm(input, weight, offs):
    own = functional.grouped_mm if input.device.type == "cpu" else torch.ops.transformers.grouped_mm_fallback
    return own(input, weight, offs)


# Operators of libraries that need not be installed, by name.
OPERATORS: dict[str, Callable] = {"transformers.grouped_mm_fallback": _grouped_mm}
# For losses that differentiate the model themselves.
PLAIN: dict[Any, Callable] = {
    F.layer_norm: norms.plain_layer_norm,
    F.group_norm: norms.plain_group_norm,
    F.batch_norm: norms.plain_batch_norm,
    F.instance_norm: norms.plain_instance_norm,
}
