"""Formulas that models write out in elementary functions, and that one fused operator computes.

Llama, T5 and their kind write RMSNorm as `weight * (x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))` and rotary
embeddings as `x * cos + cat((-x[..., n:], x[..., :n]), -1) * sin`, GPT-2 and its kind GELU as
`0.5 * x * (1 + tanh(√(2/π) (x + 0.044715 x³)))`. Their second derivatives are dozens of passes over memory. Here each
result says what it is of `x`, and the last call of the formula is replaced by the operator. What was computed before is
read by nothing then, and a graph drops it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves

from mgd_kernels import functional

try:
    from torch._higher_order_ops.register_hook import register_hook_op as _REGISTER_HOOK  # as Dynamo writes it
except ImportError:
    _REGISTER_HOOK = Tensor.register_hook  # type: ignore[assignment]

_CUBIC, _OUTER = 0.044715, math.sqrt(2 / math.pi)


@dataclass(frozen=True, slots=True)
class Part:
    """What a tensor is of x: its `role` in a formula. other: the norm's eps, or what was multiplied. states: of all
    these tensors, by which a change is noticed."""

    role: str
    source: Callable[[], Tensor | None]
    other: Any
    states: tuple[Any, ...]

    @property
    def x(self) -> Any:
        return self.source()


def _states(*tensors: Any) -> tuple[Any, ...]:
    """What differs once a value was changed in place, or cut off its graph: `detach_` leaves the version as it is."""
    return tuple([(x._version, x.requires_grad, x.is_leaf) for x in tensors if isinstance(x, Tensor)])


def part_of(tensor: Any) -> Part | None:
    """What the tensor is known to be, as long as nothing has changed."""
    part: Part | None = getattr(tensor, "_mgd_part", None)
    if part is None or (x := part.x) is None:
        return None
    return part if part.states == _states(x, tensor, part.other) else None


def replaced(
    function: Callable, args: Sequence[Any], kwargs: dict[str, Any], result: Any, exposed: Sequence[UntypedStorage] = ()
) -> Any:
    """The result of this call of torch; where the call ends a formula, that of the fused operator.

    exposed: memory that may have been written unseen, which no formula reads.
    """
    find = _FIND.get(function)
    if kwargs and find not in (_mean, _concatenate):
        return result
    # Without gradients, a result may be a constant of a formula whose derivative is another one. With them, what needs
    # none is treated as what does: a buffer's formula has the same bits whether an adjoint of the buffer is wanted.
    if find is None or not isinstance(result, Tensor) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return result
    if exposed and any(_lies_in(exposed, x) for x in tree_leaves((args, kwargs))):
        return result
    found = find(*args, **kwargs)
    if isinstance(found, Tensor):
        return found
    if found is not None:
        role, x, other = found
        # A product with a number does not keep x for its derivative, and must not keep it alive for this.
        source = weakref.ref(x) if role == "half" else lambda: x
        result._mgd_part = Part(role, source, other, _states(x, result, other))  # type: ignore[attr-defined]
    return result


# Their caller asks for the gradient of what may be a part, or changes it: what is replaced has no parts.
LOOKS = {
    Tensor.register_hook,
    _REGISTER_HOOK,
    Tensor.retain_grad,
    Tensor.backward,
    torch.autograd.backward,
    torch.autograd.grad,
}
NODE = Tensor.grad_fn.__get__  # type: ignore[union-attr]  # from there, the whole graph can be walked


def data_of(tensor: Tensor) -> Tensor:
    """`tensor.data` as Dynamo writes it, which no mode hears of."""
    if torch.overrides.has_torch_function_unary(tensor):
        return torch.overrides.handle_torch_function(data_of, (tensor,), tensor)
    return torch._C._autograd._get_data_attr(tensor)  # type: ignore[attr-defined]


# From here on the tensor's memory may be written, and no version tells.
EXPOSES = {
    data_of,
    Tensor.data.__get__,  # type: ignore[attr-defined]
    Tensor.data.__set__,  # type: ignore[attr-defined]
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.data_ptr,
    Tensor.storage,
    Tensor.untyped_storage,
    Tensor.set_,
}


def _lies_in(exposed: Sequence[UntypedStorage], x: Any) -> bool:
    """Whether x, or what it is a part of, lies in this memory."""
    part = part_of(x)
    tensors = [y for y in ((x,) if part is None else (x, part.x, part.other)) if isinstance(y, Tensor)]
    return any(torch._C._has_storage(y) and y.untyped_storage()._cdata == s._cdata for y in tensors for s in exposed)


def looks(args: Any) -> bool:
    """Whether a part of a formula is among the arguments."""
    return any(hasattr(x, "_mgd_part") for x in tree_leaves(args))


def walks(tensor: Tensor) -> bool:
    """Whether a user asks for this tensor's node, and not torch, which does for its hooks of modules."""
    return type(tensor.grad_fn).__name__ != "BackwardHookFunctionBackward"


# --- of a function of torch: (role, x, other), where its result is a part; the replacement where the formula ends ---

Found = tuple[str, Tensor, float | Tensor] | Tensor | None


def _power(x: Any, exponent: Any = 2) -> Found:
    role = {2.0: "square", 3.0: "cube"}.get(exponent) if isinstance(exponent, int | float) else None
    return (role, x, 0.0) if role and _served(x) else None


def _mean(x: Any = None, dim: Any = None, keepdim: bool = False, **others: Any) -> Found:
    last = dim in (-1, [-1], (-1,)) and keepdim and not others
    return _next(x, "square", "mean square") if last else None


def _add(a: Any, b: Any, *others: Any) -> Found:
    if others:
        return None
    for x, other in ((a, b), (b, a)):
        part = part_of(other)
        if part is None:
            continue
        if isinstance(x, int | float):
            if part.role == "mean square":
                return "mean square + eps", part.x, float(x)
            return ("1 + tanh", part.x, 0.0) if (part.role, x) == ("tanh", 1) else None
        if part.role == "cubic term" and part.x is x:
            return "cubic", x, 0.0
        if part.role == "turned times" and (straight := part_of(x)) and straight.role == "times":
            fits = straight.x is part.x and functional.rotary_fits(part.x, straight.other, part.other)
            return functional.rotary(part.x, straight.other, part.other) if fits else None
    return None


def _multiply(a: Any, b: Any) -> Found:
    if a is b:
        return _power(a)
    for x, other in ((a, b), (b, a)):
        part = part_of(other)
        if isinstance(x, int | float):
            return _scaled(other, part, x)
        if part is None or not isinstance(x, Tensor):
            continue
        if part.role == "rms" and part.x is x:
            return "normalised", x, part.other
        if part.role == "normalised" and x.ndim == 1 and x.shape == part.x.shape[-1:]:
            return functional.rms_norm(part.x, x.shape, x, part.other) if functional.served(x) else None
        if part.role == "1 + tanh" and (half := part_of(x)) and half.role == "half" and half.x is part.x:
            return functional.gelu(part.x, "tanh")
        if part.role == "turned":
            return "turned times", part.x, x
    for x, other in ((a, b), (b, a)):
        if _served(x) and isinstance(other, Tensor) and functional.rotary_fits(x, other, other):
            return "times", x, other
    return None


def _scaled(x: Any, part: Part | None, factor: float) -> Found:
    if part is None:
        return ("half", x, 0.0) if factor == 0.5 and _served(x) else None
    if part.role == "cube" and factor == _CUBIC:
        return "cubic term", part.x, 0.0
    return ("argument", part.x, 0.0) if part.role == "cubic" and math.isclose(factor, _OUTER, rel_tol=1e-7) else None


def _item(x: Any, index: Any) -> Found:
    if not (isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis and _served(x)):
        return None
    middle = x.shape[-1] // 2
    roles = (slice(None, middle, None), "first half"), (slice(middle, None, None), "second half")
    return next(((role, x, 0.0) for each, role in roles if index[1] == each), None)


def _concatenate(tensors: Any = (), dim: Any = 0, **others: Any) -> Found:
    if dim != -1 or others or len(tensors) != 2:
        return None
    first, second = map(part_of, tensors)
    if first and second and (first.role, second.role) == ("-second half", "first half") and first.x is second.x:
        return "turned", first.x, 0.0
    return None


def _next(x: Any, role: str, following: str) -> Found:
    part = part_of(x)
    return (following, part.x, part.other) if part is not None and part.role == role else None


def _follows(role: str, following: str) -> Callable[..., Found]:
    """Of a function of one argument."""
    return lambda x: _next(x, role, following)


def _served(x: Any) -> bool:
    return isinstance(x, Tensor) and functional.served(x)


_FIND: dict[Any, Callable[..., Found]] = {
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__, torch.square, Tensor.square), _power),
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiply),
    **dict.fromkeys((torch.rsqrt, Tensor.rsqrt), _follows("mean square + eps", "rms")),
    **dict.fromkeys((torch.tanh, Tensor.tanh), _follows("argument", "tanh")),
    **dict.fromkeys((torch.neg, Tensor.neg, Tensor.__neg__), _follows("second half", "-second half")),
    **dict.fromkeys((torch.cat, torch.concat), _concatenate),
    Tensor.__getitem__: _item,
}
