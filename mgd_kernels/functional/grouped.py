"""Matrix products of groups of rows, each with its own matrix, as a mixture of experts takes them.

x: `[S, K]`, its rows sorted by group. w: `[E, K, N]`. offs: `[E]`, integers, where each group ends; rows behind the
last end belong to none. With the two operators here, `y_i = x_i w_i` and `w_i = x_iᵀ y_i`, each is the derivative of
the other, so they have derivatives of any order. They serve every floating-point dtype on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from mgd_kernels.functional._library import operator


def _groups(offs: Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that are not empty, with their rows."""
    for i, (start, end) in enumerate(pairwise([0, *offs.tolist()])):
        if start < end:
            yield i, slice(start, end)


def _rows(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    y = x.new_zeros(len(x), w.shape[2])
    for i, rows in _groups(offs):
        y[rows] = x[rows] @ w[i]
    return y


def _weights(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
    w = x.new_zeros(len(offs), x.shape[1], y.shape[1])
    for i, rows in _groups(offs):
        w[i] = x[rows].T @ y[rows]
    return w


def _save(args: tuple, _: Tensor) -> tuple:
    return args


def _differentiate_rows(ctx, gy):
    if gy is None:
        return None, None, None
    x, w, offs = ctx.saved_tensors
    return grouped_rows(gy, w.transpose(1, 2), offs), grouped_weights(x, gy, offs), None


def _differentiate_weights(ctx, gw):
    if gw is None:
        return None, None, None
    x, y, offs = ctx.saved_tensors
    return grouped_rows(y, gw.transpose(1, 2), offs), grouped_rows(x, gw, offs), None


grouped_rows = operator(
    "grouped_rows(Tensor x, Tensor w, Tensor offs) -> Tensor",
    _rows,
    lambda x, w, offs: x.new_empty(x.shape[0], w.shape[2]),
    _save,
    _differentiate_rows,
)
grouped_weights = operator(
    "grouped_weights(Tensor x, Tensor y, Tensor offs) -> Tensor",
    _weights,
    lambda x, y, offs: x.new_empty(offs.shape[0], x.shape[1], y.shape[1]),
    _save,
    _differentiate_weights,
)


def grouped_mm(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """The rows `[S, N]` of `input` `[S, K]`, each times the matrix of its group in `weight` `[E, K, N]`; zeros where a
    row has none. offs: `[E]`, integers: where each group ends. One dtype, on the CPU."""
    return grouped_rows(input, weight, offs)
