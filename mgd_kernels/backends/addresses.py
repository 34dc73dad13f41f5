"""What the backends that hand addresses to C++ and CUDA share: the codes of dtypes and rules, and the checks. Anything
that is not checked here could read or write memory that is not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mgd_kernels.arena import Segments
from mgd_kernels.backends.interface import Leaves
from mgd_kernels.errors import BadArgument
from mgd_kernels.memory import address, check_apart
from mgd_kernels.rules import Rule

# The codes of csrc/optim/codes.h. Without the extension module there are none, and no kernels that would take them.
try:
    from mgd_kernels._core import DTYPES as _DTYPES
    from mgd_kernels._core import RULES
except ImportError:
    _DTYPES, RULES = {}, {}

DTYPES = {getattr(torch, name): number for name, number in _DTYPES.items()}
_NAMES = {
    ("adam", 2, False): "adam",
    ("sgd", 0, False): "sgd_plain",
    ("sgd", 1, False): "sgd_momentum",
    ("sgd", 1, True): "sgd_nesterov",
}
_RULES = {key: RULES[name] for key, name in _NAMES.items() if name in RULES}
_HALVES = (torch.bfloat16, torch.float16)
_PAIRS = {(dtype, grad) for dtype in (torch.float32, torch.float64) for grad in (dtype, *_HALVES)}

Slot = TypeVar("Slot")


def code(rule: Rule) -> int | None:
    """The code of the rule; None where the kernels do not have it."""
    return _RULES.get((rule.name, len(rule.slots), rule.nesterov))


def by_leaf(rows: Sequence[Leaves]) -> list[int]:
    """The addresses of all rows' first leaves, of their second ones, and so on; 0 for a leaf that is not there."""
    return [0 if leaf is None else address(leaf) for leaves in zip(*rows, strict=True) for leaf in leaves]


def check_leaves_apart(
    sizes: Sequence[int],
    dtype: torch.dtype,
    written: Sequence[int],
    inputs: Sequence[int],
    *others: tuple[torch.dtype, Sequence[int]],
    u: Sequence[int] = (),
) -> None:
    """BadArgument where leaves that are written, `u` among them, share memory with any other. All are addresses as of
    `by_leaf`; `inputs`, of as many rows as `written`, may be written in their own place. sizes: in elements."""

    def memory(addresses: Sequence[int] | np.ndarray, dtype: torch.dtype = dtype) -> np.ndarray:
        starts = np.asarray(addresses, dtype=np.int64)
        rows = len(starts) // max(1, len(sizes))
        spans = np.stack([starts, starts + np.repeat(np.asarray(sizes, dtype=np.int64) * dtype.itemsize, rows)], axis=1)
        return spans[starts > 0]

    to, source = np.asarray(written, dtype=np.int64), np.asarray(inputs, dtype=np.int64)
    read = [memory(source * (source != to)), *(memory(addresses, other) for other, addresses in others)]
    check_apart(np.concatenate([memory(to), memory(u)]), np.concatenate(read))


def unsupported(rule: Rule, params: Tensor, grad: Tensor) -> str | None:
    """None where such tensors are served, on whatever device, otherwise the reason: contiguous, float32 or float64;
    gradients of that dtype or a 16-bit one."""
    served = (params.dtype, grad.dtype) in _PAIRS and params.layout is grad.layout is torch.strided
    if served and params.is_contiguous() and grad.is_contiguous() and not grad.is_neg() and code(rule) is not None:
        return None
    if code(rule) is None:
        return f"no kernel for the rule {rule.name!r} with the slots {rule.slots}"
    for name, tensor in (("params", params), ("grad", grad)):
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            return f"expected {name} contiguous; got strides {tensor.stride()}: call .contiguous()"
        if tensor.is_neg():
            return f"expected {name} with its values in memory; got a negated view: call .resolve_neg()"
    if params.dtype not in (torch.float32, torch.float64):
        return f"expected float32 or float64 params; got {params.dtype}"
    return f"expected a gradient in {params.dtype}, torch.bfloat16 or torch.float16; got {grad.dtype}"


Unsupported = Callable[[Rule, Tensor, Tensor], str | None]


def check(unsupported: Unsupported, rule: Rule, state: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """BadArgument where a backend's `unsupported` objects, or not all tensors are flat and alike. state: parameters,
    slots, adjoints and u."""
    params = state[0]
    for grad in grads:
        reason = unsupported(rule, params, grad)
        if reason:
            raise BadArgument(reason)
    dtype, shape, device = params.dtype, params.shape, params.device
    for grad in grads:
        if grad.shape != shape:
            raise BadArgument(f"expected a gradient {list(shape)}; got {list(grad.shape)}")
        if grad.dtype != grads[0].dtype:
            raise BadArgument(f"expected gradients of one dtype; got {grads[0].dtype} and {grad.dtype}")
    if params.ndim != 1:
        raise BadArgument(f"expected flat tensors [n]; got params {list(shape)}")
    for tensor in state:
        same = tensor.dtype is dtype and tensor.shape == shape and tensor.device == device
        if not same or not tensor.is_contiguous():
            raise BadArgument(
                f"expected every slot, adjoint and u contiguous, {dtype} {list(shape)} on {device} as params; got "
                f"{tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
            )


def check_slots(rule: Rule, slots: Sequence[Slot], what: str) -> list[Slot]:
    if len(slots) != len(rule.slots):
        raise BadArgument(f"expected {len(rule.slots)} {what} ({', '.join(rule.slots)}); got {len(slots)}")
    return list(slots)


def check_tangents(rule: Rule, tangents: Sequence[Sequence[Tensor]], grad_tangents: Sequence[Tensor]) -> list[Tensor]:
    """The tangents of all directions one after the other; BadArgument where there is none, or not one for each."""
    if not tangents or len(grad_tangents) != len(tangents):
        raise BadArgument(
            f"expected tangents along one direction or more, and of the gradient one per direction; got "
            f"{len(tangents)} and {len(grad_tangents)}"
        )
    return [x for params, *slots in tangents for x in (params, *check_slots(rule, slots, "tangents of slots"))]


def check_leaves(
    like: Sequence[Tensor], grads: Leaves, others: Sequence[Leaves], groups: Sequence[int]
) -> tuple[torch.dtype, torch.dtype, list[int]]:
    """The dtypes of the state and of the gradients, and the leaves' sizes; BadArgument where not all are alike."""
    dtype = like[0].dtype
    grad_dtype = next((grad.dtype for grad in grads if grad is not None), dtype)
    if dtype not in (torch.float32, torch.float64) or (grad_dtype != dtype and grad_dtype not in _HALVES):
        raise BadArgument(
            f"expected leaves in float32 or float64, and gradients in that dtype or a 16-bit one; got {dtype} and "
            f"{grad_dtype}"
        )
    shapes = [leaf.shape for leaf in like]
    if any(len(row) != len(shapes) for row in (grads, groups, *others)):
        raise BadArgument(f"expected {len(shapes)} leaves everywhere; got {[len(row) for row in (grads, *others)]}")
    for row, wanted in ((grads, grad_dtype), *((row, dtype) for row in (like, *others))):
        for leaf, shape in zip(row, shapes, strict=True):
            if leaf is None:
                continue
            if leaf.dtype != wanted or leaf.shape != shape or not leaf.is_cpu or not leaf.is_contiguous():
                raise BadArgument(
                    f"expected a leaf contiguous, {wanted} {list(shape)} on the CPU; got {leaf.dtype} "
                    f"{list(leaf.shape)}, strides {leaf.stride()}, on {leaf.device}"
                )
    return dtype, grad_dtype, [leaf.numel() for leaf in like]


def check_scales(grads: Sequence[Tensor], grad_scales: Sequence[float | Tensor] | Tensor) -> None:
    if len(grad_scales) != len(grads):
        raise BadArgument(f"expected {len(grads)} grad_scales, one per gradient; got {len(grad_scales)}")


def check_table(segments: Segments) -> Tensor:
    """The segment table, int64 `[R, 3]` on the CPU."""
    table = segments.table
    if table.dtype != torch.int64 or table.device.type != "cpu" or table.ndim != 2 or table.shape[1] != 3:
        raise BadArgument(f"expected a segment table int64 [R, 3] on the CPU; got {table.dtype} {list(table.shape)}")
    return table.contiguous()


def check_dot(x: Tensor, y: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Both contiguous, with their values in memory; BadArgument where they are not flat, of one length and of known
    dtypes, on one such device."""
    for name, tensor in (("x", x), ("y", y)):
        if tensor.device.type != device or tensor.dtype not in DTYPES or tensor.ndim != 1:
            raise BadArgument(
                f"expected {name} flat and floating-point on {device}; got {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}"
            )
    if x.shape != y.shape or x.device != y.device:
        raise BadArgument(
            f"expected x and y of one length on one device; got {x.numel()} on {x.device} and {y.numel()} on {y.device}"
        )
    return x.resolve_neg().contiguous(), y.resolve_neg().contiguous()
