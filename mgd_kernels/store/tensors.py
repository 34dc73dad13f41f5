"""Which tensors the store takes, and into which it can copy an entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mgd_kernels import memory
from mgd_kernels.errors import BadArgument
from mgd_kernels.store.format import DTYPE_OF, DTYPES, Key

Tensors = torch.Tensor | Sequence[torch.Tensor]


def storable(t: Any, i: int) -> torch.Tensor:
    """Tensor `i` of an entry, as a contiguous one that the store can copy from."""
    if not isinstance(t, torch.Tensor) or t.dtype not in DTYPES or t.layout is not torch.strided:
        what = f"{t.dtype}, {t.layout}" if isinstance(t, torch.Tensor) else type(t).__name__
        raise BadArgument(f"expected a dense tensor of {', '.join(map(str, DTYPES))} as tensor {i}; got {what}")
    if t.is_meta:
        raise BadArgument(f"expected tensor {i} with values, on the CPU or a GPU; got it on {t.device}")
    t = t.detach().resolve_neg().contiguous()
    if t.dtype is torch.bool and t.numel() and int(t.view(torch.uint8).max()) > 1:
        raise BadArgument(f"expected bools of 0 and 1 as tensor {i}; got other bytes: make it by a comparison")
    return t


def matching_targets(key: Key, sequence: bool, layout: list[tuple[int, Any]], out: Tensors) -> list[torch.Tensor]:
    """The tensors of `out`, as a list that fits the entry's layout."""
    if isinstance(out, torch.Tensor) == sequence:
        kinds = ("a list", "one tensor") if sequence else ("one tensor", "a list")
        raise BadArgument(f"expected {kinds[0]} as out for {key!r}, as was put; got {kinds[1]}")
    targets = [out] if isinstance(out, torch.Tensor) else list(out)
    if len(targets) != len(layout):
        raise BadArgument(f"expected {len(layout)} tensors as out for {key!r}; got {len(targets)}")
    for i, (t, (code, shape)) in enumerate(zip(targets, layout, strict=True)):
        if t.dtype != DTYPE_OF[code] or tuple(t.shape) != tuple(shape) or not t.is_contiguous():
            raise BadArgument(
                f"expected contiguous {DTYPE_OF[code]} of shape {tuple(shape)} as out[{i}] for {key!r}; "
                f"got {t.dtype} {tuple(t.shape)} of strides {t.stride()}"
            )
    memory.check_apart(memory.spans(targets), [])
    return [t.detach() for t in targets]
