"""Fused optimizer steps with their vector-Jacobian products, on flat buffers; and a store for training states.

Import from here what `__all__` lists; from `mgd_kernels.functional` operators with second derivatives, from
`mgd_kernels.ops` the steps as operators of torch, from `mgd_kernels.integrations` drop-ins for other libraries. The
package looks into nothing of `mgd`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# The package of the backends is loaded here, once, so that its name means the function below from then on.
from mgd_kernels import backends as _package_of_backends  # noqa: F401
from mgd_kernels import errors
from mgd_kernels.arena import Arena, Segments
from mgd_kernels.dispatch import backends, use_backend
from mgd_kernels.fused import SGD, Adam, AdamW
from mgd_kernels.optimizer import Optimizer, OptimizerState
from mgd_kernels.update_rule import Muon, RMSprop, UpdateRule

if TYPE_CHECKING:
    from mgd_kernels.store import Store

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
    "Store",
    "UpdateRule",
    "backends",
    "errors",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # The store is C++ alone; everything else works without the extension.
    if name == "Store":
        from mgd_kernels.store import Store

        return Store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
