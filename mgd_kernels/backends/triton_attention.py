"""Launches of `triton_attention_kernels`, on a GPU's current stream. Nothing waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mgd_kernels.backends import triton
from mgd_kernels.backends.triton_nn import _on, serves

KERNELS = ("forward", "backward_rows", "backward_columns", "twice_rows", "twice_columns", "mask_gradient")
BLOCKS = (32, 64, 128)  # powers of two that hold a head
WIDEST = BLOCKS[-1]  # elements of a head
# Elements of a head that one product of a score takes at a time: the same in all kernels, whose scores must be rounded
# alike. With 32 in the forward pass and 16 in the others, second derivatives had 21 roundings of error, not 5.
CHUNK = 16


class Tile(NamedTuple):
    """Of a kernel: queries, keys, warps of a program."""

    rows: int
    keys: int
    warps: int


def _table(*kernels: tuple[Tile, Tile, Tile]) -> dict[str, dict[int, Tile]]:
    return {name: dict(zip(BLOCKS, tiles, strict=True)) for name, tiles in zip(KERNELS, kernels, strict=True)}


# Architecture -> kernel -> what holds a head -> tile. Chosen by registers alone (`mgd_kernels.aot_operators`), not by
# time: with a whole head in a product instead of a chunk, second derivatives spill hundreds of them. On sm_100, Triton
# takes products of 64 rows and more to tensor memory, of which many tiles would need more than there is.
TILES = {
    "sm_80": _table(
        (Tile(64, 32, 4), Tile(64, 32, 4), Tile(64, 16, 8)),
        (Tile(32, 32, 4), Tile(32, 32, 4), Tile(64, 16, 8)),
        (Tile(16, 64, 4), Tile(16, 64, 4), Tile(16, 64, 8)),
        (Tile(32, 16, 4), Tile(32, 16, 4), Tile(64, 16, 8)),
        (Tile(16, 64, 8), Tile(16, 64, 8), Tile(16, 64, 8)),
        (Tile(16, 16, 4), Tile(16, 64, 8), Tile(16, 64, 8)),
    ),
    "sm_90": _table(
        (Tile(64, 32, 4), Tile(64, 32, 4), Tile(64, 16, 4)),
        (Tile(64, 32, 4), Tile(64, 32, 4), Tile(64, 16, 4)),
        (Tile(16, 64, 4), Tile(16, 64, 4), Tile(16, 32, 8)),
        (Tile(64, 16, 4), Tile(64, 16, 4), Tile(64, 16, 8)),
        (Tile(16, 64, 4), Tile(16, 64, 4), Tile(16, 32, 8)),
        (Tile(64, 16, 4),) * 3,
    ),
    "sm_100": _table(
        (Tile(32, 16, 4),) * 3,
        (Tile(32, 16, 4),) * 3,
        (Tile(16, 32, 4), Tile(16, 32, 4), Tile(16, 32, 8)),
        (Tile(32, 16, 4), Tile(32, 16, 4), Tile(32, 16, 8)),
        (Tile(16, 32, 4), Tile(16, 32, 4), Tile(16, 32, 8)),
        (Tile(32, 16, 4),) * 3,
    ),
    "gfx942": _table(
        (Tile(64, 16, 4),) * 3,
        (Tile(64, 16, 4),) * 3,
        (Tile(16, 64, 4),) * 3,
        (Tile(64, 16, 4),) * 3,
        (Tile(16, 64, 4),) * 3,
        (Tile(64, 16, 4),) * 3,
    ),
}


@cache
def _kernels() -> ModuleType:
    from mgd_kernels.backends import triton_attention_kernels

    return triton_attention_kernels


@cache
def _family(device: torch.device) -> str | None:
    """Which tiles are this device's; None where no kernel was ever compiled for it."""
    if triton.interpreted() or device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return name if name in TILES else None
    name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return name if name in TILES else None


def served(device: torch.device, width: int, depth: int) -> bool:
    """Whether there are kernels for heads of so many elements, of queries and of values."""
    return serves() and max(width, depth) <= WIDEST and _family(device) is not None


def _target() -> str:
    from triton.runtime import driver

    target: Any = driver.active.get_current_target()
    return target.arch if target.backend == "hip" else f"sm_{target.arch}"


def _how(kernel: str, x: Tensor, block: int) -> tuple[Tile, dict[str, Any]]:
    name = _family(x.device) if triton.interpreted() or x.device.type == "cuda" else _target()
    assert name is not None
    tile = TILES[name][kernel][block]
    how: dict[str, Any] = {"ROWS": tile.rows, "KEYS": tile.keys, "BLOCK": block, "CHUNK": CHUNK}
    # Three products of parts that TF32 holds, to about float32's own rounding; AMD's units multiply float32 itself.
    how["PRECISION"] = "ieee" if name.startswith("gfx") else "tf32x3"
    if not triton.interpreted():
        how |= {"num_warps": tile.warps, "num_stages": 1, "enable_fp_fusion": False}
    return tile, how


def _launch(
    kernel: str, over: Sequence[int], given: tuple, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float,
    offset: int | None, dropout: float,
) -> None:  # fmt: skip
    """over: matrices, rows and columns, of which each program has a tile. given: the kernel's first arguments."""
    (batch, heads, length, width), (_, shared, keys, depth) = q.shape, v.shape
    tile, how = _how(kernel, q, max(BLOCKS[0], 1 << (max(width, depth) - 1).bit_length()))
    steps = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, length, keys).stride()
    sizes = heads, heads // shared, length, keys, width, depth, *steps
    matrices, rows, columns = over
    programs = matrices * -(-rows // tile.rows) * -(-columns // tile.keys)
    with _on(q):
        getattr(_kernels(), kernel + "_kernel")[(programs,)](
            *given, *sizes, scale, offset or 0, dropout, CAUSAL=offset is not None, **how
        )


def _row_tiles(q: Tensor) -> Sequence[int]:
    return q.shape[0] * q.shape[1], q.shape[2], 1


def _column_tiles(k: Tensor) -> Sequence[int]:
    return k.shape[0] * k.shape[1], 1, k.shape[2]


def _mask_tiles(dm: Tensor) -> Sequence[int]:
    return dm.shape[0] * dm.shape[1], dm.shape[2], dm.shape[3]


def _ready(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.resolve_neg().contiguous() for x in tensors]


def _byte(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype is not torch.bool else mask.view(torch.uint8)


def _seen(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """`[B, K, S, 1]`: which keys some query of their heads may see, as far as the mask says. None: all."""
    if mask is None:
        return None
    rows = mask.any(2) if mask.dtype is torch.bool else mask.amax(2) != -torch.inf
    rows = rows.expand(q.shape[0], q.shape[1], k.shape[2]).view(q.shape[0], k.shape[1], -1, k.shape[2])
    return rows.any(2).unsqueeze(-1)


def _centred(k: Tensor | None, seen: Tensor | None) -> Tensor | None:
    """In float32, without the mean of the keys that are seen; the others may hold anything, and become 0."""
    if k is None:
        return None
    k = k.float()
    if seen is None:
        return (k - k.mean(2, keepdim=True)).contiguous()
    mean = k.where(seen, 0).sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1)
    return (k - mean).where(seen, 0).contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, offset: int | None, seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o, and statistics `[2, B, H, L]`: the largest score of a row, and what e^(s - largest) is multiplied with."""
    q, v = _ready(q, v)
    centred, mask = _centred(k, _seen(q, k, mask)), _byte(mask)
    o, statistics = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(2, *q.shape[:3], dtype=torch.float32)
    given = q, centred, v, mask, seed, o, *statistics
    _launch("forward", _row_tiles(q), given, q, k, v, mask, scale, offset, dropout)
    return o, statistics


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, mask_gradient: bool, o: Tensor, statistics: Tensor,
    scale: float, offset: int | None, seed: Tensor | None, dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The cotangents of q, k, v, and of the mask if it is wanted."""
    g, q, v, o, statistics = _ready(g, q, v, o, statistics)
    if mask_gradient:
        (mask,) = _ready(mask)  # laid out as its cotangent is
    centred, mask = _centred(k, _seen(q, k, mask)), _byte(mask)
    dq, dk, dv, delta = *map(_empty, (q, k, v)), _empty(statistics[0])
    rest = q, k, v, mask, scale, offset, dropout
    given = g, q, centred, v, mask, seed
    _launch("backward_rows", _row_tiles(q), (*given, o, *statistics, dq, delta), *rest)
    _launch("backward_columns", _column_tiles(k), (*given, *statistics, delta, dk, dv), *rest)
    if mask is None or not mask_gradient:
        return dq, dk, dv, q.new_empty(0)
    dm, absent = _empty(mask), (None, None, None, None)
    given = *absent, *given, *statistics, delta, None, None, dm, q.shape[0], *dm.shape
    _launch("mask_gradient", _mask_tiles(dm), given, *rest)
    return dq, dk, dv, dm


def double_backward(
    cq: Tensor | None, ck: Tensor | None, cv: Tensor | None, cm: Tensor | None, g: Tensor, q: Tensor, k: Tensor,
    v: Tensor, mask: Tensor | None, mask_gradient: bool, o: Tensor, statistics: Tensor, scale: float,
    offset: int | None, seed: Tensor | None, dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The cotangents of g, q, k, v, and of the mask if it is wanted. cq, ck, cv, cm: those of the gradients; products
    of absent ones are not made."""
    cq, cv, cm, g, q, v, o, statistics = _ready(cq, cv, cm, g, q, v, o, statistics)
    if mask_gradient or cm is not None:
        (mask,) = _ready(mask)
    seen, mask = _seen(q, k, mask), _byte(mask)
    gg, again_q, again_k, again_v = map(_empty, (g, q, k, v))
    delta, alpha, epsilon = (_empty(statistics[0]) for _ in range(3))
    rest = q, k, v, mask, scale, offset, dropout
    given = cq, _centred(ck, seen), cv, cm, g, q, _centred(k, seen), v, mask, seed
    _launch("twice_rows", _row_tiles(q), (*given, o, *statistics, delta, gg, again_q, alpha, epsilon), *rest)
    given = *given, *statistics, delta, alpha, epsilon
    _launch("twice_columns", _column_tiles(k), (*given, again_k, again_v), *rest)
    if mask is None or not mask_gradient:
        return gg, again_q, again_k, again_v, q.new_empty(0)
    dm = _empty(mask)
    _launch("mask_gradient", _mask_tiles(dm), (*given, dm, q.shape[0], *dm.shape), *rest)
    return gg, again_q, again_k, again_v, dm


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def factors(like: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Z of all matrices, in float32, with the bits that the other kernels draw. like: `[B, H, L, S]`."""
    batch, heads, length, keys = like.shape
    z = like.new_empty(like.shape, dtype=torch.float32)
    grid = -(-length // 32), -(-keys // 32), batch * heads
    with _on(like):
        _kernels().factors_kernel[grid](seed, z, length, keys, dropout, ROWS=32, KEYS=32)
    return z
