"""Whether tensors are finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite.

    A finite sum says so at a fraction of the price for small tensors. Another one may be an overflow.
    """
    return math.isfinite(tensor.detach().sum().item()) or bool(torch.isfinite(tensor).all())
