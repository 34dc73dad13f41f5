"""The C++ backend for tensors on the CPU: vector kernels chosen at run time (AVX-512, AVX2 or the baseline).

Results are the same bits whatever the instruction set, the number of threads (`torch.get_num_threads()`) and the
alignment. The environment variable MGD_KERNELS_ISA (`baseline`, `avx2`, `avx512`) overrides the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from types import ModuleType

import torch
from torch import Tensor

from mgd_kernels.arena import Segments
from mgd_kernels.backends import addresses
from mgd_kernels.backends.addresses import (
    DTYPES,
    by_leaf,
    check,
    check_dot,
    check_leaves,
    check_leaves_apart,
    check_scales,
    check_slots,
    check_table,
    check_tangents,
    code,
)
from mgd_kernels.backends.interface import Leaves
from mgd_kernels.errors import BackendUnavailable, BadArgument
from mgd_kernels.memory import address, gate, wrote
from mgd_kernels.rules import WANTED, Rule, Wanted

OUT_OF_PLACE = True  # `step_`, `replay_` and `vjp_` take `out`
CHOOSES_SUMS = True  # `vjp_` takes `wanted`


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
    return _load()[1]


def _core() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise BackendUnavailable(f"expected the cpu backend to work here; got: {reason}")
    return module


def unsupported(rule: Rule, params: Tensor, grad: Tensor) -> str | None:
    """Serves tensors `[n]` on the CPU, contiguous, float32 or float64; gradients of that dtype or a 16-bit one."""
    if not (params.is_cpu and grad.is_cpu):
        return f"expected params and grad on the CPU; got {params.device} and {grad.device}"
    return addresses.unsupported(rule, params, grad)


def _check_step(k: int) -> None:
    if k < 1:
        raise BadArgument(f"expected a step number of at least 1; got {k}")


def _table(rule: Rule, hyper: Tensor, *leading: int) -> Tensor:
    shape = (*leading, len(rule.hyper))
    if hyper.dtype != torch.float64 or hyper.shape != shape:
        raise BadArgument(f"expected hyperparameters as float64 {list(shape)}; got {hyper.dtype} {list(hyper.shape)}")
    if hyper.is_meta:
        raise BadArgument("expected hyperparameters with values; got a meta tensor")
    if hyper.is_cpu and hyper.is_contiguous() and not hyper.is_neg():
        return hyper
    return hyper.cpu().resolve_neg().contiguous()


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
    """In place, or into `out`."""
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
    """One pass over memory: `slots + 1 + len(grads)` reads and `slots + 1` writes per element."""
    core = _core()
    check_scales(grads, grad_scales)
    if not grads:
        return
    state = [params, *check_slots(rule, slots, "slots")]
    new = state if out is None else [out[0], *check_slots(rule, out[1:], "new slots")]
    check(unsupported, rule, state if out is None else [*state, *new], grads)
    _check_step(k)
    hypers = _table(rule, hypers, len(grads), segments.groups)
    table = check_table(segments)
    to, source = gate(new, [*(() if out is None else state), *grads, hypers])
    *gradients, hyper = source if out is None else source[len(state) :]
    core.optim_replay(
        code(rule),
        DTYPES[params.dtype],
        DTYPES[grads[0].dtype],
        params.numel(),
        to if out is None else source[: len(state)],
        gradients,
        [float(scale) for scale in grad_scales],
        hyper,
        segments.groups,
        k,
        address(table),
        table.shape[0],
        to,
        torch.get_num_threads(),
    )
    wrote(new)


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
    wanted: Wanted = "all",
) -> Tensor:
    """One pass over memory, which computes the sums that are `wanted` alone. Without any it does half of Adam's
    arithmetic."""
    core = _core()
    state = [params, *check_slots(rule, slots, "slots")]
    adjoint = [adjoint_params, *check_slots(rule, adjoint_slots, "adjoints of slots")]
    new = adjoint if out is None else [out[0], *check_slots(rule, out[1:], "new adjoints of slots")]
    written = [*new, u]
    check(unsupported, rule, [*state, *written, *(() if out is None else adjoint)], [grad])
    _check_step(k)
    hyper = _table(rule, hyper, segments.groups)
    table = check_table(segments)
    cotangents = torch.zeros(segments.groups, len(rule.hyper) + 1, dtype=torch.float64, device="cpu")
    count = len(state)
    to, source = gate(written, [*state, *(() if out is None else adjoint), grad, hyper])
    core.optim_vjp(
        code(rule),
        DTYPES[params.dtype],
        DTYPES[grad.dtype],
        params.numel(),
        source[:count],
        source[-2],
        float(grad_scale),
        source[-1],
        segments.groups,
        k,
        address(table),
        table.shape[0],
        to[:count] if out is None else source[count:-2],
        to[:count],
        to[count],
        address(cotangents),
        WANTED.index(wanted),
        torch.get_num_threads(),
    )
    wrote(written)
    return cotangents


def jvp_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grad: Tensor,
    hyper: Tensor,
    k: int,
    segments: Segments,
    tangents: Sequence[Sequence[Tensor]],
    grad_tangents: Sequence[Tensor],
    hyper_tangents: Tensor,
    grad_scale: float | Tensor = 1.0,
    advance: bool = False,
) -> None:
    """One pass over memory for all directions and, where `advance`, the step. grad_tangents in the dtype of params."""
    core = _core()
    state = [params, *check_slots(rule, slots, "slots")]
    moved = check_tangents(rule, tangents, grad_tangents)
    check(unsupported, rule, [*state, *moved, *grad_tangents], [grad])
    _check_step(k)
    hyper = _table(rule, hyper, segments.groups)
    hyper_tangents = _table(rule, hyper_tangents, len(tangents), segments.groups)
    table = check_table(segments)
    written = [*state, *moved] if advance else moved
    read = [*(() if advance else state), *grad_tangents, grad, hyper, hyper_tangents]
    to, source = gate(written, read)
    if advance:
        state_at, tangents_at = to[: len(state)], to[len(state) :]
    else:
        state_at, tangents_at, source = source[: len(state)], to, source[len(state) :]
    core.optim_jvp(
        code(rule),
        DTYPES[params.dtype],
        DTYPES[grad.dtype],
        params.numel(),
        state_at,
        source[-3],
        float(grad_scale),
        source[-2],
        segments.groups,
        k,
        address(table),
        table.shape[0],
        tangents_at,
        source[:-3],
        source[-1],
        advance,
        torch.get_num_threads(),
    )
    wrote(written)


# --- Leaves that lie apart: see `interface.LeafBackend` -----------------------------------------------------------


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
    """One pass over the leaves where they lie."""
    core = _core()
    state: list[Leaves] = [params, *check_slots(rule, slots, "slots")]
    out: list[Leaves] = [updates, *check_slots(rule, new_slots, "new slots")]
    _check_step(k)
    dtype, grad_dtype, sizes = check_leaves(updates, grads, [*state, *out], groups)
    hyper = _table(rule, hyper, hyper.shape[0])
    to, source, gradients = by_leaf(out), by_leaf(state), by_leaf([grads])
    check_leaves_apart(sizes, dtype, to, source, (grad_dtype, gradients))
    core.optim_update(
        code(rule),
        DTYPES[dtype],
        DTYPES[grad_dtype],
        sizes,
        list(groups),
        len(state),
        source,
        gradients,
        address(hyper),
        hyper.shape[0],
        k,
        to,
        torch.get_num_threads(),
    )
    wrote([leaf for leaf in chain(*out) if leaf is not None])


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
    """One pass over the leaves where they lie."""
    core = _core()
    state: list[Leaves] = [params, *check_slots(rule, slots, "slots")]
    adjoint: list[Leaves] = [adjoint_updates, *check_slots(rule, adjoint_slots, "adjoints of slots")]
    out: list[Leaves] = [new_adjoint_params, *check_slots(rule, new_adjoint_slots, "new adjoints of slots")]
    _check_step(k)
    dtype, grad_dtype, sizes = check_leaves(u, grads, [*state, *adjoint, *out], groups)
    hyper = _table(rule, hyper, hyper.shape[0])
    cotangents = torch.empty(hyper.shape[0], len(rule.hyper) + 1, dtype=torch.float64, device="cpu")
    source, gradients, adjoints = by_leaf(state), by_leaf([grads]), by_leaf(adjoint)
    to, to_u = by_leaf(out), by_leaf([u])
    check_leaves_apart(sizes, dtype, to, adjoints, (dtype, source), (grad_dtype, gradients), u=to_u)
    core.optim_update_vjp(
        code(rule),
        DTYPES[dtype],
        DTYPES[grad_dtype],
        sizes,
        list(groups),
        len(state),
        source,
        gradients,
        address(hyper),
        hyper.shape[0],
        k,
        adjoints,
        to,
        to_u,
        address(cotangents) if hyper_wanted else 0,
        torch.get_num_threads(),
    )
    wrote([leaf for leaf in chain(*out, u) if leaf is not None])
    return cotangents if hyper_wanted else None


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Serves any two of float32, float64, bfloat16 and float16."""
    return torch.tensor(dot_number(x, y), dtype=torch.float64, device="cpu")


def dot_number(x: Tensor, y: Tensor) -> float:
    """As `dot`."""
    x, y = check_dot(x, y, "cpu")
    return _core().dot(DTYPES[x.dtype], DTYPES[y.dtype], x.numel(), address(x), address(y), torch.get_num_threads())
