"""The gate to the kernels that take addresses: is there memory, does it hold the values of its tensor, and does nothing
overlap with what is written. Dtypes, shapes and contiguity are the callers' to check.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import sub
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgd_kernels.errors import BadArgument

Span = tuple[int, int]  # the address of the first byte, and that behind the last


def address(tensor: Tensor) -> int:
    """Where the elements of a contiguous tensor begin; 0 for one without elements.

    BadArgument for a tensor without memory (a fake or meta tensor, a wrapper around others), and for one whose memory
    holds the values before a negation that is still to come.
    """
    try:
        found = tensor.data_ptr()
    except RuntimeError:  # for some wrappers, where others say 0
        found = 0
    if not found and tensor.numel():
        raise BadArgument(f"expected a tensor with memory; got none in a {type(tensor).__name__} {list(tensor.shape)}")
    if tensor.is_neg():
        raise BadArgument("expected a tensor whose memory holds its values; got a negated view: call .resolve_neg()")
    return found


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """As `address` of each; 0 for None."""
    at = iter(_addresses([tensor for tensor in tensors if tensor is not None]))
    return [0 if tensor is None else next(at) for tensor in tensors]


def gate(written: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """The addresses of what a kernel writes and reads: contiguous tensors, of which the first or the last is the
    largest. BadArgument as of `address` and `check_apart`."""
    to, source = _addresses(written), _addresses(read)
    starts = sorted(to + source)
    largest = max(written[0].nbytes, read[-1].nbytes)
    if min(map(sub, starts[1:], starts)) < largest:  # else all are apart, the common case
        check_apart(spans(written), spans(read))
    return to, source


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    """As `address` of each."""
    try:
        found = [tensor.data_ptr() for tensor in tensors]
    except RuntimeError:
        found = [0]
    if 0 in found or any([tensor.is_neg() for tensor in tensors]):
        return [address(tensor) for tensor in tensors]
    return found


def spans(tensors: Sequence[Tensor]) -> list[Span]:
    """The memory of contiguous tensors. BadArgument as of `address`."""
    return [(start := address(tensor), start + tensor.nbytes) for tensor in tensors]


def check_extents_apart(written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """As `check_apart`, for kernels that take tensors: these may have any strides, or no memory."""
    check_apart([extent(tensor) for tensor in written], [extent(tensor) for tensor in read])


def extent(tensor: Tensor) -> Span:
    """The memory between a tensor's first and last element, whatever its strides; (0, 0) where there is none."""
    if not torch._C._has_storage(tensor) or not tensor.numel() or not (start := tensor.data_ptr()):
        return 0, 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


def check_apart(written: Sequence[Span] | np.ndarray, read: Sequence[Span] | np.ndarray) -> None:
    """BadArgument where memory that is written overlaps with any other; what is only read may overlap. Both are spans,
    also as int64 `[m, 2]`."""
    every = np.concatenate([np.asarray(each, dtype=np.int64).reshape(-1, 2) for each in (written, read)])
    every = every[every[:, 0].argsort(kind="stable")]
    if (every[1:, 0] >= every[:-1, 1]).all():  # no two overlap
        return
    # Where all memory ends that begins no later than a span, and where that of it which is written.
    end = end_written = 0
    for start, stop, writes in sorted([(*span, True) for span in written] + [(*span, False) for span in read]):
        if start < min(stop, end if writes else end_written):
            raise BadArgument(
                "expected what a kernel writes apart from all its other tensors; got two that share memory: clone one"
            )
        end, end_written = max(end, stop), max(end_written, stop if writes else 0)


def wrote(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that a kernel has written these: a graph that has saved one of them then refuses to use it."""
    torch.autograd.graph.increment_version(tensors)


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, uint8 `[bytes]`, in its own memory."""
    # `view` alone refuses the stride that a single element may have.
    return t.as_strided((t.numel(),), (1,)).view(torch.uint8)


def without_grad(method: Callable[..., Any]) -> Callable[..., Any]:
    """As `torch.no_grad()`, which takes longer than the checks of a kernel."""

    @functools.wraps(method)
    def run(*arguments: Any, **options: Any) -> Any:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return method(*arguments, **options)
        finally:
            torch._C._set_grad_enabled(before)

    return run
