"""Errors of the kernels: one class per violated promise.

Every text says what was expected, what came, and what to do.
"""

from __future__ import annotations


class KernelError(RuntimeError):
    """Base class of every error this package raises on purpose."""


class BadArgument(KernelError, ValueError):
    """An argument has a wrong type, shape, dtype, device or value."""


class BackendUnavailable(KernelError):
    """The backend asked for cannot run here, or not on these tensors; the text says why."""
