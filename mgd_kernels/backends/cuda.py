"""The CUDA C++ backend: `libmgd_cuda`, a library without torch that takes addresses and a stream.

A kernel call launches on the tensors' device and its current stream, and neither allocates device memory of its own,
copies, nor waits: workspaces are torch tensors. Inside a captured CUDA graph, hand over `hyper`, `k` and `grad_scale`
as tensors on the device: the kernels read them there, so that the graph can be replayed with new values. Build with
`pip install . -C cmake.define.MGD_CUDA=ON` where nvcc is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mgd_kernels.arena import Segments
from mgd_kernels.backends import addresses
from mgd_kernels.backends.addresses import DTYPES, check, check_dot, check_scales, check_slots, check_table, code
from mgd_kernels.errors import BackendUnavailable, BadArgument, KernelError
from mgd_kernels.memory import address, gate, wrote
from mgd_kernels.rules import Rule

_MAX_STEPS = 32  # kMaxSteps
_DEVICE = "cuda"
_LIBRARY = "libmgd_cuda.so"


class _Launch(ctypes.Structure):
    """`Launch` of csrc/optim/cuda.cu, field by field; the sizes are compared when the library is loaded."""

    _fields_ = [
        ("state", ctypes.c_void_p * 3),
        ("adjoint", ctypes.c_void_p * 3),
        ("u", ctypes.c_void_p),
        ("grads", ctypes.c_void_p * _MAX_STEPS),
        ("segments", ctypes.c_void_p),
        ("first_tile", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("tiles", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("step_offset", ctypes.c_int64),
        ("k", ctypes.c_void_p),
        ("hyper", ctypes.c_void_p),
        ("grad_scale", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("hyper_tangent", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("rule", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("grad_dtype", ctypes.c_int),
        ("advance", ctypes.c_int),
    ]


class _DotLaunch(ctypes.Structure):
    """`DotLaunch` of csrc/optim/cuda.cu."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("x_dtype", ctypes.c_int),
        ("y_dtype", ctypes.c_int),
    ]


# --- Loading ----------------------------------------------------------------------------------------------------------


def _open(path: Path) -> ctypes.CDLL:
    """The library with its signatures; KernelError where it was built from other sources than this file."""
    library = ctypes.CDLL(str(path))
    for name, argument in (("replay", _Launch), ("vjp", _Launch), ("jvp", _Launch), ("dot", _DotLaunch)):
        getattr(library, f"mgd_cuda_{name}").argtypes = [ctypes.POINTER(argument), ctypes.c_void_p]
    library.mgd_cuda_error.restype = ctypes.c_char_p
    library.mgd_cuda_workspace.restype = ctypes.c_int64
    library.mgd_cuda_workspace.argtypes = [ctypes.c_int64] * 3
    for name in ("launch_size", "dot_launch_size"):
        getattr(library, f"mgd_cuda_{name}").restype = ctypes.c_int64
    found = (library.mgd_cuda_launch_size(), library.mgd_cuda_dot_launch_size(), library.mgd_cuda_max_steps())
    if found != (ctypes.sizeof(_Launch), ctypes.sizeof(_DotLaunch), _MAX_STEPS):
        raise KernelError(f"expected {path} of this version of mgd_kernels; got another one: build both again")
    return library


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    path = _find()
    if path is None:
        return None, (
            "mgd_kernels was built without the CUDA kernels; where nvcc is, build it with "
            "`pip install . -C cmake.define.MGD_CUDA=ON`"
        )
    if not DTYPES:
        return None, "the extension module mgd_kernels._core, which holds the codes of dtypes and rules, does not load"
    if not torch.cuda.is_available():
        return None, "torch sees no CUDA device: a GPU, its driver and a torch built with CUDA are needed"
    try:
        library = _open(path)
    except (OSError, KernelError) as error:
        return None, f"{path} does not load: {error}"
    code = library.mgd_cuda_check()
    if code:
        return None, f"{path} does not run on this GPU and driver: {library.mgd_cuda_error(code).decode()}"
    return library, None


def _find() -> Path | None:
    """The library, beside the extension module (an editable install keeps the two away from the Python files)."""
    folders = [Path(__file__).parents[1]]
    try:
        from mgd_kernels import _core

        folders.append(Path(_core.__file__).parent)
    except ImportError:
        pass  # `_load` says so where the library is found nevertheless
    return next((folder / _LIBRARY for folder in folders if (folder / _LIBRARY).exists()), None)


def unavailable() -> str | None:
    return _load()[1]


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise BackendUnavailable(f"expected the cuda backend to work here; got: {reason}")
    return library


# --- Checks -----------------------------------------------------------------------------------------------------------


def unsupported(rule: Rule, params: Tensor, grad: Tensor) -> str | None:
    """Serves tensors `[n]` on one GPU, contiguous, float32 or float64; gradients of that dtype or a 16-bit one."""
    if params.device.type != _DEVICE or grad.device != params.device:
        return f"expected params and grad on one GPU; got {params.device} and {grad.device}"
    return addresses.unsupported(rule, params, grad)


# --- What the kernels read from device memory -------------------------------------------------------------------------


class _Tiles:
    """The segment table on a device, with the first tile of each row and, last, the number of tiles."""

    def __init__(self, segments: Segments, device: torch.device, tile: int):
        table = check_table(segments)
        end = 0
        first = [0]
        for start, stop, group in segments.rows():
            if start < end or stop < start or not 0 <= group < segments.groups:
                raise BadArgument(
                    f"expected sorted, disjoint segments of groups below {segments.groups}; got {segments.rows()}"
                )
            end = stop
            first.append(first[-1] - (start - stop) // tile)
        self.end, self.rows, self.count, self.groups = end, table.shape[0], first[-1], segments.groups
        self.table = table.to(device)
        self.first = torch.tensor(first, dtype=torch.int64, device=device)


_tiles_of: WeakKeyDictionary[Segments, dict[torch.device, _Tiles]] = WeakKeyDictionary()


def _tiles(segments: Segments, params: Tensor, tile: int) -> _Tiles:
    on_devices = _tiles_of.setdefault(segments, {})
    if params.device not in on_devices:
        on_devices[params.device] = _Tiles(segments, params.device, tile)
    tiles = on_devices[params.device]
    if tiles.end > params.numel():
        raise BadArgument(f"expected segments inside [0, {params.numel()}); the last one ends at {tiles.end}")
    return tiles


def _launch(rule: Rule, params: Tensor, grad: Tensor, tiles: _Tiles, k: Tensor, **fields: Any) -> _Launch:
    # The fields that are not given are 0.
    return _Launch(
        segments=tiles.table.data_ptr(),
        first_tile=tiles.first.data_ptr(),
        rows=tiles.rows,
        groups=tiles.groups,
        tiles=tiles.count,
        k=k.data_ptr(),
        rule=code(rule),
        dtype=DTYPES[params.dtype],
        grad_dtype=DTYPES[grad.dtype],
        **fields,
    )


def _on(device: torch.device, values: Any, dtype: torch.dtype, shape: tuple[int, ...], what: str) -> Tensor:
    """`values` as a tensor on the device: the very tensor where it is one already, so that a graph rereads it."""
    if isinstance(values, (list, tuple)) and any(isinstance(value, Tensor) for value in values):
        values = torch.stack([torch.as_tensor(value, dtype=dtype, device=device).reshape(()) for value in values])
    tensor = torch.as_tensor(values, dtype=dtype)
    if tensor.shape != shape:
        raise BadArgument(f"expected {what} as {dtype} {list(shape)}; got {tensor.dtype} {list(tensor.shape)}")
    return tensor.to(device, non_blocking=True).resolve_neg().contiguous()


@contextmanager
def _stream(device: torch.device) -> Iterator[int]:
    """The address of the device's current stream, with the device made the current one."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _call(function: Any, launch: ctypes.Structure, device: torch.device) -> None:
    with _stream(device) as stream:
        code = function(ctypes.byref(launch), stream)
    if code:
        error = _library().mgd_cuda_error(code).decode()
        raise KernelError(f"expected {function.__name__} to launch on {device}; CUDA error {code}: {error}")


# --- The functions of every backend: see `interface.Backend` ----------------------------------------------------------


def step_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grad: Tensor,
    hyper: Tensor,
    k: int | Tensor,
    segments: Segments,
    grad_scale: float | Tensor = 1.0,
) -> None:
    """`k` may be a 0-d int64 tensor on the device, which the kernel reads."""
    scale = grad_scale.reshape(1) if isinstance(grad_scale, Tensor) else [grad_scale]
    replay_(rule, params, slots, [grad], hyper.unsqueeze(0), k, segments, scale)


def replay_(
    rule: Rule,
    params: Tensor,
    slots: Sequence[Tensor],
    grads: Sequence[Tensor],
    hypers: Tensor,
    k: int | Tensor,
    segments: Segments,
    grad_scales: Sequence[float | Tensor] | Tensor,
) -> None:
    """The state stays in registers over up to 32 steps; k as in `step_`."""
    library = _library()
    check_scales(grads, grad_scales)
    if not grads:
        return
    state = [params, *check_slots(rule, slots, "slots")]
    check(unsupported, rule, state, grads)
    device, groups = params.device, segments.groups
    tiles = _tiles(segments, params, library.mgd_cuda_tile())
    hypers = _on(device, hypers, torch.float64, (len(grads), groups, len(rule.hyper)), "hyperparameters")
    scales = _on(device, grad_scales, torch.float64, (len(grads),), "grad_scales")
    first = _on(device, k, torch.int64, (), "the step number")
    to, (*sources, hyper) = gate(state, [*grads, hypers])
    common = rule, params, grads[0], tiles, first
    size = library.mgd_cuda_workspace(min(len(grads), _MAX_STEPS), groups, 0)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    for at in range(0, len(grads), _MAX_STEPS):
        part = sources[at : at + _MAX_STEPS]
        launch = _launch(
            *common,
            state=(ctypes.c_void_p * 3)(*to),
            grads=(ctypes.c_void_p * _MAX_STEPS)(*part),
            steps=len(part),
            step_offset=at,
            hyper=hyper + at * hypers.stride(0) * hypers.itemsize,
            grad_scale=scales[at:].data_ptr(),
            workspace=workspace.data_ptr(),
        )
        _call(library.mgd_cuda_replay, launch, device)
    wrote(state)


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
    """One pass over memory; k as in `step_`."""
    library = _library()
    state = [params, *check_slots(rule, slots, "slots")]
    adjoint = [adjoint_params, *check_slots(rule, adjoint_slots, "adjoints of slots")]
    check(unsupported, rule, [*state, *adjoint, u], [grad])
    device, groups = params.device, segments.groups
    tiles = _tiles(segments, params, library.mgd_cuda_tile())
    hyper = _on(device, hyper, torch.float64, (groups, len(rule.hyper)), "hyperparameters")
    scale = _on(device, grad_scale, torch.float64, (), "grad_scale")
    first = _on(device, k, torch.int64, (), "the step number")
    workspace = torch.empty(library.mgd_cuda_workspace(1, groups, tiles.count), dtype=torch.uint8, device=device)
    out = torch.empty(groups, len(rule.hyper) + 1, dtype=torch.float64, device=device)
    common = rule, params, grad, tiles, first
    (*to, to_u), (*sources, source, table) = gate([*adjoint, u], [*state, grad, hyper])
    launch = _launch(
        *common,
        state=(ctypes.c_void_p * 3)(*sources),
        adjoint=(ctypes.c_void_p * 3)(*to),
        u=to_u,
        grads=(ctypes.c_void_p * _MAX_STEPS)(source),
        steps=1,
        hyper=table,
        grad_scale=scale.data_ptr(),
        out=out.data_ptr(),
        workspace=workspace.data_ptr(),
    )
    _call(library.mgd_cuda_vjp, launch, device)
    wrote([*adjoint, u])
    return out


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
    library = _library()
    state = [params, *check_slots(rule, slots, "slots")]
    moved = addresses.check_tangents(rule, tangents, grad_tangents)
    check(unsupported, rule, [*state, *moved, *grad_tangents], [grad])
    device, groups, count = params.device, segments.groups, len(tangents)
    tiles = _tiles(segments, params, library.mgd_cuda_tile())
    hyper = _on(device, hyper, torch.float64, (groups, len(rule.hyper)), "hyperparameters")
    shape = (count, groups, len(rule.hyper))
    hyper_tangents = _on(device, hyper_tangents, torch.float64, shape, "tangents of hyperparameters")
    scale = _on(device, grad_scale, torch.float64, (), "grad_scale")
    first = _on(device, k, torch.int64, (), "the step number")
    workspace = torch.empty(library.mgd_cuda_workspace(2, groups, 0), dtype=torch.uint8, device=device)
    common = rule, params, grad, tiles, first
    written = [*moved, *state] if advance else moved
    gate(written, [*(() if advance else state), *grad_tangents, grad, hyper, hyper_tangents])
    for i, (tangent, grad_tangent) in enumerate(zip(tangents, grad_tangents, strict=True)):
        launch = _launch(
            *common,
            state=(ctypes.c_void_p * 3)(*map(address, state)),
            adjoint=(ctypes.c_void_p * 3)(*map(address, tangent)),
            u=address(grad_tangent),
            grads=(ctypes.c_void_p * _MAX_STEPS)(address(grad)),
            steps=1,
            hyper=address(hyper),
            grad_scale=scale.data_ptr(),
            hyper_tangent=address(hyper_tangents[i]),
            workspace=workspace.data_ptr(),
            advance=advance and i == count - 1,
        )
        _call(library.mgd_cuda_jvp, launch, device)
    wrote(written)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Serves any two of float32, float64, bfloat16 and float16, on one GPU."""
    library = _library()
    x, y = check_dot(x, y, _DEVICE)
    tiles = -(-x.numel() // library.mgd_cuda_tile())
    workspace = torch.empty(max(tiles, 1), dtype=torch.float64, device=x.device)
    out = torch.empty((), dtype=torch.float64, device=x.device)
    launch = _DotLaunch(
        x=address(x),
        y=address(y),
        n=x.numel(),
        out=out.data_ptr(),
        workspace=workspace.data_ptr(),
        x_dtype=DTYPES[x.dtype],
        y_dtype=DTYPES[y.dtype],
    )
    _call(library.mgd_cuda_dot, launch, x.device)
    return out
