"""What `z` may hold: the checks of metaparameters, made once before a training."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import MappingKey, keystr, tree_flatten_with_path, tree_unflatten

from mgd.errors import BadMetaparameter
from mgd.util.finite import all_finite
from mgd.util.text import describe
from mgd_kernels import Arena, Optimizer
from mgd_kernels.errors import BadArgument

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RESERVED = ("lr", "weight_decay", "momentum", "beta1", "beta2", "eps", "eps_root")


def checked_tensors(z: Any, device: torch.device) -> dict[str, Any]:
    """`z` with its numbers as tensors. Every leaf must be a finite, real floating-point tensor."""
    if not isinstance(z, Mapping):
        raise BadMetaparameter(f"expected z to map names to tensors; got {type(z).__name__}")
    if wrong := [key for key in z if not isinstance(key, str)]:
        raise BadMetaparameter(f"expected the keys of z to be names; got {wrong[0]!r}")
    return {key: _tensors(key, value, device) for key, value in z.items()}


def _tensors(key: str, value: Any, device: torch.device) -> Any:
    def convert(path: Any, leaf: Any) -> Tensor:
        if isinstance(leaf, float):
            return torch.tensor(leaf, dtype=torch.float64, device=device)
        if isinstance(leaf, Tensor) and _usable(leaf) and all_finite(leaf):
            return leaf.clone() if leaf.is_inference() else leaf  # autograd refuses tensors of inference mode
        name = f"z[{key!r}]{keystr(path)}"
        if not isinstance(leaf, Tensor):
            raise BadMetaparameter(f"expected {name} to be a tensor; got {describe(leaf)}")
        if not leaf.is_floating_point():
            raise BadMetaparameter(
                f"expected {name} to be floating-point, since other tensors have no gradient; got {leaf.dtype}. "
                "Convert it with .float(), or put it into the batches."
            )
        if leaf.is_meta:
            raise BadMetaparameter(
                f"expected {name} on {device}, where the model is; got {leaf.device}, without values"
            )
        if not _usable(leaf):
            raise BadMetaparameter(
                f"expected {name} to be a dense tensor in one of {', '.join(map(str, DTYPES))}; got "
                f"{type(leaf).__name__} of {leaf.dtype}, layout {leaf.layout}"
            )
        raise BadMetaparameter(f"expected finite values in {name}; it holds NaN or infinity")

    if isinstance(value, Tensor):  # the common cases, without torch's slow recursion
        return convert((), value)
    if type(value) is dict and all(isinstance(leaf, Tensor) for leaf in value.values()):
        return {name: convert((MappingKey(name),), leaf) for name, leaf in value.items()}
    paths, spec = tree_flatten_with_path(value)
    return tree_unflatten([convert(path, leaf) for path, leaf in paths], spec)


def _usable(leaf: Tensor) -> bool:
    """Whether the tensor has values, one after the other, in a dtype that torch computes with."""
    plain = leaf.layout is torch.strided and not leaf.is_nested and not leaf.is_meta
    return plain and leaf.dtype in DTYPES and not isinstance(leaf, FakeTensor)


def check_reserved(z: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Raise BadMetaparameter if `z` has a hyperparameter that the optimizer lacks."""
    names = optimizer.hyper_names
    for key in z:
        if key in RESERVED and key not in names:
            raise BadMetaparameter(
                f"expected hyperparameters among {list(names)}; {type(optimizer).__name__} has no {key!r}. "
                + ("Give SGD a momentum other than 0. " if key == "momentum" else "")
                + "Leave the key out of z, or change the optimizer."
            )


def schedule(optimizer: Optimizer, key: str, name: str, value: Any, steps: int) -> Tensor:
    """The values of the hyperparameter `key`, float64 `[T, G]` or broadcastable to it, in its range. name: for the
    error."""
    groups = optimizer.groups
    value = torch.tensor(float(value), dtype=torch.float64, device="cpu") if isinstance(value, float | int) else value
    if not isinstance(value, Tensor):
        raise BadMetaparameter(f"expected a tensor for {name}; got {type(value).__name__}")
    if value.is_meta:
        raise BadMetaparameter(f"expected {name} with values; got a meta tensor")
    value = value.detach().to("cpu", torch.float64)
    try:
        optimizer.check_range(key, value, name)
    except BadArgument as error:
        raise BadMetaparameter(str(error)) from None
    if value.shape in ((), (steps,), (groups,), (steps, groups)):
        return spread(value, groups, steps)
    raise BadMetaparameter(
        f"expected {name} of shape [] (one value), [{steps}] (one per step)"
        + (f", [{groups}] (one per parameter group) or [{steps}, {groups}]" if groups > 1 else "")
        + f"; got {list(value.shape)}. The training has {steps} steps (batches) and {groups} group(s)."
    )


def spread(value: Tensor, groups: int, steps: int) -> Tensor:
    """A value per step or group or both, broadcastable to `[T, G]`; where T = G, one dimension is taken for steps."""
    return value[:, None] if value.shape == (steps,) else value


def check_init(init: Any, arena: Arena) -> None:
    """Raise BadMetaparameter unless `init` maps trainable parameters to tensors of their shapes."""
    if not isinstance(init, Mapping):
        raise BadMetaparameter(f"expected z['init'] to map parameter names to tensors; got {type(init).__name__}")
    shapes = dict(zip(arena.names, arena.shapes, strict=True))
    for name, value in init.items():
        if name not in shapes:
            raise BadMetaparameter(
                f"expected z['init'] to name trainable parameters, {list(shapes)}; "
                f"{name!r} is not a trainable parameter{hint(name, shapes)}"
            )
        if not isinstance(value, Tensor) or value.shape != shapes[name]:
            raise BadMetaparameter(
                f"expected z['init'][{name!r}] to be a tensor of shape {list(shapes[name])}; got {describe(value)}"
            )


def hint(name: str, names: Iterable[str]) -> str:
    """The name that was probably meant, as the end of a clause; empty if none is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
