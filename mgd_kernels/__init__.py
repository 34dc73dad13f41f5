"""Fused optimizer steps with their vector-Jacobian products, on flat buffers."""

from mgd_kernels import errors
from mgd_kernels.arena import Arena, Segments
from mgd_kernels.custom import Muon, RMSprop, UpdateRule
from mgd_kernels.dispatch import backends, use_backend
from mgd_kernels.optimizer import SGD, Adam, AdamW, Optimizer, OptimizerState

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Arena",
    "Muon",
    "Optimizer",
    "OptimizerState",
    "RMSprop",
    "Segments",
    "UpdateRule",
    "backends",
    "errors",
    "use_backend",
]
