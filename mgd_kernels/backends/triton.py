"""The Triton backend: NVIDIA and AMD GPUs, float32 states with float32, bfloat16 or float16 gradients.

Everything runs on the tensors' device and the current stream without synchronising, and can be captured in a CUDA
graph once one call has compiled the kernels, given hyperparameters (and, where they change, `k` and `grad_scale`) on
the device. Workspaces come from torch's stream-ordered caching allocator.

Without a GPU the kernels run in Triton's interpreter, slowly, where the environment asks for it: TRITON_INTERPRET=1
before triton is first imported.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mgd_kernels.arena import Segments
from mgd_kernels.backends.addresses import check_tangents
from mgd_kernels.backends.triton_tiles import tiles_of
from mgd_kernels.errors import BadArgument
from mgd_kernels.memory import check_extents_apart, wrote
from mgd_kernels.rules import Rule

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WRITES_COPY = True


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def _kernels() -> ModuleType:
    from mgd_kernels.backends import triton_kernels

    return triton_kernels


@cache
def _rules() -> ModuleType:
    from mgd_kernels.backends import triton_rules

    return triton_rules


def unavailable() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install 'mgd-kernels[triton]'"
    if torch.cuda.is_available() or interpreted():
        return None
    return "no GPU found; TRITON_INTERPRET=1 in the environment runs the kernels in Triton's (slow) interpreter"


def unsupported(rule: Rule, params: Tensor, grad: Tensor) -> str | None:
    if params.device.type != "cuda" and not interpreted():
        return f"expected tensors on a GPU; got {params.device}"
    if params.dtype != torch.float32:
        return f"expected float32 parameters (16-bit ones get a float32 master copy); got {params.dtype}"
    if grad.dtype not in GRADIENT_DTYPES:
        return f"expected a float32, bfloat16 or float16 gradient; got {grad.dtype}"
    return None


# --- Launching ---------------------------------------------------------------------------------------------------


def _variant(rule: Rule) -> str:
    if rule.name == "adam":
        return "adam"
    return ("nesterov" if rule.nesterov else "momentum") if rule.slots else "sgd"


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _options(block: int, rule: str | None = None) -> dict[str, object]:
    if interpreted():
        return {}
    from triton.runtime import driver

    return _options_of(block, rule, driver.active)


@cache
def _options_of(block: int, rule: str | None, driver: Any) -> dict[str, object]:
    """Looked up once: to ask the driver at each launch takes as long as the launch."""
    return _kernels().options(block, rule, driver.get_current_target().backend)


def _reducing_tile(n: int) -> int:
    """A function of the length alone: the partition, and with it every sum, is fixed."""
    kernels = _kernels()
    return kernels.SMALL_TILE if n < kernels.SMALL else kernels.TILE


def _check(n: int, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.shape != (n,) or not tensor.is_contiguous() or tensor.device != tensors[0].device:
            raise BadArgument(
                f"expected contiguous tensors of shape [{n}] on {tensors[0].device}; got {list(tensor.shape)} with "
                f"strides {tensor.stride()} on {tensor.device}"
            )
        if tensor.is_neg():
            raise BadArgument(
                "expected tensors whose memory holds their values; got a negated view: call .resolve_neg()"
            )


def _pair(tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    first, second, *_ = (*tensors, None, None)
    return first, second


def _coefficients(
    rule: Rule,
    hypers: Tensor,
    k: int | Tensor,
    grad_scales: Sequence[float | Tensor],
    segments: Segments,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The coefficient tables, float32 and float64, of hypers `[steps, G, H]`, made on the device."""
    rules = _rules()
    if hypers.shape != (len(grad_scales), segments.groups, len(rule.hyper)):
        raise BadArgument(
            f"expected hyperparameters [{len(grad_scales)}, {segments.groups}, {len(rule.hyper)}] (steps, groups, "
            f"{', '.join(rule.hyper)}); got {list(hypers.shape)}"
        )
    steps, groups, width = hypers.shape
    hypers = hypers.to(device, torch.float64, non_blocking=True).resolve_neg().contiguous()
    scale, scales = 1.0, None
    if any(isinstance(value, Tensor) for value in grad_scales):
        scales = torch.stack(
            [
                value.to(device, torch.float64, non_blocking=True).reshape(())
                if isinstance(value, Tensor)
                else torch.full((), value, dtype=torch.float64, device=device)
                for value in grad_scales
            ]
        )
    elif len(set(grad_scales)) > 1:
        scales = torch.tensor(grad_scales, dtype=torch.float64, device="cpu").to(device, non_blocking=True)
    else:
        scale = float(grad_scales[0])
    k_tensor = k.to(device, torch.int64, non_blocking=True) if isinstance(k, Tensor) else None
    out32 = torch.empty(steps, groups, rules.WIDTH.value, dtype=torch.float32, device=device)
    out64 = torch.empty(steps, groups, rules.WIDTH64.value, dtype=torch.float64, device=device)
    rules.coefficients_kernel[(steps * groups,)](
        hypers, k_tensor, 0 if k_tensor is not None else k, scales, scale, out32, out64, groups, width,
        RULE=_variant(rule), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out32, out64


def _spacing(grads: Sequence[Tensor], device: torch.device) -> tuple[int, Tensor | None, bool]:
    """How far, in elements, each gradient lies from the first: `(pitch, offsets, aligned)`; offsets where uneven."""
    size = grads[0].element_size()
    distances = [grad.data_ptr() - grads[0].data_ptr() for grad in grads]
    if any(distance % size for distance in distances):
        raise BadArgument(f"expected gradients that are aligned to their element size of {size} bytes")
    offsets = [distance // size for distance in distances]
    aligned = all(offset % _kernels().VECTOR.value == 0 for offset in offsets)
    pitch = offsets[1] if len(offsets) > 1 else 0
    if all(offset == i * pitch for i, offset in enumerate(offsets)):
        return pitch, None, aligned
    return 0, torch.tensor(offsets, dtype=torch.int64, device="cpu").to(device, non_blocking=True), aligned


# --- The functions of every backend: see `interface.Backend` -----------------------------------------------------


def step_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grad: Tensor,
    hyper: Tensor,
    k: int | Tensor,
    segments: Segments,
    grad_scale: float | Tensor = 1.0,
    low: Tensor | None = None,
) -> None:
    """k: also a 0-d integer tensor on the device, which a CUDA graph can advance.
    low: where given, a 16-bit `[n]` tensor that receives the new parameters in the same pass."""
    _replay(rule, params, slots, [grad], hyper[None], k, segments, [grad_scale], low)


def replay_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grads: Sequence[Tensor] | Tensor,
    hypers: Tensor,
    k: int | Tensor,
    segments: Segments,
    grad_scales: Sequence[float | Tensor],
    low: Tensor | None = None,
) -> None:
    """In one pass over the state; k and low as in `step_`.

    grads: a `[steps, n]` tensor or a list of `[n]` tensors, which may lie anywhere on the device.
    """
    done = 0
    for _, same_dtype in itertools.groupby(grads, key=lambda grad: grad.dtype):
        run = list(same_dtype)
        end = done + len(run)
        _replay(rule, params, slots, run, hypers[done:end], k + done, segments, grad_scales[done:end], low)
        done = end


def _replay(rule, params, slots, grads, hypers, k, segments, grad_scales, low) -> None:
    kernels = _kernels()
    written = [params, *slots, *([] if low is None else [low])]
    _check(params.numel(), *written, *grads)
    check_extents_apart(written, grads)
    device, steps = params.device, len(grads)
    with _on(device):
        tiles = tiles_of(segments, kernels.BLOCK, device)
        if not tiles.count:
            return
        table, _ = _coefficients(rule, hypers, k, grad_scales, segments, device)
        pitch, offsets, offsets_aligned = _spacing(grads, device)
        for count, where, block, aligned in tiles.parts:
            kernels.replay_kernel[(count,)](
                params, *_pair(slots), grads[0], pitch, offsets, low, table, where, params.numel(), segments.groups,
                steps, RULE=_variant(rule), SINGLE=steps == 1, ALIGNED=aligned,
                OFFSETS_ALIGNED=aligned and offsets_aligned, BLOCK=block, **_options(block),
            )  # fmt: skip
    wrote(written)


def vjp_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grad: Tensor,
    hyper: Tensor,
    k: int | Tensor,
    segments: Segments,
    adjoint_params: Tensor,
    adjoint_slots: Sequence[Tensor],
    u: Tensor,
    grad_scale: float | Tensor = 1.0,
) -> Tensor:
    """k as in `step_`. `u` may be 16-bit."""
    kernels = _kernels()
    written = [adjoint_params, *adjoint_slots, u]
    _check(params.numel(), params, *slots, grad, *written)
    check_extents_apart(written, [params, *slots, grad])
    device, columns = params.device, len(rule.hyper) + 1
    with _on(device):
        tiles = tiles_of(segments, _reducing_tile(params.numel()), device)
        if not tiles.count:
            return torch.zeros(segments.groups, columns, dtype=torch.float64, device=device)
        table, table64 = _coefficients(rule, hyper[None], k, [grad_scale], segments, device)
        partials = torch.empty(columns, tiles.count, dtype=torch.float64, device=device)
        for count, where, size, aligned in tiles.parts:
            block = min(size, kernels.VJP_BLOCK)
            kernels.vjp_kernel[(count,)](
                params, *_pair(slots), grad, adjoint_params, *_pair(adjoint_slots), u, table, table64, partials,
                where, params.numel(), tiles.count, RULE=_variant(rule), ALIGNED=aligned, TILE=size, BLOCK=block,
                **_options(block, _variant(rule)),
            )  # fmt: skip
        wrote(written)
        return _sum(partials, tiles.ranges, segments.groups)


def jvp_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grad: Tensor,
    hyper: Tensor,
    k: int | Tensor,
    segments: Segments,
    tangents: Sequence[Sequence[Tensor]],
    grad_tangents: Sequence[Tensor],
    hyper_tangents: Tensor,
    grad_scale: float | Tensor = 1.0,
    advance: bool = False,
) -> None:
    """A pass over memory for each direction, of which the last makes the step; k as in `step_`."""
    kernels, rules, groups, width = _kernels(), _rules(), segments.groups, len(rule.hyper)
    moved, state, count = check_tangents(rule, tangents, grad_tangents), [params, *slots], len(tangents)
    _check(params.numel(), *state, *moved, grad, *grad_tangents)
    written = [*moved, *state] if advance else moved
    check_extents_apart(written, [grad, *grad_tangents, *(() if advance else state)])
    if hyper_tangents.shape != (count, groups, width):
        raise BadArgument(f"expected hyper_tangents [{count}, {groups}, {width}]; got {list(hyper_tangents.shape)}")
    device = params.device
    with _on(device):
        tiles = tiles_of(segments, kernels.VJP_BLOCK, device)
        if not tiles.count:
            return
        table, _ = _coefficients(rule, hyper[None], k, [grad_scale], segments, device)
        hyper, dhyper = (
            x.to(device, torch.float64, non_blocking=True).resolve_neg().contiguous() for x in (hyper, hyper_tangents)
        )
        k_tensor = k.to(device, torch.int64, non_blocking=True) if isinstance(k, Tensor) else None
        dtable = torch.zeros(count, groups, rules.TANGENT_WIDTH.value, dtype=torch.float32, device=device)
        rules.tangents_kernel[(count * groups,)](
            hyper, dhyper, k_tensor, 0 if k_tensor is not None else k, dtable, groups, width, RULE=_variant(rule),
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
        for i, ((tangent, *rest), grad_tangent) in enumerate(zip(tangents, grad_tangents, strict=True)):
            for programs, where, block, aligned in tiles.parts:
                kernels.jvp_kernel[(programs,)](
                    params, *_pair(slots), grad, tangent, *_pair(rest), grad_tangent, table, dtable[i], where,
                    params.numel(), RULE=_variant(rule), ALIGNED=aligned, ADVANCE=advance and i == count - 1,
                    BLOCK=block, **_options(block),
                )  # fmt: skip
    wrote(written)


def dot(x: Tensor, y: Tensor) -> Tensor:
    kernels = _kernels()
    x, y = x.resolve_neg(), y.resolve_neg()
    _check(x.numel(), x, y)
    with _on(x.device):
        size, block = _reducing_tile(x.numel()), kernels.VJP_BLOCK
        count = -(-x.numel() // size)
        if not count:
            return torch.zeros((), dtype=torch.float64, device=x.device)
        partials = torch.empty(1, count, dtype=torch.float64, device=x.device)
        kernels.dot_kernel[(count,)](x, y, partials, x.numel(), TILE=size, BLOCK=block, **_options(block))
        return _sum(partials, None, 1).reshape(())


def _sum(partials: Tensor, ranges: Tensor | None, groups: int) -> Tensor:
    columns, count = partials.shape
    out = torch.empty(groups, columns, dtype=torch.float64, device=partials.device)
    kernels = _kernels()
    block = kernels.BLOCK
    kernels.sum_kernel[(groups, columns)](partials, ranges, out, count, columns, BLOCK=block, **_options(block))
    return out
