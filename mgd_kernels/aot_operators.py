"""What Triton's kernels of operators compile to, read off the generated code without a GPU.

`python -m mgd_kernels.aot_operators [TARGET ...]` prints, as JSON, a row for each kernel, for rows and
heads of several widths, among them the widest. See `aot` for how it is done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mgd_kernels import aot

FUNCTIONS = ("gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
WIDTHS = (64, 768, 1024, 4096)
HEADS = (32, 64, 128)
IMAGES = ((32, 64, 1024), (32, 512, 49))  # batch, channels, elements of each
VOCABULARIES = (50_304, 50_257)  # a multiple of 16 elements, and an odd number


def _empty(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def launch(functions: Sequence[str] = FUNCTIONS, widths: Sequence[int] = WIDTHS) -> None:
    """Call every operator's kernels on tensors without contents, for `aot.compile_only` to see."""
    from mgd_kernels.backends import triton_nn

    for function in functions:
        x = [_empty(4096) for _ in range(6)]
        triton_nn.activation(triton_nn.FORWARD, function, x[0], y=x[1], slope=x[2])
        triton_nn.activation(
            triton_nn.DOUBLE_BACKWARD, function, x[0], gy=x[1], c=x[2], slope=x[3], gx=x[4], ggy=x[5]
        )  # fmt: skip
    for width in widths:
        x, w, r = ([_empty(*shape) for _ in range(5)] for shape in ((32, width), (width,), (32,)))
        for centred in (True, False):
            given: dict[str, Any] = {"weight": w[0], "mean": r[0], "rstd": r[1]}
            triton_nn.row_norm(centred, triton_nn.FORWARD, x[0], width, 1e-5, bias=w[1], y=x[1], **given)
            triton_nn.row_norm(
                centred, triton_nn.BACKWARD, x[0], width, 1e-5, gy=x[1], gx=x[2], gw=w[2], gb=w[3], **given
            )  # fmt: skip
            given |= {"gy": x[1], "c": x[2], "cw": w[1], "cb": w[2]}
            triton_nn.row_norm(
                centred, triton_nn.DOUBLE_BACKWARD, x[0], width, 1e-5, gx=x[3], ggy=x[4], gw=w[3], **given
            )  # fmt: skip
        p, mask = [_empty(2, 2, 8, width) for _ in range(5)], _empty(2, 1, 1, width)
        for causal, added in ((False, None), (True, None), (False, mask)):
            triton_nn.softmax(triton_nn.FORWARD, 0.5, causal, added, x=p[0], p=p[1])
        triton_nn.softmax(triton_nn.BACKWARD, 0.5, True, gp=p[0], p=p[1], gx=p[2])
        triton_nn.softmax(triton_nn.DOUBLE_BACKWARD, 0.5, True, gp=p[0], c=p[1], p=p[2], ggp=p[3], again=p[4])


def launch_channel_norms(images: Sequence[tuple[int, int, int]] = IMAGES) -> None:
    """Call the kernels of batch norm, and of group norm in groups of 16 channels."""
    from mgd_kernels.backends.triton_channel_norm import channel_norm
    from mgd_kernels.backends.triton_nn import BACKWARD, DOUBLE_BACKWARD, FORWARD

    for batch, channels, inner in images:
        for groups in (0, channels // 16):
            shapes = (batch, channels, inner), (channels,), (batch * groups or channels,)
            x, w, s = ([_empty(*shape) for _ in range(6)] for shape in shapes)
            given: dict[str, Any] = {"weight": w[0], "mean": s[0], "rstd": s[1]}
            of_forward, of_backward, of_twice = {}, {}, {}
            if not groups:  # batch norm, whose statistics are outputs
                of_forward, of_backward = {"var": s[2]}, {"gmean": s[2], "gvar": s[3]}
                of_twice = {"gvar": s[3], "ggmean": s[4], "ggvar": s[5]}
            channel_norm(FORWARD, x[0], groups, 1e-5, bias=w[1], y=x[1], **given, **of_forward)
            channel_norm(
                BACKWARD, x[0], groups, 1e-5, gy=x[1], gx=x[2], gw=w[2], gb=w[3], **given, **of_backward
            )  # fmt: skip
            given |= {"gy": x[1], "c": x[2], "cw": w[1], "cb": w[2]}
            channel_norm(DOUBLE_BACKWARD, x[0], groups, 1e-5, gx=x[3], ggy=x[4], gw=w[3], **given, **of_twice)


def launch_attention(
    heads: Sequence[int] = HEADS, masks: Sequence[torch.dtype | None] = (None,), dropout: float = 0.0
) -> None:
    """Call attention's kernels, causal, with two query heads a head of keys, for heads of so many elements. Masks of
    numbers broadcast over heads, and have a gradient."""
    from mgd_kernels.backends import triton_attention

    for size in heads:
        q, g, o = (_empty(2, 4, 1024, size) for _ in range(3))
        k, v, statistics = _empty(2, 2, 1024, size), _empty(2, 2, 1024, size), _empty(2, 2, 4, 1024)
        for dtype in masks:
            mask = None if dtype is None else _empty(2, 1, 1024, 1024).to(dtype)
            added = mask if dtype is not torch.bool else None  # which has a gradient
            options = 0.125, 0, _empty(1).long()[0] if dropout else None, dropout
            rest = mask, added is not None, o, statistics, *options
            triton_attention.forward(q, k, v, mask, *options)
            triton_attention.backward(g, q, k, v, *rest)
            triton_attention.double_backward(q, k, v, added, g, q, k, v, *rest)


def launch_losses(vocabularies: Sequence[int] = VOCABULARIES) -> None:
    """Call the kernels of losses without logits, plain, and with label smoothing, z-loss and soft cap."""
    from mgd_kernels.backends.triton_loss import TritonRows

    target, gl, losses, statistics = _empty(64).long(), _empty(64), _empty(64), _empty(64, 2)
    for vocabulary in vocabularies:
        z, tangent, at = _empty(64, vocabulary), _empty(64, vocabulary), slice(0, 64)
        for options in ((0.0, 0.0, 0.0), (0.1, 0.01, 30.0)):
            loss = TritonRows(target, vocabulary, -100, *options)
            loss.forward(at, z, losses, statistics)
            loss.backward(at, z, gl, statistics)
            loss.forward_backward(at, z, gl, losses, statistics)
            loss.double_backward(at, z, tangent, gl, statistics)


def rows(target: str, functions: Sequence[str] = FUNCTIONS, widths: Sequence[int] = WIDTHS) -> list[dict[str, Any]]:
    """Of each kernel that `launch` launches: registers, spills, bytes of shared memory and of the widest access to
    global memory, and columns of tensor memory, of which sm_100 has 512."""
    return _compiled(target, lambda: launch(functions, widths))


def attention_rows(target: str, heads: Sequence[int] = HEADS, **options: Any) -> list[dict[str, Any]]:
    """The same of `launch_attention`."""
    return _compiled(target, lambda: launch_attention(heads, **options))


def channel_norm_rows(target: str, images: Sequence[tuple[int, int, int]] = IMAGES) -> list[dict[str, Any]]:
    """The same of `launch_channel_norms`."""
    return _compiled(target, lambda: launch_channel_norms(images))


def loss_rows(target: str, vocabularies: Sequence[int] = VOCABULARIES) -> list[dict[str, Any]]:
    """The same of `launch_losses`."""
    return _compiled(target, lambda: launch_losses(vocabularies))


def _compiled(target: str, launch: Callable[[], None]) -> list[dict[str, Any]]:
    with aot.compile_only(target) as launched:
        launch()
    found = []
    for kernel in launched:
        used = aot.resources(kernel)
        found.append(
            {
                "kernel": kernel.metadata.name,
                "target": target,
                "warps": kernel.metadata.num_warps,
                "registers": used.registers,
                "spills": used.spills,
                "scalar_spills": used.scalar_spills,
                "shared": kernel.metadata.shared,
                "vector_bytes": used.widest,
                "tensor_memory": getattr(kernel.metadata, "tmem_size", 0) or 0,
            }
        )
    return found


if __name__ == "__main__":
    targets = sys.argv[1:] or list(aot.TARGETS)
    print(
        json.dumps(
            [
                row
                for target in targets
                for found in (rows, channel_norm_rows, attention_rows, loss_rows)
                for row in found(target)
            ],
            indent=1,
        )
    )
