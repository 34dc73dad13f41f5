"""The arena: all parameters of a model in one contiguous buffer per role, the model's tensors being views of it.

One kernel launch, one copy, one checksum then serve a whole model. Segments are aligned, the padding between
them is zero in every role (parameters, optimizer slots, gradients, adjoints) and stays zero under every rule.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgd_kernels.errors import BadArgument

ALIGNMENT = 32  # elements: 64 bytes in 16-bit dtypes, 128 in float32


@dataclass(frozen=True, eq=False)
class Segments:
    """Which stretch of a flat buffer belongs to which parameter group.

    table: int64 `[R, 3]` on the CPU, rows `(start, stop, group)`, sorted and disjoint. Stretches of one group
        are merged across padding, since padding is zero everywhere.
    """

    table: Tensor
    groups: int

    @classmethod
    def single(cls, numel: int) -> Segments:
        return cls(torch.tensor([[0, numel, 0]], dtype=torch.int64, device="cpu"), 1)

    @classmethod
    def merged(cls, rows: Sequence[tuple[int, int, int]], groups: int) -> Segments:
        merged: list[list[int]] = []
        for start, stop, group in rows:
            if merged and merged[-1][2] == group:
                merged[-1][1] = stop
            else:
                merged.append([start, stop, group])
        return cls(torch.tensor(merged, dtype=torch.int64, device="cpu").reshape(-1, 3), groups)

    def rows(self) -> list[tuple[int, int, int]]:
        return [tuple(row) for row in self.table.tolist()]

    def part(self, start: int, stop: int) -> Segments:
        """Those of the elements `start` to `stop` of the buffer, as a buffer of their own."""
        cut = [(max(a, start) - start, min(b, stop) - start, group) for a, b, group in self.rows()]
        return Segments.merged([row for row in cut if row[0] < row[1]], self.groups)

    def group_at(self, place: int) -> int:
        """The parameter group of an element."""
        rows = self.rows()
        return next((group for _, stop, group in rows if place < stop), rows[-1][2])


@dataclass(frozen=True)
class Stretch:
    """What a flat buffer for a part of an arena must be: its length, and the dtypes of parameters and of gradients."""

    numel: int
    dtype: torch.dtype
    gradient_dtype: torch.dtype
    device: torch.device

    def zeros(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(self.numel, dtype=dtype or self.dtype, device=self.device)


@dataclass
class _Rounded:
    """A copy of a flat buffer in another dtype, as of a version of the buffer: autograd's count of writes to it."""

    flat: weakref.ref[Tensor]
    copy: Tensor
    version: int


class Arena:
    """The layout of named tensors in one flat buffer.

    names, shapes, dtypes: of the tensors, in order (dtypes are what `views` hands back).
    dtype: of the flat buffer. Tensors in 16-bit dtypes get a float32 buffer, which is their master copy.
    numel: length of the flat buffer, padding included.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None):
        if not tensors:
            raise BadArgument(
                "expected at least one tensor to lay out; got none: does any parameter require a gradient?"
            )
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise BadArgument(f"expected floating-point tensors; {name!r} is {tensor.dtype}")
        devices = {tensor.device for tensor in tensors.values()}
        if len(devices) > 1:
            raise BadArgument(f"expected all tensors on one device; got {sorted(map(str, devices))}")
        self.device = devices.pop()
        self.names = tuple(tensors)
        self.shapes = tuple(tensor.shape for tensor in tensors.values())
        self.dtypes = tuple(tensor.dtype for tensor in tensors.values())
        self.dtype = dtype or (torch.float64 if torch.float64 in self.dtypes else torch.float32)
        offsets, end = [], 0
        for shape in self.shapes:
            offsets.append(end)
            end += -(-shape.numel() // ALIGNMENT) * ALIGNMENT
        self.offsets = tuple(offsets)
        self.numel = end
        if not end:
            raise BadArgument(f"expected at least one element to lay out; got none in {list(self.names)}")
        self._zeros: dict[tuple[int, torch.dtype], Tensor] = {}
        self._uniform = len(set(self.dtypes)) == 1
        self._gaps = [b - a - s.numel() for a, b, s in zip(offsets, [*offsets[1:], end], self.shapes, strict=True)]
        self._strides = [torch.empty(shape, device="meta").stride() for shape in self.shapes]
        self._slices: dict[int, tuple[weakref.ref[Tensor], list[Tensor]]] = {}
        self._rounded: dict[int, _Rounded] = {}

    def __repr__(self) -> str:
        return f"Arena({len(self.names)} tensors, {self.numel:,} elements of {self.dtype} on {self.device})"

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype | None = None) -> Arena:
        """The layout of the model's trainable parameters (tied weights once, frozen ones left out)."""
        return cls({name: p for name, p in model.named_parameters() if p.requires_grad}, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_slices": {}, "_rounded": {}}  # views belong to the buffers of this process

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype in which the model produces gradients, where it is one; else that of the arena."""
        return self.dtypes[0] if self._uniform else self.dtype

    def zeros(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(self.numel, dtype=dtype or self.dtype, device=self.device)

    def flatten(self, source: nn.Module | Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """A new flat buffer `[numel]` that holds a copy of the tensors of `source`."""
        flat = self.zeros()
        self.copy_(flat, source)
        return flat

    @torch.no_grad()
    def copy_(self, flat: Tensor, source: nn.Module | Mapping[str, Tensor] | Sequence[Tensor]) -> None:
        """Copy the tensors of `source`, of exactly the arena's shapes, into `flat`; padding is left alone."""
        if isinstance(source, nn.Module):
            source = dict(source.named_parameters())
        if isinstance(source, Mapping):
            missing = [name for name in self.names if name not in source]
            if missing:
                raise BadArgument(f"expected tensors for {list(self.names)}; missing {missing}")
            source = [source[name] for name in self.names]
        self._check_shapes(source)
        torch._foreach_copy_(self.slices(flat), [tensor.detach() for tensor in source])

    def part(self, names: Sequence[str]) -> Arena:
        """The layout of some of the tensors, which follow each other in this one."""
        shapes, dtypes = (
            dict(zip(self.names, self.shapes, strict=True)),
            dict(zip(self.names, self.dtypes, strict=True)),
        )
        tensors = {name: torch.empty(shapes[name], dtype=dtypes[name], device="meta") for name in names}
        part = Arena(tensors, self.dtype)
        part.device = self.device
        return part

    def _check_flat(self, flat: Tensor) -> None:
        if flat.shape != (self.numel,):
            raise BadArgument(f"expected a flat buffer of shape [{self.numel}]; got {list(flat.shape)}")

    def _check_shapes(self, tensors: Sequence[Tensor]) -> None:
        shapes = tuple([tensor.shape for tensor in tensors])
        if shapes != self.shapes:
            raise BadArgument(
                f"expected tensors {dict(zip(self.names, map(list, self.shapes), strict=True))}; got "
                f"{[list(shape) for shape in shapes]}"
            )

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors, by name: views of `flat` where dtypes agree, else copies in the tensor's own dtype."""
        return {
            name: part.to(dtype) for name, part, dtype in zip(self.names, self.slices(flat), self.dtypes, strict=True)
        }

    def tensors(self, flat: Tensor) -> list[Tensor]:
        """As `views`, in order, without their names. Valid until `flat` is written, as views are."""
        if self._uniform:
            return list(self.slices(flat if self.dtypes[0] == flat.dtype else self.rounded(flat)))
        return [part.to(dtype) for part, dtype in zip(self.slices(flat), self.dtypes, strict=True)]

    def rounded(self, flat: Tensor) -> Tensor:
        """`flat` in the one dtype of the tensors, by one pass over all of it; kept, and made again where `flat` was
        written meanwhile."""
        known = self.kept(flat)
        if known is None:
            copy = flat.to(self.dtypes[0])
            if not (flat.requires_grad or flat.is_inference() or copy.is_inference()):
                key = id(flat)
                self._rounded[key] = _Rounded(
                    weakref.ref(flat, lambda _: self._rounded.pop(key, None)), copy, flat._version
                )
            return copy
        if known.version != flat._version:
            with torch.no_grad():
                known.copy.copy_(flat)
            known.version = flat._version
        return known.copy

    def kept(self, flat: Tensor) -> _Rounded | None:
        """The rounded copy that is kept of `flat`, for a kernel that writes both in one pass."""
        known = self._rounded.get(id(flat))
        return known if known is not None and known.flat() is flat and not flat.requires_grad else None

    def joined(self, tensors: Sequence[Tensor], into: Tensor | None = None) -> Tensor:
        """A flat buffer `[numel]` of `gradient_dtype`, `into` or a new one, with the values of these tensors; padding
        is zero."""
        self._check_shapes(tensors)
        if into is not None:
            self._check_flat(into)
        parts: list[Tensor] = []
        for tensor, gap in zip(tensors, self._gaps, strict=True):
            parts.append(tensor.reshape(-1))
            if gap:
                parts.append(self._padding(gap, tensor.dtype))
        if into is not None and all(part.dtype == into.dtype for part in parts):
            return torch.cat(parts, out=into)
        flat = torch.cat(parts)
        if into is not None:
            return into.copy_(flat)
        return flat if flat.dtype == self.gradient_dtype else flat.to(self.gradient_dtype)

    def _padding(self, length: int, dtype: torch.dtype) -> Tensor:
        key = length, dtype
        if key not in self._zeros:
            self._zeros[key] = torch.zeros(length, dtype=dtype, device=self.device)
        return self._zeros[key]

    def slices(self, flat: Tensor) -> list[Tensor]:
        """The tensors as views of `flat`, in its dtype, in order; made once for each flat buffer."""
        known = self._slices.get(id(flat))
        if known is not None and known[0]() is flat and not flat.requires_grad:
            return known[1]
        self._check_flat(flat)
        # Views refer to what they are views of: those kept here must not keep `flat` itself, or it would live forever.
        whole = flat if flat.requires_grad else flat.detach()
        with torch.enable_grad():  # torch refuses to change a view in place in another grad mode than it was made in
            if flat.requires_grad or not flat.is_contiguous():
                views = [
                    whole[offset : offset + shape.numel()].view(shape)
                    for offset, shape in zip(self.offsets, self.shapes, strict=True)
                ]
            else:  # one call for each, in place of two
                start = whole.storage_offset()
                views = [
                    whole.as_strided(shape, strides, start + offset)
                    for offset, shape, strides in zip(self.offsets, self.shapes, self._strides, strict=True)
                ]
        if flat.requires_grad:
            return views
        key = id(flat)
        self._slices[key] = weakref.ref(flat, lambda _: self._slices.pop(key, None)), views
        return views

    def segments(self, group_of: Sequence[int] | None = None, groups: int = 1) -> Segments:
        """The group table, given the group of each tensor (all in group 0 when left out)."""
        if group_of is None:
            return Segments.single(self.numel)
        rows = [
            (offset, offset + shape.numel(), group)
            for offset, shape, group in zip(self.offsets, self.shapes, group_of, strict=True)
        ]
        return Segments.merged(rows, groups)
