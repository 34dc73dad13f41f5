"""Optimizers as pairs of a step and its vector-Jacobian product, on flat buffers.

`SGD`, `Adam` and `AdamW` run on the fused kernels of the chosen backend; `UpdateRule` (update_rule.py) runs any update
that a user writes in torch. All four methods of `Optimizer` work in place on the caller's buffers.
"""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mgd_kernels.arena import Arena, Segments
from mgd_kernels.errors import BadArgument
from mgd_kernels.memory import without_grad

Hyper = Mapping[str, Any] | Tensor | None
# Of a hyperparameter: fixed, one per step `[T]`, or a function of the step.
Value = float | Tensor | Callable[[int], float]


@dataclass(repr=False)
class OptimizerState:
    """The training state that the optimizer owns, after `step` steps.

    params: flat `[n]`. slots: the optimizer's own tensors, each `[n]` and of the parameters' dtype. before: steps made
    earlier, which `step` does not count and the rules do (Adam's bias correction).
    """

    params: Tensor
    slots: tuple[Tensor, ...]
    step: int
    segments: Segments
    arena: Arena | None = None
    before: int = 0

    def __repr__(self) -> str:
        slots = f"{len(self.slots)} slots of as many" if self.slots else "no slots"
        return f"OptimizerState({self.params.numel():,} parameters in {self.params.dtype}, {slots}, step {self.step})"

    @property
    def next_count(self) -> int:
        """The step that comes next, as the rules count them: 1, 2, ..."""
        return self.before + self.step + 1

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.params, *self.slots)

    def clone(self) -> OptimizerState:
        return self._like([tensor.clone() for tensor in self.tensors()])

    def copy_(self, other: OptimizerState) -> None:
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)
        self.step = other.step

    def part(self, start: int, stop: int, arena: Arena | None = None) -> OptimizerState:
        """The elements `start` to `stop`, as views. arena: of the parameters that these are, where they are whole."""
        part = self._like([tensor[start:stop] for tensor in self.tensors()])
        return replace(part, segments=self.segments.part(start, stop), arena=arena)

    def zeros_like(self) -> OptimizerState:
        """A zero adjoint of this state: the same tensors, all zero."""
        return self._like([torch.zeros_like(tensor) for tensor in self.tensors()])

    def _like(self, tensors: Sequence[Tensor]) -> OptimizerState:
        return OptimizerState(tensors[0], tuple(tensors[1:]), self.step, self.segments, self.arena, self.before)


class Optimizer(ABC):
    """An update rule with its hyperparameters.

    defaults: hyperparameter name -> value: a number, a tensor `[T]` with one per step, or a function of the step, which
        counts 0, 1, ... As an attribute, the values of step 0.
    param_groups: overrides for some parameters, each a mapping with the key `params` (a name pattern such as
        `"*.bias"`, a list of them, or a predicate on the name) and hyperparameters; a parameter belongs to the first
        entry that matches (group 1, 2, ...), all others to group 0, the defaults.

    elementwise: an element's update depends on no other element, so that a flat buffer may be cut anywhere.
    """

    slots: tuple[str, ...]
    elementwise = False

    def __init__(self, defaults: Mapping[str, Value], param_groups: Sequence[Mapping[str, Any]] = ()):
        self._values = dict(defaults)
        self.param_groups = [dict(group) for group in param_groups]
        for name, value in defaults.items():
            self._checked(name, value, name)
        self.defaults = {name: self._at(name, value, 0, name) for name, value in defaults.items()}
        for i, group in enumerate(self.param_groups, 1):
            if "params" not in group:
                raise BadArgument(f"expected the key 'params' (name patterns) in every parameter group; got {group}")
            self._check_names(set(group) - {"params"})
            for name in set(group) - {"params"}:
                self._checked(name, group[name], f"{name} of parameter group {i}")

    def __repr__(self) -> str:
        def shown(value: Any) -> str:
            if isinstance(value, Tensor) and value.ndim:
                return f"<{len(value)} values>"
            return "<a function of the step>" if callable(value) else f"{float(value):g}"

        values = [f"{name}={shown(value)}" for name, value in self._values.items()]
        count = len(self.param_groups)
        groups = [f"{count} parameter group{'s' if count > 1 else ''}"] if count else []
        return f"{type(self).__name__}({', '.join(values + groups)})"

    # --- hyperparameters ---------------------------------------------------------------------------------------

    @property
    def hyper_names(self) -> tuple[str, ...]:
        """The hyperparameters that take cotangents, by the names that `hyper` and the metaparameters use."""
        return tuple(self.defaults)

    @property
    def groups(self) -> int:
        return 1 + len(self.param_groups)

    @property
    def width(self) -> int:
        """Columns of the hyperparameter table."""
        return len(self.defaults)

    def column(self, name: str) -> int:
        """The column of a hyperparameter in the table."""
        return list(self.defaults).index(name)

    def table(self, hyper: Hyper = None, step: int = 0) -> Tensor:
        """The hyperparameters of one step as float64 `[G, H]`: the optimizer's own, overridden by `hyper`.

        hyper: name -> number or tensor of shape `[]` or `[G]`; a tensor is taken to be a table already.
        """
        if isinstance(hyper, Tensor):
            return hyper
        table = torch.zeros(self.groups, self.width, dtype=torch.float64, device="cpu")
        for name, value in self._values.items():
            table[:, self.column(name)] = self._at(name, value, step, name)
        for row, group in enumerate(self.param_groups, start=1):
            for name, value in group.items():
                if name != "params":
                    table[row, self.column(name)] = self._at(name, value, step, f"{name} of parameter group {row}")
        self._check_names(set(hyper or ()))
        for name, value in (hyper or {}).items():
            values = torch.as_tensor(value, dtype=torch.float64).detach()
            if values.shape not in ((), (self.groups,)):
                raise BadArgument(f"expected {name!r} of shape [] or [{self.groups}]; got {list(values.shape)}")
            table[:, self.column(name)] = values
        return table

    def tables(self, steps: int) -> Tensor:
        """The optimizer's own hyperparameters of all steps of a training, float64 `[T, G, H]`.

        Raises BadArgument where a tensor has not one value for each step.
        """
        varying = False
        for values in (self._values, *self.param_groups):
            for name, value in values.items():
                varying |= name != "params" and not _fixed(value)
                if isinstance(value, Tensor) and value.ndim and len(value) != steps:
                    raise BadArgument(
                        f"expected {name} of shape [] or [{steps}], one per step; got {list(value.shape)}"
                    )
        if varying:
            return torch.stack([self.table(step=t) for t in range(steps)])
        return self.table().expand(steps, -1, -1).clone()

    def _at(self, name: str, value: Value, step: int, called: str) -> float:
        """The value at a step. Raises BadArgument where a function of the step leaves the range, or a tensor ends."""
        if isinstance(value, Tensor):
            if value.ndim and step >= len(value):
                raise BadArgument(f"expected {called} for step {step}; got {len(value)} values, one per step")
            return float(value[step] if value.ndim else value)
        if not callable(value):
            return float(value)
        found = value(step)
        try:
            number = float(found)
        except (TypeError, ValueError):
            raise BadArgument(f"expected a number from {called}({step}); got {type(found).__name__}") from None
        self.check_range(name, number, f"{called}({step})")
        return number

    def _checked(self, name: str, value: Any, called: str) -> None:
        """Raises BadArgument unless the value of a hyperparameter may be this one."""
        if not callable(value):
            if not isinstance(value, Real | Tensor):
                raise BadArgument(
                    f"expected {called} to be a number, a tensor [T] with one value per step, or a function of the "
                    f"step; got {type(value).__name__}"
                )
            if isinstance(value, Tensor) and (value.ndim > 1 or not value.numel() or value.is_meta):
                raise BadArgument(f"expected {called} of shape [] or [T], one per step; got {list(value.shape)}")
            self.check_range(name, value.detach() if isinstance(value, Tensor) else float(value), called)
            if name == "lr" and (least := float(torch.as_tensor(value).min())) < 0:  # a metaparameter may go there
                raise BadArgument(f"expected a rate of at least 0 for {called}; got {least}")

    def check_range(self, name: str, values: float | Tensor, called: str = "") -> None:
        """BadArgument unless the hyperparameter may have these values. called: its name in the error."""
        if torch.as_tensor(values).isnan().any():
            raise BadArgument(f"expected a number for {called or name}; got nan")

    def _check_names(self, names: set[str]) -> None:
        unknown = sorted(names - set(self.defaults))
        if unknown:
            raise BadArgument(f"expected {type(self).__name__}'s hyperparameters {list(self.defaults)}; got {unknown}")

    def group_of(self, names: Sequence[str]) -> list[int]:
        """The group of each named parameter."""

        def matches(name: str, params: str | Sequence[str] | Callable[[str], bool]) -> bool:
            if callable(params):
                return bool(params(name))
            patterns = [params] if isinstance(params, str) else params
            return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

        group_of = [
            next((i for i, group in enumerate(self.param_groups, 1) if matches(name, group["params"])), 0)
            for name in names
        ]
        for i, group in enumerate(self.param_groups, 1):
            if i not in group_of:
                raise BadArgument(
                    f"expected parameter group {i} (params={group['params']!r}) to match a name; got {list(names)}"
                )
        return group_of

    # --- the four methods --------------------------------------------------------------------------------------

    def init(self, params: Tensor, arena: Arena | None = None) -> OptimizerState:
        """The state before the first step. `params` (flat `[n]`) is taken as it is, not copied."""
        if params.ndim != 1 or not params.is_floating_point():
            raise BadArgument(f"expected a flat floating-point buffer [n]; got {params.dtype} {list(params.shape)}")
        if self.param_groups and arena is None:
            raise BadArgument("expected init(flat, arena): the arena knows the names that parameter groups match")
        if arena is None:
            segments = Segments.single(params.numel())
        else:
            segments = arena.segments(self.group_of(arena.names), self.groups)
        return OptimizerState(params, tuple(torch.zeros_like(params) for _ in self.slots), 0, segments, arena)

    @without_grad
    def step_(self, state: OptimizerState, grad: Tensor, hyper: Hyper = None, grad_scale: float | Tensor = 1.0) -> None:
        """Advance `state` by one step with the gradient `grad_scale * grad`, in place."""
        self._check(state, grad)
        self._step_(state, grad, self.table(hyper, state.step), grad_scale)
        state.step += 1

    @without_grad
    def step_vjp_(
        self,
        state: OptimizerState,
        grad: Tensor,
        hyper: Hyper,
        adjoint: OptimizerState,
        u: Tensor | None = None,
        grad_scale: float | Tensor = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The VJP of `step_`: the adjoint of the state after the step becomes that of `state`, in place.

        `state` is the state before the step and stays as it is; the step is recomputed inside. Returns the cotangent
        `u` `[n]` of `grad` (in the buffer `u` where given; with `grad_scale` held fixed) and the cotangents of the
        hyperparameters, name -> float64 `[G]`; the key `grad_scale` holds that of the scale, `[G]`.
        """
        self._check(state, grad)
        u = torch.zeros_like(state.params) if u is None else u
        out = self.vjp_table_(state, grad, self.table(hyper, state.step), adjoint, u, grad_scale)
        grads = {name: out[:, self.column(name)] for name in self.hyper_names}
        return u, {**grads, "grad_scale": out[:, -1]}

    @without_grad
    def replay_(
        self,
        state: OptimizerState,
        grads: Sequence[Tensor],
        hypers: Sequence[Hyper] | Tensor,
        grad_scales: Sequence[float | Tensor] | None = None,
    ) -> None:
        """Advance `state` by `len(grads)` logged steps in one pass over memory; bit-identical to single steps."""
        if len(hypers) != len(grads):
            raise BadArgument(f"expected one entry of hypers per step, {len(grads)}; got {len(hypers)}")
        for grad in grads:
            self._check(state, grad)
        if not grads:
            return
        tables = (
            hypers
            if isinstance(hypers, Tensor)
            else torch.stack([self.table(hyper, state.step + i) for i, hyper in enumerate(hypers)])
        )
        self._replay_(state, grads, tables, [1.0] * len(grads) if grad_scales is None else grad_scales)
        state.step += len(grads)

    @without_grad
    def step_jvp_(
        self,
        state: OptimizerState,
        grad: Tensor,
        hyper: Hyper,
        tangent: OptimizerState | Sequence[OptimizerState],
        grad_tangent: Tensor | Sequence[Tensor],
        hyper_tangent: Tensor | None = None,
        grad_scale: float | Tensor = 1.0,
        advance: bool = False,
    ) -> None:
        """The JVP of `step_`: the tangent of `state` becomes that of the state after the step, in place.

        grad_tangent: of the scaled gradient `grad_scale * grad`, `[n]`. hyper_tangent: float64 `[G, H]`, in the columns
        of `table`; None stands for zeros. For D directions at once: lists of tangents and of grad_tangents, and
        hyper_tangent `[D, G, H]`. advance: `state` makes the step too, with the bits of `step_`; otherwise it is the
        state before the step and stays as it is.
        """
        single = isinstance(tangent, OptimizerState)
        tangents = [tangent] if isinstance(tangent, OptimizerState) else list(tangent)
        grad_tangents = [grad_tangent] if isinstance(grad_tangent, Tensor) else list(grad_tangent)
        self._check(state, grad)
        if len(tangents) != len(grad_tangents):
            raise BadArgument(f"expected a grad_tangent for each of {len(tangents)} tangents; got {len(grad_tangents)}")
        for each, moved in zip(tangents, grad_tangents, strict=True):
            self._check(each, moved)
        table = self.table(hyper, state.step)
        if hyper_tangent is None:
            hyper_tangent = torch.zeros_like(table) if single else table.new_zeros(len(tangents), *table.shape)
        shape = table.shape if single else (len(tangents), *table.shape)
        if hyper_tangent.shape != shape:
            raise BadArgument(f"expected hyper_tangent {list(shape)}; got {list(hyper_tangent.shape)}")
        hyper_tangents = hyper_tangent[None] if single else hyper_tangent
        self._jvp_(state, grad, table, tangents, grad_tangents, hyper_tangents, grad_scale, advance)
        if advance:
            state.step += 1

    def _check(self, state: OptimizerState, grad: Tensor) -> None:
        if grad.shape != state.params.shape or grad.device != state.params.device:
            raise BadArgument(
                f"expected a gradient {list(state.params.shape)} on {state.params.device}; "
                f"got {list(grad.shape)} on {grad.device}"
            )

    @abstractmethod
    def _step_(self, state: OptimizerState, grad: Tensor, table: Tensor, grad_scale: float | Tensor) -> None: ...

    @without_grad
    def vjp_table_(
        self,
        state: OptimizerState,
        grad: Tensor,
        table: Tensor,
        adjoint: OptimizerState,
        u: Tensor,
        grad_scale: float | Tensor = 1.0,
        wanted: Collection[str] | None = None,
    ) -> Tensor:
        """`step_vjp_` with hyperparameters and their cotangents as tables: float64 `[G, H]` in, `[G, H + 1]` out.

        wanted: names of the hyperparameters whose cotangents are needed, which spares the sums of others: these are 0,
        or what they are. None: of all, and of `grad_scale`, in the last column.
        """
        return self._vjp_(state, grad, table, adjoint, u, grad_scale, wanted)

    @abstractmethod
    def _vjp_(
        self,
        state: OptimizerState,
        grad: Tensor,
        table: Tensor,
        adjoint: OptimizerState,
        u: Tensor,
        grad_scale: float | Tensor,
        wanted: Collection[str] | None,
    ) -> Tensor: ...

    @abstractmethod
    def _jvp_(
        self,
        state: OptimizerState,
        grad: Tensor,
        table: Tensor,
        tangents: Sequence[OptimizerState],
        grad_tangents: Sequence[Tensor],
        hyper_tangents: Tensor,
        grad_scale: float | Tensor,
        advance: bool,
    ) -> None: ...

    def _replay_(
        self, state: OptimizerState, grads: Sequence[Tensor], tables: Tensor, grad_scales: Sequence[float | Tensor]
    ) -> None:
        for i, (grad, scale) in enumerate(zip(grads, grad_scales, strict=True)):
            self._step_(replace(state, step=state.step + i), grad, tables[i], scale)


def _fixed(value: Value) -> bool:
    return not callable(value) and not (isinstance(value, Tensor) and value.ndim)
