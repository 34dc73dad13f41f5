"""One recorded call of a part of a step: what may be recorded, and where its inputs and outputs are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Run = Callable[..., Sequence[Any]]

NAMESPACES = ("aten", "prims", "mgd_kernels")
_OF_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Their results have the shapes of their indices, unless these are masks.
_INDEXING = {f"aten::{x}" for x in ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")}
_WORD = torch.int64  # of which memory is allocated
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


class NotRecorded(Exception):
    """Why a part is not recorded."""


class Recorder(Protocol):
    """Records what is launched on one device. alignment: bytes of an address that kernels tell apart. held: bytes that
    recordings take beside their inputs and outputs."""

    alignment: int

    @property
    def held(self) -> int: ...

    def settings(self) -> Hashable:
        """What chooses kernels beside their arguments, and the stream on which they are launched."""
        ...

    def random_state(self) -> Tensor: ...

    def set_random_state(self, state: Tensor) -> None: ...

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What launches again all that `run` does, which has run several times before. Raises where something in it
        cannot be recorded. What it writes is undefined until then."""
        ...


class Watch(TorchDispatchMode):
    """Raises NotRecorded where what runs in it does what a recording would freeze, or not see. given: all tensors that
    it may read. bytes: of everything that was computed."""

    def __init__(self, given: Sequence[Tensor]):
        super().__init__()
        self.bytes, self.device = 0, given[0].device
        self._given = {_memory(self._checked(x, "what is given")) for x in given}
        self._known = set(self._given)
        self._own: list[Tensor] = []  # kept, so that no other memory takes the place of theirs

    def _checked(self, x: Tensor, where: object) -> Tensor:
        if x.device != self.device or x.layout != torch.strided or x.is_conj() or x.is_neg():
            raise NotRecorded(f"expected plain tensors on {self.device}; got another one in {where}")
        return x

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema, kwargs = func._schema, kwargs or {}
        indexing = schema.name in _INDEXING
        if func.namespace not in NAMESPACES:
            raise NotRecorded(f"expected operators of torch and of this package; got {func}")
        if not _OF_DATA.isdisjoint(func.tags) and not indexing:
            raise NotRecorded(f"expected numbers and shapes that do not depend on data; got {func}")
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and _memory(self._checked(x, func)) not in self._known:
                raise NotRecorded(f"expected what is given to be all that is read; {func} reads another tensor")
        if indexing and any(isinstance(x, Tensor) and x.dtype in _MASKS for x in tree_leaves(args[1])):
            raise NotRecorded(f"expected shapes that do not depend on data; got a mask in {func}")
        if schema.is_mutable and any(_memory(x) in self._given for x in _written(schema, args, kwargs)):
            raise NotRecorded(f"expected what is given to stay as it is; {func} writes to it")
        results = func(*args, **kwargs)
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and _memory(self._checked(x, func)) not in self._known:
                self._known.add(_memory(x))
                self._own.append(x)
                self.bytes += x.untyped_storage().nbytes()
        return results


_MASKS = (torch.bool, torch.uint8)


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _written(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call of an operator writes to."""
    names = {x.name for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write}
    values = [x for x, argument in zip(args, schema.arguments, strict=False) if argument.name in names]
    values += [x for name, x in kwargs.items() if name in names]
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class Layout:
    """Where tensors are in a piece of memory: for each its dtype, size, strides and offset. Those are equal that say
    the same."""

    def __init__(self, views: Sequence[tuple[torch.dtype, torch.Size, tuple[int, ...], int]]):
        self._views = tuple(views)
        self._hash = hash(self._views)
        self._dtypes = list(dict.fromkeys([dtype for dtype, *_ in views]))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._views == other._views

    def views(self, memory: Tensor) -> list[Tensor]:
        typed = {dtype: memory.view(dtype) for dtype in self._dtypes}
        first = {dtype: x.storage_offset() for dtype, x in typed.items()}
        return [
            typed[dtype].as_strided(size, strides, first[dtype] + offset)
            for dtype, size, strides, offset in self._views
        ]


@dataclass(frozen=True, slots=True)
class Packed:
    """Tensors in one piece of memory. To make a view of each would take longer than to launch a recording."""

    memory: Tensor
    layout: Layout

    def tensors(self) -> list[Tensor]:
        return self.layout.views(self.memory)


class Places:
    """Places for tensors in new memory, one piece for each number in `pieces`. Each has the strides of its tensor, and
    is as far from a multiple of `alignment` as that is. layout: for each its piece, dtype, size, strides and offset."""

    def __init__(self, tensors: Sequence[Tensor], pieces: Sequence[int], alignment: int, device: torch.device):
        ends = [0] * (1 + max(pieces, default=-1))
        self.layout: list[tuple[int, torch.dtype, torch.Size, tuple[int, ...], int]] = []
        for x, piece in zip(tensors, pieces, strict=True):
            start = -(-ends[piece] // alignment) * alignment + x.data_ptr() % alignment
            ends[piece] = start + _extent(x) * x.itemsize
            self.layout.append((piece, x.dtype, x.shape, x.stride(), start // x.itemsize))
        words = [-(-end // _WORD.itemsize) + 1 for end in ends]
        self.memory = [torch.empty(n, dtype=_WORD, device=device) for n in words]
        self.bytes = sum([x.nbytes for x in self.memory])

    def views(self) -> list[Tensor]:
        return [
            self.memory[piece].view(dtype).as_strided(size, strides, offset)
            for piece, dtype, size, strides, offset in self.layout
        ]


def _extent(x: Tensor) -> int:
    """Elements from the first one of a tensor to its last one."""
    return 1 + sum([(n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)]) if x.numel() else 0


def _flat(x: Tensor) -> Tensor:
    """Everything from the first element of a tensor to its last one, whatever its strides."""
    return x.as_strided((_extent(x),), (1,))


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Tensors by number, those of a dtype together: torch copies these in one launch."""
    dtypes = dict.fromkeys([x.dtype for x in tensors])
    return [[i for i, x in enumerate(tensors) if x.dtype == dtype] for dtype in dtypes]


class Recording:
    """One recorded call of `run`. copied: the inputs, by number, that it has memory for; the others it reads where they
    are. pieces: how many of the outputs, one after another, are held for the same time. packs: those of the last piece
    are handed out as one `Packed`. still: the inputs that are not copied, with their addresses. confirmed: whether its
    bits were compared. bytes: of its inputs and outputs."""

    def __init__(
        self,
        recorder: Recorder,
        run: Run,
        inputs: Sequence[Tensor],
        outputs: Sequence[Any],
        copied: Sequence[int],
        pieces: Sequence[int],
        packs: bool = False,
    ):
        if any(not isinstance(x, Tensor) and x is not None for x in outputs):
            raise NotRecorded("expected tensors; got a number among the outputs")
        self.confirmed, self._device = False, inputs[0].device
        alignment = recorder.alignment
        self.still = [(i, x.data_ptr()) for i, x in enumerate(inputs) if i not in set(copied)]
        places = Places([inputs[i] for i in copied], [0] * len(copied), alignment, self._device)
        own, given = places.views(), list(inputs)
        for i, x in zip(copied, own, strict=True):
            given[i] = x
        self._copies = [([own[k] for k in group], [copied[k] for k in group]) for group in _by_dtype(own)]
        self._copy_in(inputs)

        passed = {id(x): i for i, x in enumerate(inputs)}  # outputs that are inputs are handed out as these
        leaving = [i for i, x in enumerate(outputs) if x is not None and id(x) not in passed]
        piece_of = [piece for piece, count in enumerate(pieces) for _ in range(count)]
        used = list(dict.fromkeys([piece_of[i] for i in leaving]))
        where = [used.index(piece_of[i]) for i in leaving]
        left = Places([outputs[i] for i in leaving], where, alignment, self._device)
        targets = [_flat(x) for x in left.views()]
        groups = _by_dtype(targets)

        def body() -> None:
            found = run(*given)
            for group in groups:
                torch._foreach_copy_([targets[k] for k in group], [_flat(found[leaving[k]]) for k in group])

        self._left, self._sizes = left.memory, [len(x) for x in left.memory]
        self._typed = list(dict.fromkeys([(piece, dtype) for piece, dtype, *_ in left.layout]))
        self._plan: list[Any] = [passed.get(id(x)) for x in outputs]
        for i, (piece, dtype, *view) in zip(leaving, left.layout, strict=True):
            self._plan[i] = self._typed.index((piece, dtype)), view
        self._packed: Layout | None = None
        last = len(outputs) - pieces[-1]
        if packs and all([type(at) is tuple for at in self._plan[last:]]) and last < len(outputs):
            own_piece = used.index(len(pieces) - 1)
            self._packed = Layout([each[1:] for each in left.layout if each[0] == own_piece])
            del self._plan[last:]
        self.bytes = places.bytes + left.bytes
        self._replay = recorder.record(body)
        self._read = run, places  # what the recording reads must live as long

    def stands_for(self, addresses: Sequence[int]) -> bool:
        """Whether the inputs that it reads where they were are there."""
        return all([addresses[i] == address for i, address in self.still])

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Any]:
        self._copy_in(inputs)
        self._replay()
        return self._handed_out(inputs)

    def _copy_in(self, inputs: Sequence[Tensor]) -> None:
        for own, numbers in self._copies:
            torch._foreach_copy_(own, [inputs[i] for i in numbers])

    def _handed_out(self, inputs: Sequence[Tensor]) -> Sequence[Any]:
        """The outputs, in new memory. Each counts its own changes, as new tensors do."""
        memory = [torch.empty(n, dtype=_WORD, device=self._device) for n in self._sizes]
        if memory:
            torch._foreach_copy_(memory, self._left)
        with torch._C._ExcludeDispatchKeyGuard(_VIEWS):
            typed = [memory[piece].view(dtype) for piece, dtype in self._typed]
            found: list[Any] = [
                typed[at[0]].as_strided(*at[1]) if type(at) is tuple else at if at is None else inputs[at]
                for at in self._plan
            ]
        if self._packed is not None:
            found.append(Packed(memory[-1], self._packed))
        return found
