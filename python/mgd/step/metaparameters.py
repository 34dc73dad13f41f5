"""Metaparameters: how each step sees `z`, and where its gradient is collected.

Reserved keys are the optimizer's hyperparameters and `init`. All other keys belong to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mgd.errors import BadMetaparameter, NonFiniteState
from mgd.ranks.ranks import Ranks
from mgd.step.metaparameter_checks import check_init, check_reserved, checked_tensors, hint, schedule, spread
from mgd.step.reads import Reads
from mgd.util.finite import all_finite
from mgd.util.text import describe
from mgd_kernels import Arena, Optimizer


class Metaparameters:
    """A checked `z` for a training of `steps` steps.

    per_example: for metaparameters that a batch only indexes, the function from a batch to its integer index tensor.
    fixed: values of hyperparameters that are not metaparameters; `z` overrides them.
    origin: the first step that is differentiated.
    hypers: float64 `[T, G, H]`, the optimizer's hyperparameter table of every step, on the CPU. resident: the same
    where the model is. tables: of that, one `[G, H]` per step. leaves: the tensors that the loss reads, in a fixed
    order (pytrees are flattened).

    Raises BadMetaparameter if `z` or `fixed` does not fit the optimizer, the model or the number of steps.
    """

    def __init__(
        self,
        z: Mapping[str, Any],
        steps: int,
        optimizer: Optimizer,
        arena: Arena,
        per_example: Mapping[str, Callable[[Any], Tensor]],
        fixed: Mapping[str, Any] | None = None,
        origin: int = 0,
    ):
        self.z = checked_tensors(z, arena.device)
        self.optimizer, self.arena, self.origin = optimizer, arena, origin
        self._given = steps, optimizer, arena, per_example, fixed
        self._before: Metaparameters | None = None
        self.per_example = {key: index for key, index in per_example.items() if key in self.z}
        check_reserved(self.z, optimizer)
        self.hyper_keys = [key for key in self.z if key in optimizer.hyper_names]
        self.loss_keys = [key for key in self.z if key not in self.hyper_keys and key != "init"]
        self.hypers = optimizer.tables(steps)
        for key, value in (fixed or {}).items():
            if key not in optimizer.hyper_names:
                raise BadMetaparameter(
                    f"expected fixed hyperparameters of {type(optimizer).__name__}, {list(optimizer.hyper_names)}; "
                    f"got {key!r}"
                )
            self.hypers[:, :, optimizer.column(key)] = schedule(optimizer, key, f"fixed[{key!r}]", value, steps)
        for key in self.hyper_keys:
            values = schedule(optimizer, key, f"z[{key!r}]", self.z[key], steps)
            self.hypers[:, :, optimizer.column(key)] = values
        self.resident = self.hypers.to(arena.device)
        self.tables = self.resident.unbind()
        if "init" in self.z:
            check_init(self.z["init"], arena)
            if origin:
                raise BadMetaparameter(
                    f"expected z without 'init': no step before {origin} is differentiated, and its gradient would be "
                    "0. Leave it out, or since"
                )
        self.leaves, self.spec = tree_flatten({key: self.z[key] for key in self.loss_keys})
        self.owner = [key for key in self.loss_keys for _ in tree_flatten(self.z[key])[0]]
        self._check_leaves()
        self.structure = str(self.spec)
        self._detached = [leaf.detach() for leaf in self.leaves]
        self.first_read: dict[str, int] = {}

    def _check_leaves(self) -> None:
        for key, leaf in zip(self.owner, self.leaves, strict=True):
            if leaf.device != self.arena.device:
                raise BadMetaparameter(
                    f"expected z[{key!r}] on {self.arena.device}, where the model is; got {leaf.device}"
                )

    def anchor(self, z: Mapping[str, Any] | None) -> None:
        """Let the steps before the first one that is differentiated see this `z`, if any, in place of the own one."""
        if z is None:
            return
        self._before = Metaparameters(z, *self._given)
        if self._before.structure != self.structure or list(self._before.z) != list(self.z):
            raise BadMetaparameter(f"expected z of the keys of its anchor, {list(self._before.z)}; got {list(self.z)}")
        for mine, others in ((self.hypers, self._before.hypers), (self.resident, self._before.resident)):
            mine[: self.origin] = others[: self.origin]

    # --- what a step sees --------------------------------------------------------------------------------------

    def at(self, batch: Any, step: int) -> BatchMetaparameters:
        """The metaparameters that the loss sees with this batch. Those in `per_example` are gathered by their index."""
        if step < self.origin and self._before is not None:
            return self._before.at(batch, step)
        slices, indices = [], []
        for key, leaf in zip(self.owner, self._detached, strict=True):
            index = None
            if key in self.per_example:
                index = self.per_example[key](batch)
                if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
                    raise BadMetaparameter(
                        f"expected per_example[{key!r}] to return an integer index tensor; got {describe(index)} "
                        f"at step {step}"
                    )
                index = index.clone()  # it is kept with residuals, and the next batch may have its memory
            try:
                slices.append(leaf if index is None else leaf[index])
            except IndexError:
                assert index is not None
                raise BadMetaparameter(
                    f"expected per_example[{key!r}] to return indices of z[{key!r}], with {len(leaf)} entries; got "
                    f"up to {int(index.max())} at step {step}. Give an entry to every example of the data"
                ) from None
            indices.append(index)
        return BatchMetaparameters(self, slices, indices, step)

    def rebuilt(self, tensors: list[Tensor]) -> dict[str, Any]:
        """The part of `z` that the loss sees, with these tensors as its leaves."""
        if len(self.leaves) == len(self.loss_keys) and all(isinstance(self.z[key], Tensor) for key in self.loss_keys):
            return dict(zip(self.loss_keys, tensors, strict=True))  # the common case, without torch's slow recursion
        return tree_unflatten(tensors, self.spec)

    def note(self, keys: Iterable[str], step: int) -> None:
        """Record that the loss reads these keys at this step, if it is differentiated."""
        for key in keys if step >= self.origin else ():
            self.first_read[key] = min(step, self.first_read.get(key, step))

    def unread(self) -> list[str]:
        """Keys that no evaluation of the loss has read."""
        return [key for key in self.loss_keys if key not in self.first_read]

    def check_all_read(self) -> None:
        """Raise BadMetaparameter if the loss never read one of its keys."""
        if unread := self.unread():
            names = self.optimizer.hyper_names
            late = f" at a step from {self.origin} on, since which steps are differentiated" if self.origin else ""
            raise BadMetaparameter(
                f"expected the loss to read every metaparameter{late}; it never read z[{unread[0]!r}]"
                f"{hint(unread[0], (*names, *self.first_read, 'init'))}. The optimizer's hyperparameters are "
                f"{list(names)}; the loss read {sorted(self.first_read)}."
            )

    def settle_reads(self, ranks: Ranks) -> None:
        """Take note of what every process's evaluations of the loss have read."""
        for reads in ranks.objects(self.first_read):
            for key, step in reads.items():
                self.note((key,), step)

    @property
    def wants_initial(self) -> bool:
        """Whether the gradient with respect to the initial parameters is asked for."""
        return "init" in self.z

    @property
    def first_step(self) -> int:
        """The step at which the first metaparameter enters. The reverse sweep ends there."""
        if self.wants_initial or self.hyper_keys:
            return self.origin
        return min(self.first_read.values(), default=self.origin)

    def reads_at(self, step: int) -> bool:
        """Whether anything other than the optimizer reads `z` at this step or earlier."""
        return self.wants_initial or min(self.first_read.values(), default=step + 1) <= step

    def tangent(self, dz: Mapping[str, Any]) -> MetaTangent:
        """A direction in the space of z. Raises BadMetaparameter unless it has keys and shapes of z."""
        dz = checked_tensors(dz, self.arena.device)
        if unknown := [key for key in dz if key not in self.z]:
            raise BadMetaparameter(f"expected a direction for some keys of z, {list(self.z)}; got {unknown[0]!r}")
        for key, direction in dz.items():
            (ours, spec), (theirs, other) = tree_flatten(self.z[key]), tree_flatten(direction)
            if spec != other or [x.shape for x in ours] != [x.shape for x in theirs]:
                raise BadMetaparameter(f"expected a direction of the shapes of z[{key!r}]; got other ones")
        hypers = torch.zeros_like(self.hypers)
        for key in self.hyper_keys:
            if key in dz:
                steps, groups = self.hypers.shape[:2]
                value = dz[key].detach().to("cpu", torch.float64)
                hypers[:, :, self.optimizer.column(key)] = spread(value, groups, steps)
        leaves: list[Tensor | None] = []
        for key in self.loss_keys:
            own = tree_flatten(self.z[key])[0]
            moved = tree_flatten(dz[key])[0] if key in dz else [None] * len(own)
            leaves += [x if x is None else x.detach().to(y) for x, y in zip(moved, own, strict=True)]
        zeros = dict(zip(self.arena.names, self.arena.slices(self.arena.zeros()), strict=True))
        return MetaTangent(self.arena.flatten(zeros | dict(dz.get("init", {}))), hypers.to(self.arena.device), leaves)


@dataclass
class MetaTangent:
    """A direction in the space of z. init: of the flat initial parameters. hypers: float64 `[T, G, H]`. leaves: of what
    the loss reads, None for what stays as it is."""

    init: Tensor
    hypers: Tensor
    leaves: list[Tensor | None]


class BatchMetaparameters:
    """The metaparameters of one evaluation: `tensors` to differentiate, `indices` to scatter their gradients back."""

    def __init__(self, owner: Metaparameters, tensors: list[Tensor], indices: list[Tensor | None], step: int):
        self.owner, self.tensors, self.indices, self.step = owner, tensors, indices, step

    @property
    def structure(self) -> str:
        """The structure of `mapping` without its tensors, as text."""
        return self.owner.structure

    def along(self, leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of tangents of all leaves, those of `tensors`."""
        pairs = zip(leaves, self.indices, strict=True)
        return [leaf if leaf is None or index is None else leaf[index] for leaf, index in pairs]

    def mapping(self, tensors: list[Tensor]) -> Mapping[str, Any]:
        """`z` as the loss sees it, with these tensors as its leaves."""
        return _Reads(self.owner.rebuilt(tensors), self.owner, self.step)


class _Reads(Mapping):
    """The `z` of the loss. It records at which steps each key is read."""

    def __init__(self, values: dict[str, Any], owner: Metaparameters, step: int):
        self._values, self._owner, self._step = values, owner, step

    def __getitem__(self, key: str) -> Any:
        try:
            value = self._values[key]
        except KeyError:
            raise BadMetaparameter(
                f"expected z[{key!r}], which the loss reads at step {self._step}; it was not given"
                f"{hint(key, self._values)}. z has {list(self._owner.z)}, of which the loss sees {list(self._values)}."
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


EXCHANGE_EVERY = 32  # steps of the reverse sweep, at most, until processes exchange gradients of what the loss reads
MOST_WAITING = 32 << 20  # bytes, about, that such terms take until then
# The objective, the step, and for each leaf the indices that it was read at, and its cotangent.
_Terms = tuple[int, int, Sequence["Tensor | None"], Sequence["Tensor | None"]]


class Gradients:
    """The gradients of k objectives with respect to `z`, accumulated over the reverse sweep.

    hyper: float64 `[k, T, G, H]`, with respect to the hyperparameter tables. leaves: `[k, ...]` for each leaf of `z`
    that the loss reads. Terms of several processes are exchanged from time to time, and added in the order in which one
    process has them: by steps from the last one on, and by microbatches likewise.
    """

    def __init__(self, meta: Metaparameters, objectives: int, ranks: Ranks):
        self.meta, self._ranks = meta, ranks
        self._waiting: list[_Terms] = []
        self._steps = 0  # since the last exchange
        steps, groups, width = meta.hypers.shape
        # A kernel's cotangents have one more column, for the gradient's scale, which is not a metaparameter.
        self.hyper = torch.zeros(objectives, steps, groups, width, dtype=torch.float64, device=meta.arena.device)
        # The same memory through numpy, on the CPU: writing a few numbers through torch takes 5 µs.
        self._hyper = self.hyper.numpy() if self.hyper.device.type == "cpu" else None
        self.leaves = [leaf.new_zeros(objectives, *leaf.shape) for leaf in meta.leaves]
        self._rows = [list(leaf.unbind()) for leaf in self.leaves]

    def add_hyper(self, objective: int, step: int, cotangents: Tensor, reads: Reads) -> None:
        """Store the cotangents `[G, H + 1]` of a step's hyperparameters, as a kernel returns them.

        Raises NonFiniteState, once they are read, where they are not finite.
        """
        if self._hyper is None:
            self.hyper[objective, step] = cotangents[:, :-1]
        else:
            self._hyper[objective, step] = cotangents.numpy()[:, :-1]

        def look(values: list[float]) -> None:
            if not math.isfinite(sum(values)):
                raise NonFiniteState(step, "the adjoint")

        reads.later(cotangents, look)

    def add(
        self, objective: int, step: int, terms: Sequence[tuple[BatchMetaparameters, Sequence[Tensor | None]]]
    ) -> None:
        """Add the cotangents of a step's metaparameters: of the own microbatches, last one first."""
        if self._ranks.size == 1:
            for slices, tangents in terms:
                self._add(objective, slices.indices, tangents)
            return
        self._waiting += [(objective, step, slices.indices, tangents) for slices, tangents in terms]
        if objective == len(self.hyper) - 1:
            self._steps += 1
            if self._steps >= self._most_waiting():
                self.settle()

    def _most_waiting(self) -> int:
        """Steps whose terms may wait for an exchange: the same number for every process."""
        keys = zip(self.meta.owner, self.leaves, strict=True)
        shared = sum(x.nbytes for key, x in keys if key not in self.meta.per_example)
        return max(1, min(EXCHANGE_EVERY, MOST_WAITING // max(1, shared)))

    def settle(self) -> None:
        """Add what waits, of all processes."""
        if self._ranks.size == 1:
            return
        # The last process has the last microbatches, which come first. Each one's own are in order already.
        found = [terms for each in reversed(self._ranks.objects(self._waiting)) for terms in each]
        for objective, _, indices, tangents in sorted(found, key=lambda terms: -terms[1]):
            self._add(objective, indices, tangents)
        self._waiting, self._steps = [], 0

    def _add(self, objective: int, indices: Sequence[Tensor | None], tangents: Sequence[Tensor | None]) -> None:
        for rows, index, tangent in zip(self._rows, indices, tangents, strict=True):
            if tangent is None:
                continue
            one = rows[objective]
            if index is None:
                one += tangent
            else:
                one.index_put_((index,), tangent if tangent.dtype == one.dtype else tangent.to(one), accumulate=True)

    def finite(self, initial_adjoints: list[Tensor]) -> bool:
        """Whether everything that `collect` would return is finite."""
        tensors = [self.hyper, *self.leaves, *(initial_adjoints if self.meta.wants_initial else ())]
        return all(map(all_finite, tensors))

    def collect(self, initial_adjoints: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Gradients with the keys of `z`, and its shapes with a first dimension `[k]` added.

        initial_adjoints: those of the initial parameters, or of shares of some, by name, for each objective.
        """
        meta = self.meta
        grads: dict[str, Any] = {}
        loss_part = tree_unflatten(self.leaves, meta.spec)
        for key, value in meta.z.items():
            if key in meta.hyper_keys:
                cotangents = self.hyper[:, :, :, meta.optimizer.column(key)]
                grads[key] = _reduce_to(cotangents, value.shape).to(value)
            elif key == "init":
                names = [name for name in value if name in initial_adjoints[0]]
                grads[key] = {n: torch.stack([each[n] for each in initial_adjoints]).to(value[n]) for n in names}
            else:
                grads[key] = loss_part[key]
        return grads


def _reduce_to(cotangents: Tensor, shape: torch.Size) -> Tensor:
    """Sum `[k, T, G]` over the steps and groups that share one entry of a hyperparameter of this shape (`schedule`)."""
    steps, groups = cotangents.shape[1:]
    if shape == (steps,):
        return cotangents.sum(2)
    if shape == ():
        return cotangents.sum((1, 2))
    if shape == (groups,):
        return cotangents.sum(1)
    return cotangents
