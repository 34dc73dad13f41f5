"""The user's model as a function of parameters and buffers that live elsewhere.

The model's own tensors are swapped for ours while the loss or the objective runs and are put back afterwards, also
after an exception. Tied tensors are swapped in every place where they stand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from mgd_kernels import functional

Buffers = dict[str, Tensor]


class Binding:
    """The places in a model where its trainable parameters and buffers stand.

    names: of the trainable parameters (`requires_grad`), each once. Frozen ones stay in the model as constants.
    fused: functions of torch are replaced by those with fused second derivatives (`mgd_kernels.functional`), which
        go in reverse mode only.
    """

    def __init__(self, model: nn.Module, fused: bool = True):
        self.model, self.modules = model, list(model.modules())
        self.fused = fused
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = tuple(trainable)
        self.frozen = [p for p in model.parameters() if not p.requires_grad]
        self.buffer_names = tuple(name for name, _ in model.named_buffers())
        self._parameter_places = self._places(model, list(trainable.values()), "_parameters")
        self._buffer_places = self._places(model, [b for _, b in model.named_buffers()], "_buffers")
        self.needs_exact_formulas = any(map(_needs_exact_formulas, model.modules()))

    @staticmethod
    def _places(model: nn.Module, tensors: Sequence[Tensor], attribute: str) -> list[tuple[dict[str, Any], str, int]]:
        """`(the module's dict, key, index into tensors)` of every place where one of the tensors stands."""
        index = {id(tensor): i for i, tensor in enumerate(tensors)}
        return [
            (getattr(module, attribute), key, index[id(tensor)])
            for module in model.modules()
            for key, tensor in getattr(module, attribute).items()
            if tensor is not None and id(tensor) in index
        ]

    def parameters(self) -> dict[str, Tensor]:
        """The model's own trainable parameters."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def buffers(self) -> Buffers:
        return {name: b.detach().clone() for name, b in self.model.named_buffers()}

    @contextlib.contextmanager
    def swapped(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[None]:
        """The model holds these tensors inside the block."""
        saved = []
        try:
            for places, tensors in ((self._parameter_places, parameters), (self._buffer_places, buffers)):
                for owner, key, i in places:
                    saved.append((owner, key, owner[key]))
                    owner[key] = tensors[i]
            yield
        finally:
            for owner, key, tensor in saved:
                owner[key] = tensor

    def call(
        self,
        function: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        buffers: Buffers,
        *args: Any,
        until: contextlib.ExitStack | None = None,
    ) -> tuple[Tensor, Buffers]:
        """`function(model, *args)` with these parameters and buffers, and the buffers as the model leaves them.

        The tensors in `buffers` may be changed in place by the model: hand over copies.
        until: the model keeps the tensors until this stack is closed. A backward pass must lie inside where the
        function may use activation checkpointing, which calls the model again.
        """
        tensors = [buffers[name] for name in self.buffer_names]
        with contextlib.ExitStack() as own:
            stack = own if until is None else until
            stack.enter_context(self.swapped(parameters, tensors))
            if self.fused:
                stack.enter_context(Formulas(_FUSED))
            elif self.needs_exact_formulas:
                stack.enter_context(Formulas(_EXACT))
            value = function(self.model, *args)
            for owner, key, i in self._buffer_places:
                tensors[i] = owner[key]  # the model may have replaced it
        return value, dict(zip(self.buffer_names, tensors, strict=True))


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """The `training` flag of every module is as before at the end of the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def model_kept(model: nn.Module) -> Iterator[None]:
    """Every module's parameters, buffers and `training` flag are the same objects at the end of the block as before."""
    registered: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (registry, dict(registry)) for module in model.modules() for registry in (module._parameters, module._buffers)
    ]
    with modes_kept(model):
        try:
            yield
        finally:
            for registry, before in registered:
                registry.clear()
                registry.update(before)


class Formulas(TorchFunctionMode):
    """Functions of torch by others: `_EXACT`, where torch's derivatives are incomplete, or `_FUSED`, faster ones too.

    BatchNorm and InstanceNorm: torch updates running mean and variance inside the normalisation kernel, out of
    autograd's sight, and knows no derivative with respect to them where they normalise. Here they are computed beside
    the kernel, and used by plain arithmetic. Weight normalisation: the fused kernel's second derivative takes the norm
    for a constant (torch 2.13; `gradgradcheck` fails).
    """

    def __init__(self, table: Mapping[Any, Callable]):
        super().__init__()
        self.table = table

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.table.get(func, func)(*args, **(kwargs or {}))


def _needs_exact_formulas(module: nn.Module) -> bool:
    return (
        (isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None)
        or isinstance(module, nn.utils.parametrizations._WeightNorm)
        or any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values())
    )


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if not training:
        return _normalized(input, running_mean, running_var, weight, bias, eps)
    if running_mean is not None:
        dims = [d for d in range(input.ndim) if d != 1]
        variance, mean = torch.var_mean(input.to(running_mean.dtype), dims, correction=1)
        _update(running_mean, running_var, mean, variance, momentum)
    return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)


def _fused_batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    fused = functional.batch_norm_with_statistics(input, weight, bias, eps) if training else None
    if fused is None:
        return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    result, mean, variance = fused
    if running_mean is not None:
        dtype = running_mean.dtype
        _update(running_mean, running_var, mean.to(dtype), variance.to(dtype), momentum)
    return result


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats:
        return _normalized(input, running_mean, running_var, weight, bias, eps)
    if running_mean is not None:
        dims = list(range(2, input.ndim))
        variance, mean = torch.var_mean(input.to(running_mean.dtype), dims, correction=1)
        _update(running_mean, running_var, mean.mean(0), variance.mean(0), momentum)
    return F.instance_norm(input, None, None, weight, bias, True, momentum, eps)


def _update(running_mean, running_var, mean, variance, momentum):
    running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    running_var.mul_(1 - momentum).add_(variance, alpha=momentum)


def _normalized(input, mean, variance, weight, bias, eps):
    """`input` `[B, C, ...]` normalised by a mean and variance `[C]`."""
    shape = [1, -1] + [1] * (input.ndim - 2)
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    result = (input - mean.view(shape)) * scale.view(shape)
    return (result if bias is None else result + bias.view(shape)).to(input.dtype)


def _weight_norm(v, g, dim=0):
    return v * (g / torch.norm_except_dim(v, 2, dim))


_EXACT: dict[Any, Callable] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch._weight_norm: _weight_norm,
}
_FUSED: dict[Any, Callable] = {**functional.REPLACEMENTS, **_EXACT, F.batch_norm: _fused_batch_norm}


def differentiable(buffers: Mapping[str, Tensor]) -> list[str]:
    """The names of the buffers that can carry an adjoint."""
    return [name for name, buffer in buffers.items() if buffer.is_floating_point()]
