"""What `linear_cross_entropy` computes from the logits z of a strip of tokens, between its matrix products.

With r = λ p - t, λ = 1 + 2ζ lse, κ = 1 - (z'/k)² (1 without a cap):

    gz = gl κ∘r        ż' = κ∘ż        α = ⟨p ż'⟩        ggl = λα - ⟨t ż'⟩
    cotangent of z = gl κ∘{p∘[λ(ż' - α) + 2ζα] - (2z'/k²)∘ż∘r}
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mgd_kernels.backends.cpu import _core
from mgd_kernels.functional._library import BACKWARD, DOUBLE_BACKWARD, FORWARD, addresses
from mgd_kernels.functional._team import Team, spans

_BLOCK = 16  # rows that a thread takes: what it computes from them stays in its cache


class Rows:
    """at: which tokens the rows of a strip are. statistics [n, 2]: a row's maximum, and log Σ exp(z' - maximum)."""

    def __init__(
        self, crew: Team, target: Tensor, vocabulary: int, ignored: int, smoothing: float, z_loss: float, cap: float
    ):
        self.crew, self.ignored, self.smoothing, self.z_loss, self.cap = crew, ignored, smoothing, z_loss, cap
        self.vocabulary, self.raw = vocabulary, target
        self.dead = target == ignored
        bad = ~self.dead & ((target < 0) | (target >= vocabulary))
        if bad.any():
            raise IndexError(
                f"Target {int(target[bad][0])} is out of bounds: expected a class in [0, {vocabulary}) or "
                f"ignore_index={ignored}"
            )
        self.target = target.masked_fill(self.dead, 0)[:, None]

    def _fused(self, z: Tensor) -> bool:
        return z.dtype is torch.float32 and not self.z_loss and not self.cap

    def _kernel(self, pass_, at, x, gl=None, c=None, losses=None, statistics=None, gx=None, ggl=None, gz=None) -> None:
        """The fused pass, for smoothing 0."""
        tensors = x, gl, c, self.raw[at], losses, statistics, gx, ggl, gz
        _core().nn_cross_entropy(pass_, *x.shape, self.ignored, *addresses(tensors), self.crew.threads)

    def _each_block(self, at: slice, work: Callable[[slice, slice], None]) -> None:
        """work(which rows of the strip, which tokens they are)"""
        blocks = spans(at.stop - at.start, _BLOCK)
        self.crew.each(lambda rows: work(rows, slice(at.start + rows.start, at.start + rows.stop)), blocks)

    # --- forward -----------------------------------------------------------------------------------------------

    def forward(self, at: slice, z: Tensor, losses: Tensor, statistics: Tensor) -> None:
        """Fills in losses and statistics."""
        if self._fused(z):
            self._kernel(FORWARD, at, z, losses=losses[at], statistics=statistics[at])
            if not self.smoothing:
                return
        self._each_block(at, lambda rows, tokens: self._forward(z[rows], tokens, losses, statistics))

    def _forward(self, z: Tensor, at: slice, losses: Tensor, statistics: Tensor) -> None:
        capped = self._capped(z)
        if not self._fused(z):
            most = capped.amax(1)
            statistics[at, 0], statistics[at, 1] = most, (capped - most[:, None]).exp().sum(1).log()
        most, log_sum = statistics[at].unbind(1)
        own, mean = capped.gather(1, self.target[at])[:, 0], capped.mean(1)
        s = self.smoothing
        loss = log_sum + (1 - s) * (most - own) + s * (most - mean) + self.z_loss * (most + log_sum).square()
        losses[at] = loss.masked_fill(self.dead[at], 0)

    def _capped(self, z: Tensor) -> Tensor:
        return self.cap * torch.tanh(z / self.cap) if self.cap else z

    # --- backward ----------------------------------------------------------------------------------------------

    def forward_backward(self, at: slice, z: Tensor, gl: Tensor, losses: Tensor, statistics: Tensor) -> None:
        """Fills in losses and statistics, and puts gz in the place of z."""
        if self._fused(z) and not self.smoothing:
            self._kernel(FORWARD, at, z, gl=gl[at], losses=losses[at], statistics=statistics[at], gx=z)
        else:
            self.forward(at, z, losses, statistics)
            self.backward(at, z, gl, statistics)

    def backward(self, at: slice, z: Tensor, gl: Tensor, statistics: Tensor) -> None:
        """Puts gz in the place of z."""
        if self._fused(z):
            self._kernel(BACKWARD, at, z, gl=gl[at], statistics=statistics[at], gx=z)
            if self.smoothing:
                self._each_block(at, lambda rows, tokens: self._smooth(z[rows], tokens, gl))
        else:
            self._each_block(at, lambda rows, tokens: self._backward(z[rows], tokens, gl, statistics))

    def _backward(self, z: Tensor, at: slice, gl: Tensor, statistics: Tensor) -> None:
        _, residual, capped = self._residual(z, at, statistics)
        torch.mul(residual, self._alive(gl, at), out=z)
        if self.cap:
            z.mul_(self._slope(capped))

    def _alive(self, x: Tensor, at: slice) -> Tensor:
        """[rows, 1], 0 where the target is ignored."""
        return x[at].masked_fill(self.dead[at], 0)[:, None]

    def _smooth(self, gz: Tensor, at: slice, gl: Tensor) -> None:
        """From gl (p - onehot) to gl (p - t)."""
        g = self.smoothing * self._alive(gl, at)
        gz.sub_(g / self.vocabulary).scatter_add_(1, self.target[at], g)

    def _residual(self, z: Tensor, at: slice, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p, λ p - t, z'."""
        capped, (most, log_sum) = self._capped(z), statistics[at, :, None].unbind(1)
        p = (capped - most).sub_(log_sum).exp_()
        residual = p * self._weight(most + log_sum) - self.smoothing / self.vocabulary
        own = torch.full_like(most, self.smoothing - 1)
        return p, residual.scatter_add_(1, self.target[at], own), capped

    def _weight(self, lse: Tensor) -> Tensor:
        return 1 + 2 * self.z_loss * lse

    def _slope(self, capped: Tensor) -> Tensor:
        return 1 - (capped / self.cap).square_()

    # --- double backward ---------------------------------------------------------------------------------------

    def double_backward(self, at: slice, z: Tensor, ż: Tensor, gl: Tensor, statistics: Tensor) -> Tensor:
        """ggl; puts the cotangent of z in the place of z, and gz in that of ż."""
        ggl = gl.new_empty(len(z))
        if not self._fused(z):
            self._each_block(at, lambda rows, tokens: self._twice(z[rows], ż[rows], tokens, gl, statistics, ggl[rows]))
            return ggl
        smooth = torch.zeros_like(ggl)
        if self.smoothing:
            self._each_block(at, lambda rows, tokens: self._smooth_tangent(ż[rows], tokens, smooth[rows]))
        self._kernel(DOUBLE_BACKWARD, at, z, gl=gl[at], c=ż, statistics=statistics[at], gx=z, ggl=ggl, gz=ż)
        if self.smoothing:
            self._each_block(at, lambda rows, tokens: self._smooth(ż[rows], tokens, gl))
        return ggl.add_(smooth)

    def _smooth_tangent(self, ż: Tensor, at: slice, out: Tensor) -> None:
        """From α - ⟨onehot ż⟩ to α - ⟨t ż⟩."""
        smooth = self.smoothing * (ż.gather(1, self.target[at])[:, 0] - ż.mean(1))
        out.copy_(smooth.masked_fill_(self.dead[at], 0))

    def _twice(self, z: Tensor, ż: Tensor, at: slice, gl: Tensor, statistics: Tensor, ggl: Tensor) -> None:
        p, residual, capped = self._residual(z, at, statistics)
        slope = self._slope(capped) if self.cap else None
        tangent = ż if slope is None else slope * ż
        weight = self._weight(statistics[at].sum(1, keepdim=True))
        alpha = (p * tangent).sum(1, keepdim=True)
        s, own, mean = self.smoothing, tangent.gather(1, self.target[at]), tangent.mean(1, keepdim=True)
        ggl.copy_((weight * alpha - (1 - s) * own - s * mean)[:, 0].masked_fill_(self.dead[at], 0))
        result = p.mul_((tangent - alpha).mul_(weight).add_(2 * self.z_loss * alpha))
        if slope is not None:
            result.sub_(capped.mul_(2 / self.cap**2).mul_(ż).mul_(residual)).mul_(slope)
            residual.mul_(slope)
        gl = self._alive(gl, at)
        torch.mul(result, gl, out=z)
        torch.mul(residual, gl, out=ż)
