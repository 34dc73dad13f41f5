"""Digests that tell whether two runs compute the same thing."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path


def digest(*values: Any) -> str:
    """A digest of tensors (dtype, shape and bits) and other values (their `repr`), as 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    for value in values:
        if isinstance(value, Tensor):
            state.update(repr((value.dtype, tuple(value.shape))).encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            state.update(memoryview(flat.view(torch.uint8).numpy().data))
        else:
            state.update(repr(value).encode())
    return state.hexdigest()


def leaf_digests(name: str, tree: Any) -> dict[str, str]:
    """The digest of every leaf of a pytree, by `name` and the leaf's path."""
    return {f"{name}{keystr(path)}": digest(leaf) for path, leaf in tree_flatten_with_path(tree)[0]}
