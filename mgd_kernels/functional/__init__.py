"""Functions of `torch.nn.functional` with fused first and second derivatives, for exact Hessian-vector products.

A second derivative by reverse over reverse decomposes, in torch, into dozens of elementwise passes per operator. Here
the function, its gradient and the gradient of that are one operator each (`torch.ops.mgd_kernels.*`), so each is one
node in a graph that `make_fx` traces. They serve float32 on the CPU in reverse mode; pointwise functions, layer and RMS
norm and softmax also on a GPU that Triton serves, with rows of at most 4,096 elements, and attention there by tiles,
with heads of at most 128. On a GPU attention also takes 16-bit tensors.
Everything else goes to torch's own function, so a replacement is always safe. From the third derivative on, formulas in
torch's operators take over. In forward mode (`torch.autograd.forward_ad`) they raise NotImplementedError. Results are
the same bits for any number of threads. Convolutions are made of torch's own kernels, and serve any device and
floating-point dtype. Grouped matrix products are made of torch's, have derivatives of any order, and serve any
floating-point dtype on the CPU. Max pooling serves float64 too, to torch's bits. `linear_cross_entropy`, which has no
counterpart in torch, and attention from 1024 x 1024 on work by strips and hold no matrix; they serve float64 too, and
`linear_cross_entropy` a GPU.

Import the functions, `REPLACEMENTS` (torch's function -> ours) and `served` from here. The rooms it looks into:
`backends.cpu` (to load the extension), `backends.triton_nn`, `backends.triton_attention`, `backends.triton_loss` and
`errors`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from mgd_kernels.functional._library import served
from mgd_kernels.functional.activation import gelu, sigmoid, silu, tanh
from mgd_kernels.functional.attention import scaled_dot_product_attention, softmax
from mgd_kernels.functional.batch_norm import batch_norm, batch_norm_with_statistics
from mgd_kernels.functional.convolution import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from mgd_kernels.functional.grouped import grouped_mm
from mgd_kernels.functional.linear_loss import linear_cross_entropy
from mgd_kernels.functional.loss import cross_entropy
from mgd_kernels.functional.max_pooling import max_pool2d
from mgd_kernels.functional.norm import group_norm, layer_norm, rms_norm
from mgd_kernels.functional.pooling import avg_pool2d
from mgd_kernels.functional.rotary import rotary, rotary_fits

__all__ = [
    "REPLACEMENTS",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_with_statistics",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cross_entropy",
    "gelu",
    "group_norm",
    "grouped_mm",
    "layer_norm",
    "linear_cross_entropy",
    "max_pool2d",
    "rms_norm",
    "rotary",
    "rotary_fits",
    "scaled_dot_product_attention",
    "served",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
]

REPLACEMENTS: dict[Callable, Callable] = {
    F.gelu: gelu,
    F.silu: silu,
    torch.tanh: tanh,
    torch.Tensor.tanh: tanh,
    torch.sigmoid: sigmoid,
    torch.Tensor.sigmoid: sigmoid,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.softmax: softmax,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.cross_entropy: cross_entropy,
    F.avg_pool2d: avg_pool2d,
    F.max_pool2d: max_pool2d,
    torch.max_pool2d: max_pool2d,
    F.conv1d: conv1d,
    F.conv2d: conv2d,
    F.conv3d: conv3d,
    F.conv_transpose1d: conv_transpose1d,
    F.conv_transpose2d: conv_transpose2d,
    F.conv_transpose3d: conv_transpose3d,
}
