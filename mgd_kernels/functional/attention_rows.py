"""Softmax of the rows of a strip, in place, by one thread: forward, backward, double backward."""

from __future__ import annotations

import torch
from torch import Tensor

from mgd_kernels.backends.cpu import _core
from mgd_kernels.functional._library import BACKWARD, DOUBLE_BACKWARD, FORWARD, addresses


def _kernel(pass_, p, x=None, gp=None, c=None, gx=None, ggp=None, gp_again=None) -> None:
    tensors = x, gp, c, p, gx, ggp, gp_again
    _core().nn_softmax(pass_, *p.shape, 0, 1.0, 0, (1, 1, 0, 0, 0), *addresses(tensors), 1)


def _mean(p: Tensor, x: Tensor) -> Tensor:
    return (p * x).sum(1, keepdim=True)


def softmax_(s: Tensor) -> Tensor:
    if s.dtype is torch.float32:
        _kernel(FORWARD, s, x=s)
        return s
    return s.sub_(s.amax(1, keepdim=True)).exp_().div_(s.sum(1, keepdim=True))


def softmax_backward_(p: Tensor, m: Tensor) -> None:
    """m becomes P∘(m - ⟨P m⟩)."""
    if p.dtype is torch.float32:
        _kernel(BACKWARD, p, gp=m, gx=m)
    else:
        m.sub_(_mean(p, m)).mul_(p)


def softmax_double_backward_(p: Tensor, x: Tensor, m: Tensor) -> None:
    """x becomes P∘(x - ⟨P x⟩), and m becomes x∘(m - ⟨P m⟩) - m ⟨P x⟩."""
    if p.dtype is torch.float32:
        _kernel(DOUBLE_BACKWARD, p, gp=m, c=x, ggp=x, gp_again=m)
        return
    alpha, delta = _mean(p, x), _mean(p, m)
    again = x * (m - delta) - m * alpha
    x.sub_(alpha).mul_(p)
    m.copy_(again)
