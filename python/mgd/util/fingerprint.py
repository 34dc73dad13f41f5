"""Digests that tell whether two runs compute the same thing."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from mgd_kernels.memory import as_bytes

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


def code_digest(*functions: Any) -> str:
    """A digest of what functions do, as far as their code says: not of values that they find elsewhere. Of any other
    object it covers what its class is called, and the code of `__call__`."""
    return digest(*(_code(function, set()) for function in functions))


@functools.cache
def source_digest(*packages: str) -> str:
    """A digest of the files of packages that are imported."""
    folders = [Path(str(importlib.import_module(name).__file__)).parent for name in packages]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".so"))
    return digest([(path.name, path.read_bytes()) for path in files])


def _code(value: Any, seen: set[int]) -> Any:
    if isinstance(value, CodeType):
        # A set's order is another in each process.
        consts = [sorted(map(repr, x)) if isinstance(x, frozenset) else _code(x, seen) for x in value.co_consts]
        return value.co_code, value.co_names, consts
    if isinstance(value, functools.partial):
        return _code(value.func, seen), _code(value.args, seen), _code(list(value.keywords.items()), seen)
    if isinstance(value, MethodType):
        return _code(value.__func__, seen)
    if not isinstance(value, FunctionType):
        called = inspect.getattr_static(type(value), "__call__", None)
        known = isinstance(called, FunctionType) and id(called) not in seen
        return value, _code(called, seen) if known else None
    if id(value) in seen:
        return None
    seen.add(id(value))
    cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
    inner = [_code(x, seen) for x in cells if isinstance(x, FunctionType | MethodType | functools.partial)]
    return _code(value.__code__, seen), inner


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


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
        whole = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        state.update(memoryview(as_bytes(whole).numpy().data))
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
