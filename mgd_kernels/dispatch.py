"""Which backend runs a kernel, and why the others do not.

The environment variable MGD_KERNELS_BACKEND, or `use_backend`, names one backend for everything; where it cannot
serve, that is an error and never a silent change of backend.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgd_kernels.backends import reference
from mgd_kernels.backends.interface import Backend, LeafBackend
from mgd_kernels.errors import BackendUnavailable
from mgd_kernels.rules import SGD_PLAIN, Rule

# Fastest first, by device type; the reference always works.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
NAMES = ("reference", "cpu", "triton", "cuda")

if TYPE_CHECKING:  # every backend keeps to the interface
    from mgd_kernels.backends import cpu, cuda, triton

    _backends: tuple[Backend, ...] = (reference, triton, cuda)
    _leaf_backend: LeafBackend = cpu

_chosen: dict[tuple, Backend] = {}  # for tensors that are contiguous and hold their values
_forced: ContextVar[str | None] = ContextVar("mgd_kernels_backend", default=None)


@cache
def load(name: str) -> tuple[Backend | None, str | None]:
    """The backend's module, or None and the reason why it cannot be used in this process."""
    if name not in NAMES:
        raise BackendUnavailable(f"expected a backend among {', '.join(NAMES)}; got {name!r}")
    try:
        module = importlib.import_module(f"mgd_kernels.backends.{name}")
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"
    reason = module.unavailable()
    return (None, reason) if reason else (module, None)


def backends() -> dict[str, str | None]:
    """Every backend: None where it works in this process, otherwise the reason and what to do."""
    return {name: load(name)[1] for name in NAMES}


def forced() -> str | None:
    return _forced.get() or os.environ.get("MGD_KERNELS_BACKEND") or None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every kernel of the block on the named backend; BackendUnavailable where it cannot serve."""
    module, reason = load(name)
    if module is None:
        raise BackendUnavailable(f"expected backend {name!r} to work here; got: {reason}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(rule: Rule, params: Tensor, grad: Tensor) -> Backend:
    """The backend for this rule on these tensors: the requested one, otherwise the fastest that serves them."""
    wanted = forced()
    key = wanted, rule.name, rule.slots, params.dtype, grad.dtype, params.device, grad.device
    strided = params.layout is grad.layout is torch.strided
    plain = strided and params.is_contiguous() and grad.is_contiguous() and not (params.is_neg() or grad.is_neg())
    if plain and key in _chosen:
        return _chosen[key]
    names = (wanted,) if wanted else PREFERENCE.get(params.device.type, ("reference",))
    reasons: dict[str, str | None] = {}
    for name in names:
        module, reason = load(name)
        if module is not None:
            reason = module.unsupported(rule, params, grad)
            if reason is None:
                # float64 is there to check the others by, and off the CPU no kernel takes it.
                if reasons and name == "reference" and params.dtype is not torch.float64:
                    _warn_once("; ".join(f"{other}: {why}" for other, why in reasons.items()))
                if plain:
                    _chosen[key] = module
                return module
        reasons[name] = reason
    raise BackendUnavailable(
        f"expected backend {wanted!r} to serve {rule.name} on {params.dtype} parameters with {grad.dtype} gradients on "
        f"{params.device}; got: {reasons[names[0]]}"
    )


@cache
def _warn_once(reasons: str) -> None:
    warnings.warn(f"mgd_kernels runs on the slow reference backend ({reasons})", RuntimeWarning, stacklevel=4)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of two flat buffers in float64, on the backend that serves them."""
    if x.dtype.itemsize < 4:
        return reference.dot(x, y)
    return choose(SGD_PLAIN, x, y).dot(x, y)


def dot_number(x: Tensor, y: Tensor) -> float:
    """As `dot`, as a number of Python. From the CPU's kernel it need not become a tensor in between."""
    if x.dtype.itemsize < 4:
        return float(reference.dot(x, y))
    backend = choose(SGD_PLAIN, x, y)
    number = getattr(backend, "dot_number", None)
    return float(backend.dot(x, y)) if number is None else number(x, y)
