"""Normalisation with complete derivatives: with respect to running statistics, and of any order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_kernels import functional


def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if not training:
        return _normalized(input, running_mean, running_var, weight, bias, eps)
    _track_batch(input, running_mean, running_var, momentum)
    return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)


def fused_batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    fused = functional.batch_norm_with_statistics(input, weight, bias, eps) if training else None
    if fused is None:
        return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    result, mean, variance = fused
    if running_mean is not None:
        dtype = running_mean.dtype
        _update(running_mean, running_var, mean.to(dtype), variance.to(dtype), momentum)
    return result


def instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats:
        return _normalized(input, running_mean, running_var, weight, bias, eps)
    _track_instances(input, running_mean, running_var, momentum)
    return F.instance_norm(input, None, None, weight, bias, True, momentum, eps)


def _track_batch(input, running_mean, running_var, momentum):
    """The running statistics of BatchNorm, if there are any."""
    if running_mean is not None:
        dims = [d for d in range(input.ndim) if d != 1]
        variance, mean = torch.var_mean(input.to(running_mean.dtype), dims, correction=1)
        _update(running_mean, running_var, mean, variance, momentum)


def _track_instances(input, running_mean, running_var, momentum):
    """The running statistics of InstanceNorm, if there are any."""
    if running_mean is not None:
        dims = list(range(2, input.ndim))
        variance, mean = torch.var_mean(input.to(running_mean.dtype), dims, correction=1)
        _update(running_mean, running_var, mean.mean(0), variance.mean(0), momentum)


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


def weight_norm(v, g, dim=0):
    return v * (g / torch.norm_except_dim(v, 2, dim))


# --- plain arithmetic: derivatives of any order ----------------------------------------------------------------


def plain_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return _affine(_standardized(input, list(range(-len(normalized_shape), 0)), eps), weight, bias)


def plain_group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    groups = _standardized(input.reshape(len(input), num_groups, -1), [-1], eps)
    return _affine(groups.reshape(input.shape), *_per_channel(input, weight, bias))


def plain_batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if not training:
        return _normalized(input, running_mean, running_var, weight, bias, eps)
    _track_batch(input, running_mean, running_var, momentum)
    dims = [d for d in range(input.ndim) if d != 1]
    return _affine(_standardized(input, dims, eps), *_per_channel(input, weight, bias))


def plain_instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats:
        return _normalized(input, running_mean, running_var, weight, bias, eps)
    _track_instances(input, running_mean, running_var, momentum)
    dims = list(range(2, input.ndim))
    return _affine(_standardized(input, dims, eps), *_per_channel(input, weight, bias))


def _standardized(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """Of mean 0 and variance 1 over these dimensions; 16-bit tensors are computed in float32, as torch's kernels do."""
    wide = x if x.dtype.itemsize >= 4 else x.float()
    centred = wide - wide.mean(dims, keepdim=True)
    return (centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()).to(x.dtype)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _per_channel(input: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors `[C]` in the place of the channels of `input`, `[B, C, ...]`."""
    shape = [1, -1] + [1] * (input.ndim - 2)
    return [None if x is None else x.view(shape) for x in tensors]
