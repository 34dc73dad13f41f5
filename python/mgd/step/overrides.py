"""Functions of torch that are replaced inside a step: by forms with complete derivatives, or with fused second ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from mgd_kernels import functional


class FunctionOverrides(TorchFunctionMode):
    """Inside this mode, calls of torch's functions go to their replacements in `OVERRIDES`.

    BatchNorm and InstanceNorm: torch updates the running mean and variance inside the normalisation kernel, where
    autograd does not see it, and it has no derivative with respect to them if it normalises by them. Here the update is
    computed outside the kernel, and normalisation by running statistics is plain arithmetic. Weight normalisation: the
    second derivative of torch's fused kernel treats the norm as a constant (torch 2.13; `gradgradcheck` fails).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.autograd.grad and not (kwargs or {}).get("is_grads_batched"):
            with self:  # an activation checkpoint calls the model again in here
                return _grad(*args, **(kwargs or {}))
        return OVERRIDES.get(func, func)(*args, **(kwargs or {}))


def _grad(
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
    """`torch.autograd.grad` for tuples, past the dispatch to modes that would switch the overrides off inside."""
    allow_unused = materialize_grads if allow_unused is None else allow_unused
    retain_graph = create_graph if retain_graph is None else retain_graph
    seeds = (grad_outputs,) if isinstance(grad_outputs, torch.Tensor) else grad_outputs or (None,) * len(outputs)
    seeds = torch.autograd._make_grads(outputs, tuple(seeds), is_grads_batched=False)
    grads = _engine_run_backward(
        outputs, seeds, retain_graph, create_graph, inputs, allow_unused, accumulate_grad=False
    )
    if materialize_grads:
        return tuple(
            torch.zeros_like(x, requires_grad=create_graph) if g is None else g
            for g, x in zip(grads, inputs, strict=True)
        )
    return grads


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
    """`input`, `[B, C, ...]`, normalised by a mean and a variance `[C]`."""
    shape = [1, -1] + [1] * (input.ndim - 2)
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    result = (input - mean.view(shape)) * scale.view(shape)
    return (result if bias is None else result + bias.view(shape)).to(input.dtype)


def _weight_norm(v, g, dim=0):
    return v * (g / torch.norm_except_dim(v, 2, dim))


OVERRIDES: dict[Any, Callable] = {
    **functional.REPLACEMENTS,
    F.batch_norm: _fused_batch_norm,
    F.instance_norm: _instance_norm,
    torch._weight_norm: _weight_norm,
}
