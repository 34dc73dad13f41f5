"""Digests that tell whether two runs compute the same thing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

Identity = Mapping[str, str]  # what a run depends on: name -> digest

# Their `repr` is the same in every process.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def digest(*values: Any) -> str:
    """A digest of values, as 32 hexadecimal digits.

    It covers tensors and arrays (dtype, shape and bits), what containers hold, numbers and text. Of any other object it
    covers the type alone.
    """
    state = hashlib.blake2b(digest_size=16)
    _add(state, values)
    return state.hexdigest()


def leaf_digests(name: str, tree: Any) -> dict[str, str]:
    """The digest of every leaf of a pytree, by `name` and the leaf's path."""
    return {f"{name}{keystr(path)}": digest(leaf) for path, leaf in tree_flatten_with_path(tree)[0]}


def differing(first: Identity, second: Identity) -> list[str]:
    """The names under which two identities differ; one that only one of them has is among these."""
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]


def _add(state: Any, value: Any) -> None:
    # Every value says first what it is and how long, so that no two sequences of values have the same bytes.
    if isinstance(value, Tensor):
        state.update(repr((value.dtype, tuple(value.shape))).encode())
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        state.update(memoryview(flat.view(torch.uint8).numpy().data))
    elif isinstance(value, np.ndarray | np.generic):
        state.update(repr((value.dtype.str, value.shape)).encode())
        state.update(value.tobytes())
    elif isinstance(value, Mapping):
        state.update(f"mapping {len(value)}:".encode())
        for key, item in value.items():
            _add(state, key)
            _add(state, item)
    elif isinstance(value, list | tuple):
        state.update(f"sequence {len(value)}:".encode())
        for item in value:
            _add(state, item)
    else:
        text = repr(value) if isinstance(value, _PLAIN) else f"{type(value).__module__}.{type(value).__qualname__}"
        state.update(f"{type(value).__name__} {len(text)}:{text}".encode("utf-8", "surrogatepass"))
