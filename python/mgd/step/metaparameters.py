"""Metaparameters: what `z` may hold, how each step sees it, and where its gradient is collected.

Reserved keys are the optimizer's hyperparameters and `init`; all other keys belong to the loss.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from mgd.errors import BadMetaparameter
from mgd_kernels import Arena, Optimizer

RESERVED = ("lr", "weight_decay", "momentum", "beta1", "beta2", "eps", "eps_root")


class Metaparameters:
    """A checked `z` for a training of `steps` steps.

    fixed: hyperparameters that are none of them, where `z` does not override them.
    hypers: float64 `[T, G, H]`, the optimizer's hyperparameter table of every step. tables: the same, by step.
    leaves: the tensors that the loss reads, in a fixed order (pytrees are flattened).
    """

    def __init__(
        self,
        z: Mapping[str, Any],
        steps: int,
        optimizer: Optimizer,
        arena: Arena,
        per_example: Mapping[str, Callable[[Any], Tensor]],
        fixed: Mapping[str, Any] | None = None,
    ):
        if not isinstance(z, Mapping):
            raise BadMetaparameter(f"expected z to map names to tensors; got {type(z).__name__}")
        if odd := [key for key in z if not isinstance(key, str)]:
            raise BadMetaparameter(f"expected the keys of z to be names; got {odd[0]!r}")
        self.z = {key: _tensors(key, value, arena.device) for key, value in z.items()}
        self.optimizer, self.arena = optimizer, arena
        self.per_example = {key: index for key, index in per_example.items() if key in self.z}
        self._check_reserved()
        self.hyper_keys = [key for key in self.z if key in optimizer.hyper_names]
        self.loss_keys = [key for key in self.z if key not in self.hyper_keys and key != "init"]
        self.hypers = optimizer.table().expand(steps, -1, -1).clone()
        for key, value in (fixed or {}).items():
            if key not in optimizer.hyper_names:
                raise BadMetaparameter(
                    f"expected fixed hyperparameters of {type(optimizer).__name__}, {list(optimizer.hyper_names)}; "
                    f"got {key!r}"
                )
            self.hypers[:, :, optimizer.column(key)] = self._schedule(f"fixed[{key!r}]", value, steps)
        for key in self.hyper_keys:
            self.hypers[:, :, optimizer.column(key)] = self._schedule(f"z[{key!r}]", self.z[key], steps)
        self.tables = self.hypers.unbind()
        if "init" in self.z:
            self._check_init(self.z["init"])
        self.leaves, self.spec = tree_flatten({key: self.z[key] for key in self.loss_keys})
        self.owner = [key for key in self.loss_keys for _ in tree_flatten(self.z[key])[0]]
        self._check_leaves()
        self.structure = str(self.spec)
        self._detached = [leaf.detach() for leaf in self.leaves]
        self.first_read: dict[str, int] = {}
        self.last_read: dict[str, int] = {}

    # --- checks ------------------------------------------------------------------------------------------------

    def _check_reserved(self) -> None:
        names = self.optimizer.hyper_names
        for key in self.z:
            if key in RESERVED and key not in names:
                raise BadMetaparameter(
                    f"{type(self.optimizer).__name__} has no hyperparameter {key!r}; it has {list(names)}. "
                    + ("Give SGD a momentum other than 0. " if key == "momentum" else "")
                    + "Leave the key out of z, or change the optimizer."
                )

    def _schedule(self, name: str, value: Any, steps: int) -> Tensor:
        """The values of one hyperparameter as `[T, G]` (or broadcastable to it)."""
        groups = self.optimizer.groups
        value = torch.tensor(float(value), dtype=torch.float64) if isinstance(value, float | int) else value
        if not isinstance(value, Tensor):
            raise BadMetaparameter(f"expected a tensor for {name}; got {type(value).__name__}")
        value = value.detach().to("cpu", torch.float64)
        if value.shape in ((), (groups,), (steps, groups)) and value.shape != (steps,):
            return value
        if value.shape == (steps,):
            return value[:, None]
        raise BadMetaparameter(
            f"expected {name} of shape [] (one value), [{steps}] (one a step)"
            + (f", [{groups}] (one a parameter group) or [{steps}, {groups}]" if groups > 1 else "")
            + f"; got {list(value.shape)}. The training has {steps} steps (batches) and {groups} group(s)."
        )

    def _check_init(self, init: Any) -> None:
        if not isinstance(init, Mapping):
            raise BadMetaparameter(f"expected z['init'] to map parameter names to tensors; got {type(init).__name__}")
        shapes = dict(zip(self.arena.names, self.arena.shapes, strict=True))
        for name, value in init.items():
            if name not in shapes:
                raise BadMetaparameter(
                    f"z['init'][{name!r}] is not a trainable parameter{_hint(name, shapes)}; they are {list(shapes)}"
                )
            if not isinstance(value, Tensor) or value.shape != shapes[name]:
                raise BadMetaparameter(
                    f"expected z['init'][{name!r}] to be a tensor of shape {list(shapes[name])}; got {_describe(value)}"
                )

    def _check_leaves(self) -> None:
        for key, leaf in zip(self.owner, self.leaves, strict=True):
            if leaf.device != self.arena.device:
                raise BadMetaparameter(
                    f"expected z[{key!r}] on {self.arena.device}, where the model is; got {leaf.device}"
                )

    # --- what a step sees --------------------------------------------------------------------------------------

    def at(self, batch: Any, step: int) -> BatchMetaparameters:
        """The metaparameters that the loss sees with this batch: all of them, or the gathered examples."""
        slices, indices = [], []
        for key, leaf in zip(self.owner, self._detached, strict=True):
            index = None
            if key in self.per_example:
                index = self.per_example[key](batch)
                if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
                    raise BadMetaparameter(
                        f"expected per_example[{key!r}] to give an integer index tensor; got {_describe(index)} "
                        f"at step {step}"
                    )
            slices.append(leaf if index is None else leaf[index])
            indices.append(index)
        return BatchMetaparameters(self, slices, indices, step)

    def rebuilt(self, tensors: list[Tensor]) -> dict[str, Any]:
        """The part of `z` that the loss sees, made of these tensors."""
        if len(self.leaves) == len(self.loss_keys) and all(isinstance(self.z[key], Tensor) for key in self.loss_keys):
            return dict(zip(self.loss_keys, tensors, strict=True))  # the common case is spared torch's recursion
        return tree_unflatten(tensors, self.spec)

    def note(self, keys: Iterable[str], step: int) -> None:
        """The loss reads these keys at this step."""
        for key in keys:
            self.first_read[key] = min(step, self.first_read.get(key, step))
            self.last_read[key] = step

    def read_at(self, step: int) -> list[str]:
        """The keys that the loss has read at this step, which is the last one it ran."""
        return [key for key, last in self.last_read.items() if last == step]

    def unread(self) -> list[str]:
        """Keys that no evaluation of the loss has read."""
        return [key for key in self.loss_keys if key not in self.first_read]

    def check_all_read(self) -> None:
        if unread := self.unread():
            names = self.optimizer.hyper_names
            raise BadMetaparameter(
                f"the loss read z[{unread[0]!r}] at no step, so it is not a metaparameter of this training"
                f"{_hint(unread[0], (*names, *self.first_read, 'init'))}. The optimizer's hyperparameters are "
                f"{list(names)}; the loss read {sorted(self.first_read)}."
            )

    @property
    def first_step(self) -> int:
        """The step at which the earliest metaparameter enters: the sweep ends there."""
        if "init" in self.z or self.hyper_keys:
            return 0
        return min(self.first_read.values(), default=0)

    def reads_at(self, step: int) -> bool:
        """Whether something beside the optimizer reads `z` at this step or before it."""
        return "init" in self.z or min(self.first_read.values(), default=step + 1) <= step


class BatchMetaparameters:
    """The metaparameters of one evaluation: `tensors` to differentiate, and how their gradients scatter back."""

    def __init__(self, owner: Metaparameters, tensors: list[Tensor], indices: list[Tensor | None], step: int):
        self.owner, self.tensors, self.indices, self.step = owner, tensors, indices, step

    @property
    def structure(self) -> str:
        """What `mapping` holds beside its tensors."""
        return self.owner.structure

    def mapping(self, tensors: list[Tensor]) -> Mapping[str, Any]:
        """`z` as the loss sees it, made of these tensors."""
        return _Reads(self.owner.rebuilt(tensors), self.owner, self.step)


class _Reads(Mapping):
    """The `z` of the loss, which notes the first step at which each key is read."""

    def __init__(self, values: dict[str, Any], owner: Metaparameters, step: int):
        self._values, self._owner, self._step = values, owner, step

    def __getitem__(self, key: str) -> Any:
        try:
            value = self._values[key]
        except KeyError:
            raise BadMetaparameter(
                f"the loss reads z[{key!r}] at step {self._step}, which was not given"
                f"{_hint(key, self._values)}; z has {list(self._owner.z)}, of which the loss sees {list(self._values)}"
            ) from None
        self._owner.note((key,), self._step)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self._values else default


class Gradients:
    """The gradients of k objectives with respect to `z`, collected over the sweep."""

    def __init__(self, meta: Metaparameters, objectives: int):
        self.meta = meta
        steps, groups, width = meta.hypers.shape
        # The last column of a kernel's cotangents belongs to the gradient's scale, which is not a metaparameter.
        self.hyper = torch.zeros(objectives, steps, groups, width, dtype=torch.float64, device=meta.arena.device)
        # Of the same memory, where it is the CPU's: to write some numbers through torch takes 5 µs.
        self._hyper = self.hyper.numpy() if self.hyper.device.type == "cpu" else None
        self.leaves = [leaf.new_zeros(objectives, *leaf.shape) for leaf in meta.leaves]

    def add_hyper(self, objective: int, step: int, cotangents: Tensor) -> bool:
        """Take down what a kernel found of a step's hyperparameters, `[G, H + 1]`. Whether it is finite."""
        if self._hyper is None:
            self.hyper[objective, step] = cotangents[:, :-1]
            return math.isfinite(float(cotangents.sum()))
        values = cotangents.numpy()
        self._hyper[objective, step] = values[:, :-1]
        return math.isfinite(values.sum())

    def add(self, objective: int, slices: BatchMetaparameters, tangents: list[Tensor | None]) -> None:
        """Add the cotangents of the slices of one evaluation."""
        for total, index, tangent in zip(self.leaves, slices.indices, tangents, strict=True):
            if tangent is None:
                continue
            one = total[objective]
            if index is None:
                one += tangent
            else:
                one.index_put_((index,), tangent if tangent.dtype == one.dtype else tangent.to(one), accumulate=True)

    def finite(self, initial_adjoints: list[Tensor]) -> bool:
        """Whether everything that `collect` would return is."""
        tensors = [self.hyper, *self.leaves, *(initial_adjoints if "init" in self.meta.z else ())]
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    def collect(self, initial_adjoints: list[Tensor]) -> dict[str, Any]:
        """Gradients with the keys and shapes of `z`, a first dimension `[k]` added.

        initial_adjoints: for each objective, the flat adjoint of the initial parameters.
        """
        meta = self.meta
        grads: dict[str, Any] = {}
        loss_part = tree_unflatten(self.leaves, meta.spec)
        for key, value in meta.z.items():
            if key in meta.hyper_keys:
                cotangents = self.hyper[:, :, :, meta.optimizer.column(key)]
                grads[key] = _reduce_to(cotangents, value.shape).to(value)
            elif key == "init":
                views = [meta.arena.views(adjoint) for adjoint in initial_adjoints]
                grads[key] = {name: torch.stack([v[name] for v in views]).to(tensor) for name, tensor in value.items()}
            else:
                grads[key] = loss_part[key]
        return grads


def _reduce_to(cotangents: Tensor, shape: torch.Size) -> Tensor:
    """Sum `[k, T, G]` over what a hyperparameter of this shape is shared by; see Metaparameters._schedule."""
    steps, groups = cotangents.shape[1:]
    if shape == (steps,):
        return cotangents.sum(2)
    if shape == ():
        return cotangents.sum((1, 2))
    if shape == (groups,):
        return cotangents.sum(1)
    return cotangents


def _tensors(key: str, value: Any, device: torch.device) -> Any:
    """The value of a key with its numbers made tensors; every leaf must be a real floating-point tensor."""

    def convert(path: Any, leaf: Any) -> Tensor:
        name = f"z[{key!r}]{keystr(path)}"
        if isinstance(leaf, float):
            return torch.tensor(leaf, dtype=torch.float64)
        if not isinstance(leaf, Tensor):
            raise BadMetaparameter(f"expected tensors; {name} is {_describe(leaf)}")
        if not leaf.is_floating_point():
            raise BadMetaparameter(
                f"expected a floating-point tensor, since only those have gradients; {name} is {leaf.dtype}. "
                "Convert it with .float(), or put it into the batches."
            )
        if leaf.is_meta:
            raise BadMetaparameter(
                f"expected {name} on {device}, where the model is; got {leaf.device}, without values"
            )
        if not bool(torch.isfinite(leaf).all()):
            raise BadMetaparameter(f"expected finite values; {name} holds NaN or infinity")
        return leaf

    paths, spec = tree_flatten_with_path(value)
    return tree_unflatten([convert(path, leaf) for path, leaf in paths], spec)


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
