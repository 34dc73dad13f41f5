"""Trees of tensors and plain values in one file of the safetensors format, from which no code is ever run."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import Tensor

from mgd.errors import BadData, StoreIOError
from mgd.util.files import path_of, write_file
from mgd.util.fingerprint import digest

TREE, DIGEST = "mgd", "digest"  # entries of the file's metadata: how the tree is built; of that and of all tensors


def write(path: str | os.PathLike[str], tree: Any) -> None:
    """Write a tree of dicts (with texts as keys), lists, tuples, dataclasses (read as dicts), tensors and values of
    JSON's types, as `write_file` does."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}

    def plain(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            # A copy of its own: the format has no views.
            tensors[name] = node.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": name}
        if is_dataclass(node) and not isinstance(node, type):
            node = asdict(node)
        if isinstance(node, dict):
            return {"dict": {key: plain(value, f"{name}.{key}") for key, value in node.items()}}
        if isinstance(node, list | tuple):
            return {type(node).__name__: [plain(value, f"{name}.{i}") for i, value in enumerate(node)]}
        return {"value": node}

    text = json.dumps(plain(tree, ""))
    write_file(path, save(tensors, {TREE: text, DIGEST: digest(text, *tensors.values())}))


def read(path: str | os.PathLike[str]) -> Any:
    """The tree that `write` wrote. Raises BadData for any other file, and for a damaged one."""
    from safetensors import SafetensorError, safe_open

    tensors: list[Tensor] = []

    def built(node: Any) -> Any:
        ((kind, value),) = node.items()
        if kind == "tensor":
            tensors.append(file.get_tensor(value))
            return tensors[-1]
        if kind == "dict":
            return {key: built(child) for key, child in value.items()}
        if kind in ("list", "tuple"):
            return [built(child) for child in value] if kind == "list" else tuple(built(child) for child in value)
        return value

    path = path_of(path)
    if not path.is_file():  # safetensors maps the file, which a folder or a device does not allow
        raise BadData(f"expected a file of results of mgd; got {path}, which is none")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tree = built(json.loads(metadata[TREE]))
            if digest(metadata[TREE], *tensors) != metadata[DIGEST]:
                raise ValueError("its checksum is another one")
            return tree
    except OSError as error:
        raise StoreIOError(error.errno or 0, str(path), "cannot read the file") from error
    except (SafetensorError, KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise BadData(f"expected a file of results of mgd; got {path}: {error!r}") from None
