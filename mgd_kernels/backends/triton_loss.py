"""Launches of `triton_loss_kernels`, on a GPU's current stream. Nothing waits for the device."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mgd_kernels.backends.triton_nn import _on, _options


@cache
def _kernels() -> ModuleType:
    from mgd_kernels.backends import triton_loss_kernels

    return triton_loss_kernels


class TritonRows:
    """As `functional.linear_loss_rows.Rows`: of contiguous float32 strips. Targets that are no class stop the device,
    as torch's own losses do."""

    def __init__(self, target: Tensor, vocabulary: int, ignored: int, smoothing: float, z_loss: float, cap: float):
        self.target, self.options = target, (float(vocabulary), ignored, smoothing, z_loss, cap)
        block = _kernels().BLOCK
        self.how: dict[str, Any] = {"SMOOTH": smoothing > 0, "CAP": cap > 0, "BLOCK": block, **_options(block)}
        if target.device.type != "meta":
            fine = (target == ignored) | ((target >= 0) & (target < vocabulary))
            torch._assert_async(fine.all(), f"expected targets in [0, {vocabulary}) or ignore_index={ignored}")

    def _losses(self, at, z, gl, losses, statistics, value: bool) -> None:
        losses = None if losses is None else losses[at]
        gl = None if gl is None else gl[at]
        with _on(z):
            _kernels().loss_kernel[(len(z),)](
                z, self.target[at], gl, losses, statistics[at], z.shape[1], *self.options, VALUE=value,
                GRADIENT=gl is not None, **self.how,
            )  # fmt: skip

    def forward(self, at: slice, z: Tensor, losses: Tensor, statistics: Tensor) -> None:
        self._losses(at, z, None, losses, statistics, True)

    def forward_backward(self, at: slice, z: Tensor, gl: Tensor, losses: Tensor, statistics: Tensor) -> None:
        self._losses(at, z, gl, losses, statistics, True)

    def backward(self, at: slice, z: Tensor, gl: Tensor, statistics: Tensor) -> None:
        self._losses(at, z, gl, None, statistics, False)

    def double_backward(self, at: slice, z: Tensor, ż: Tensor, gl: Tensor, statistics: Tensor) -> Tensor:
        ggl = gl.new_empty(len(z))
        with _on(z):
            _kernels().twice_kernel[(len(z),)](
                z, ż, self.target[at], gl[at], statistics[at], ggl, z.shape[1], *self.options, **self.how
            )
        return ggl
