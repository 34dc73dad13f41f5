"""Nested values of tensors, numbers and text as a list of tensors, the first of which says how they are nested.

This is how a state of any kind becomes an entry of a store. Only data comes back: no code runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgd.errors import BadArgument


def to_tensors(value: Any) -> list[Tensor]:
    """A value of dicts, lists, tuples, tensors, numbers, text and None. Raises BadArgument for anything else."""
    tensors: list[Tensor] = []
    header = json.dumps(_plain(value, tensors))
    return [to_bytes(header), *tensors]


def from_tensors(tensors: Sequence[Tensor]) -> Any:
    """The inverse of `to_tensors`. Raises ValueError for tensors that it has not made."""
    try:
        return _nested(json.loads(from_bytes(tensors[0])), tensors[1:])
    except (IndexError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def to_bytes(text: str) -> Tensor:
    """Text as a tensor, uint8."""
    return torch.frombuffer(bytearray(text.encode("utf-8", "surrogatepass")), dtype=torch.uint8)


def from_bytes(tensor: Tensor) -> str:
    if tensor.dtype != torch.uint8:
        raise ValueError(f"expected bytes; got {tensor.dtype}")
    return tensor.numpy().tobytes().decode("utf-8", "surrogatepass")


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    """The value in JSON's types. A list stays a list; a dict with one key says what else there is."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        # Complex numbers, which a store does not take, are pairs of real ones.
        tensors.append(torch.view_as_real(value.detach().resolve_conj()) if value.is_complex() else value.detach())
        return {"complex" if value.is_complex() else "tensor": len(tensors) - 1}
    if isinstance(value, list):
        return [_plain(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(item, tensors) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, int | str) for key in value):
        return {"dict": [[key, _plain(item, tensors)] for key, item in value.items()]}
    raise BadArgument(
        f"expected a state of tensors, numbers, text, lists, tuples and dicts, which a directory can hold; got "
        f"{type(value).__name__}"
    )


def _nested(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, list):
        return [_nested(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "complex":
        return torch.view_as_complex(tensors[content])
    if kind == "tuple":
        return tuple(_nested(item, tensors) for item in content)
    if kind == "dict":
        return {key: _nested(item, tensors) for key, item in content}
    raise ValueError(f"expected a tensor, a tuple or a dict; got {kind!r}")
