"""What Triton's kernels of operators compile to, read off the generated code without a GPU.

`python -m mgd_kernels.aot_operators [TARGET ...]` prints, as JSON, a row for each kernel, for rows of several widths,
among them the widest. See `aot` for how it is done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgd_kernels import aot

FUNCTIONS = ("gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
WIDTHS = (64, 768, 1024, 4096)


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


def rows(target: str, functions: Sequence[str] = FUNCTIONS, widths: Sequence[int] = WIDTHS) -> list[dict[str, Any]]:
    """Of each kernel that `launch` launches: registers, spills, and bytes of the widest access to global memory."""
    with aot.compile_only(target) as launched:
        launch(functions, widths)
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
                "vector_bytes": used.widest,
            }
        )
    return found


if __name__ == "__main__":
    print(json.dumps([row for target in sys.argv[1:] or aot.TARGETS for row in rows(target)], indent=1))
