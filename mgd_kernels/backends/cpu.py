"""The C++ backend for tensors on the CPU: vector kernels chosen at run time (AVX-512, AVX2 or the baseline).

Results are the same bits whatever the instruction set, the number of threads (`torch.get_num_threads()`) and the
alignment. The environment variable MGD_KERNELS_ISA (`baseline`, `avx2`, `avx512`) overrides the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from mgd_kernels.arena import Segments
from mgd_kernels.errors import BackendUnavailable, BadArgument
from mgd_kernels.rules import Rule

# The codes of mgd::DType and mgd::RuleId (csrc/optim/cpu.h).
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
Slot = TypeVar("Slot")
OUT_OF_PLACE = True  # `step_`, `replay_` and `vjp_` take `out`
Leaves: TypeAlias = Sequence[Tensor | None]
_HALVES = (torch.bfloat16, torch.float16)
_RULES = {("adam", 2, False): 0, ("sgd", 0, False): 1, ("sgd", 1, False): 2, ("sgd", 1, True): 3}


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from mgd_kernels import _core
    except ImportError as error:
        return None, (
            f"the extension module mgd_kernels._core does not load ({error}); build it with `pip install .` or "
            "`pip install -e .` in the project's folder, with a C++17 compiler"
        )
    try:
        _core.isa()
    except ValueError as error:
        return None, str(error)
    return _core, None


def unavailable() -> str | None:
    """None where the backend works in this process, else the reason and what to do."""
    return _load()[1]


def _core() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise BackendUnavailable(f"the cpu backend cannot be used: {reason}")
    return module


def unsupported(rule: Rule, params: Tensor, grad: Tensor) -> str | None:
    """None where these tensors are served, else the reason: tensors `[n]` of the CPU, contiguous, float32 or float64;
    gradients of that dtype or a 16-bit one."""
    if _rule(rule) is None:
        return f"no kernel for the rule {rule.name!r} with the slots {rule.slots}"
    for name, tensor in (("params", params), ("grad", grad)):
        if tensor.device.type != "cpu":
            return f"expected {name} on the CPU; got {tensor.device}"
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            return f"expected {name} contiguous; got strides {tensor.stride()}: call .contiguous()"
    if params.dtype not in (torch.float32, torch.float64):
        return f"expected float32 or float64 params; got {params.dtype}"
    if grad.dtype != params.dtype and grad.dtype not in _HALVES:
        return f"expected a gradient in {params.dtype}, torch.bfloat16 or torch.float16; got {grad.dtype}"
    return None


def _rule(rule: Rule) -> int | None:
    return _RULES.get((rule.name, len(rule.slots), rule.nesterov))


def _check(rule: Rule, state: Sequence[Tensor], grads: Sequence[Tensor], k: int) -> None:
    """The kernels take addresses: what is not checked here would read or write memory that is not ours."""
    params = state[0]
    for grad in grads:
        reason = unsupported(rule, params, grad)
        if reason:
            raise BadArgument(f"the cpu backend cannot serve these tensors: {reason}")
        if grad.shape != params.shape:
            raise BadArgument(f"expected a gradient {list(params.shape)}; got {list(grad.shape)}")
        if grad.dtype != grads[0].dtype:
            raise BadArgument(f"expected gradients of one dtype; got {grads[0].dtype} and {grad.dtype}")
    if params.ndim != 1:
        raise BadArgument(f"expected flat tensors [n]; got params {list(params.shape)}")
    for tensor in state:
        same = (tensor.dtype, tensor.shape, tensor.device) == (params.dtype, params.shape, params.device)
        if not same or not tensor.is_contiguous():
            raise BadArgument(
                f"expected every slot, adjoint and u contiguous, {params.dtype} {list(params.shape)} on the CPU as "
                f"params; got {tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
            )
    if k < 1:
        raise BadArgument(f"expected a step number of at least 1; got {k}")


def _slots(rule: Rule, slots: Sequence[Slot], what: str) -> list[Slot]:
    if len(slots) != len(rule.slots):
        raise BadArgument(f"expected {len(rule.slots)} {what} ({', '.join(rule.slots)}); got {len(slots)}")
    return list(slots)


def _table(rule: Rule, hyper: Tensor, *leading: int) -> Tensor:
    shape = (*leading, len(rule.hyper))
    if hyper.dtype != torch.float64 or hyper.shape != shape:
        raise BadArgument(f"expected hyperparameters as float64 {list(shape)}; got {hyper.dtype} {list(hyper.shape)}")
    return hyper.cpu().contiguous()


def _segments(segments: Segments) -> tuple[Tensor, int]:
    table = segments.table
    if table.dtype != torch.int64 or table.device.type != "cpu" or table.ndim != 2 or table.shape[1] != 3:
        raise BadArgument(f"expected a segment table int64 [R, 3] on the CPU; got {table.dtype} {list(table.shape)}")
    return table.contiguous(), table.shape[0]


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def step_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grad: Tensor,
    hyper: Tensor,
    k: int,
    segments: Segments,
    grad_scale: float | Tensor = 1.0,
    out: Sequence[Tensor] | None = None,
) -> None:
    """As `reference.step_`; out as in `replay_`."""
    replay_(rule, params, slots, [grad], hyper.unsqueeze(0), k, segments, [grad_scale], out)


def replay_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grads: Sequence[Tensor],
    hypers: Tensor,
    k: int,
    segments: Segments,
    grad_scales: Sequence[float | Tensor],
    out: Sequence[Tensor] | None = None,
) -> None:
    """As `reference.replay_`, in one pass over memory: `slots + 1 + len(grads)` reads, `slots + 1` writes an element.

    Bit-identical to single steps. out: where given, tensors apart from all others that receive the elements of the
    segments of `[params, *slots]`, which stay as they are.
    """
    core = _core()
    if len(grad_scales) != len(grads):
        raise BadArgument(f"expected {len(grads)} grad_scales, one a gradient; got {len(grad_scales)}")
    if not grads:
        return
    state = [params, *_slots(rule, slots, "slots")]
    new = state if out is None else [out[0], *_slots(rule, out[1:], "new slots")]
    _check(rule, [*state, *new], grads, k)
    hypers = _table(rule, hypers, len(grads), segments.groups)
    table, rows = _segments(segments)
    core.optim_replay(
        _rule(rule),
        _DTYPES[params.dtype],
        _DTYPES[grads[0].dtype],
        params.numel(),
        _addresses(state),
        _addresses(grads),
        [float(scale) for scale in grad_scales],
        hypers.data_ptr(),
        segments.groups,
        k,
        table.data_ptr(),
        rows,
        _addresses(new),
        torch.get_num_threads(),
    )


def vjp_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grad: Tensor,
    hyper: Tensor,
    k: int,
    segments: Segments,
    adjoint_params: Tensor,
    adjoint_slots: Sequence[Tensor],
    u: Tensor,
    grad_scale: float | Tensor = 1.0,
    out: Sequence[Tensor] | None = None,
    hyper_wanted: bool = True,
) -> Tensor | None:
    """As `reference.vjp_`, in one pass over memory. out: where given, tensors apart from all others that receive the
    elements of the segments of the adjoints, which stay as they are. hyper_wanted: False spares the sums (Adam: 3.5
    instead of 6.1 ms for 4 M elements); then None is returned."""
    core = _core()
    state = [params, *_slots(rule, slots, "slots")]
    adjoint = [adjoint_params, *_slots(rule, adjoint_slots, "adjoints of slots")]
    new = adjoint if out is None else [out[0], *_slots(rule, out[1:], "new adjoints of slots")]
    _check(rule, [*state, *adjoint, *new, u], [grad], k)
    hyper = _table(rule, hyper, segments.groups)
    table, rows = _segments(segments)
    cotangents = torch.empty(segments.groups, len(rule.hyper) + 1, dtype=torch.float64)
    core.optim_vjp(
        _rule(rule),
        _DTYPES[params.dtype],
        _DTYPES[grad.dtype],
        params.numel(),
        _addresses(state),
        grad.data_ptr(),
        float(grad_scale),
        hyper.data_ptr(),
        segments.groups,
        k,
        table.data_ptr(),
        rows,
        _addresses(adjoint),
        _addresses(new),
        u.data_ptr(),
        cotangents.data_ptr() if hyper_wanted else 0,
        torch.get_num_threads(),
    )
    return cotangents if hyper_wanted else None


# --- Leaves that lie apart ----------------------------------------------------------------------------------------


def update(
    rule: Rule,
    params: Leaves,
    slots: Sequence[Leaves],
    grads: Leaves,
    hyper: Tensor,
    k: int,
    groups: Sequence[int],
    updates: Sequence[Tensor],
    new_slots: Sequence[Sequence[Tensor]],
) -> None:
    """As `integrations.flat.update`, in one pass over the leaves where they lie."""
    core = _core()
    state: list[Leaves] = [params, *_slots(rule, slots, "slots")]
    out: list[Leaves] = [updates, *_slots(rule, new_slots, "new slots")]
    dtype, grad_dtype, sizes = _check_leaves(k, updates, grads, [*state, *out], groups)
    hyper = _table(rule, hyper, hyper.shape[0])
    core.optim_update(
        _rule(rule),
        _DTYPES[dtype],
        _DTYPES[grad_dtype],
        sizes,
        list(groups),
        len(state),
        _by_leaf(state),
        _by_leaf([grads]),
        hyper.data_ptr(),
        hyper.shape[0],
        k,
        _by_leaf(out),
        torch.get_num_threads(),
    )


def update_vjp(
    rule: Rule,
    params: Leaves,
    slots: Sequence[Leaves],
    grads: Leaves,
    hyper: Tensor,
    k: int,
    groups: Sequence[int],
    adjoint_updates: Leaves,
    adjoint_slots: Sequence[Leaves],
    new_adjoint_params: Leaves,
    new_adjoint_slots: Sequence[Leaves],
    u: Sequence[Tensor],
    hyper_wanted: bool = True,
) -> Tensor | None:
    """As `integrations.flat.update_vjp`, in one pass over the leaves where they lie."""
    core = _core()
    state: list[Leaves] = [params, *_slots(rule, slots, "slots")]
    adjoint: list[Leaves] = [adjoint_updates, *_slots(rule, adjoint_slots, "adjoints of slots")]
    out: list[Leaves] = [new_adjoint_params, *_slots(rule, new_adjoint_slots, "new adjoints of slots")]
    dtype, grad_dtype, sizes = _check_leaves(k, u, grads, [*state, *adjoint, *out], groups)
    hyper = _table(rule, hyper, hyper.shape[0])
    cotangents = torch.empty(hyper.shape[0], len(rule.hyper) + 1, dtype=torch.float64)
    core.optim_update_vjp(
        _rule(rule),
        _DTYPES[dtype],
        _DTYPES[grad_dtype],
        sizes,
        list(groups),
        len(state),
        _by_leaf(state),
        _by_leaf([grads]),
        hyper.data_ptr(),
        hyper.shape[0],
        k,
        _by_leaf(adjoint),
        _by_leaf(out),
        _by_leaf([u]),
        cotangents.data_ptr() if hyper_wanted else 0,
        torch.get_num_threads(),
    )
    return cotangents if hyper_wanted else None


def _check_leaves(
    k: int, like: Sequence[Tensor], grads: Leaves, others: Sequence[Leaves], groups: Sequence[int]
) -> tuple[torch.dtype, torch.dtype, list[int]]:
    """The dtypes of the state and of the gradients, and the leaves' sizes, once all is what the kernels take it for."""
    dtype = like[0].dtype
    given = [grad for grad in grads if grad is not None]
    grad_dtype = given[0].dtype if given else dtype
    if dtype not in (torch.float32, torch.float64) or (grad_dtype != dtype and grad_dtype not in _HALVES):
        raise BadArgument(
            f"expected leaves in float32 or float64, and gradients in that dtype or a 16-bit one; got {dtype} and "
            f"{grad_dtype}"
        )
    if k < 1:
        raise BadArgument(f"expected a step number of at least 1; got {k}")
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


def _by_leaf(rows: Sequence[Leaves]) -> list[int]:
    """The addresses of all rows' first leaves, of their second ones, and so on; 0 for a leaf that is not there."""
    return [0 if leaf is None else leaf.data_ptr() for leaves in zip(*rows, strict=True) for leaf in leaves]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """As `reference.dot`: `[n]` tensors of any two of float32, float64, bfloat16 and float16."""
    for name, tensor in (("x", x), ("y", y)):
        if tensor.device.type != "cpu" or tensor.dtype not in _DTYPES or tensor.ndim != 1:
            raise BadArgument(
                f"expected {name} flat and floating-point on the CPU; got {tensor.dtype} {list(tensor.shape)} "
                f"on {tensor.device}"
            )
    if x.shape != y.shape:
        raise BadArgument(f"expected x and y of one length; got {x.numel()} and {y.numel()}")
    x, y = x.contiguous(), y.contiguous()
    value = _core().dot(
        _DTYPES[x.dtype], _DTYPES[y.dtype], x.numel(), x.data_ptr(), y.data_ptr(), torch.get_num_threads()
    )
    return torch.tensor(value, dtype=torch.float64)
