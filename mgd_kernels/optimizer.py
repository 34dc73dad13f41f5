"""Optimizers as pairs of a step and its vector-Jacobian product, on flat buffers.

`SGD`, `Adam` and `AdamW` run on the fused kernels of the chosen backend; `UpdateRule` (update_rule.py) runs any update
that a user writes in torch. All four methods of `Optimizer` work in place on the caller's buffers.
"""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mgd_kernels import dispatch
from mgd_kernels.arena import Arena, Segments
from mgd_kernels.errors import BadArgument
from mgd_kernels.rules import ADAM, RANGES, SGD_MOMENTUM, SGD_NESTEROV, SGD_PLAIN, Rule, check_range

Hyper = Mapping[str, Any] | Tensor | None


@dataclass
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

    def zeros_like(self) -> OptimizerState:
        """A zero adjoint of this state: the same tensors, all zero."""
        return self._like([torch.zeros_like(tensor) for tensor in self.tensors()])

    def _like(self, tensors: Sequence[Tensor]) -> OptimizerState:
        return replace(self, params=tensors[0], slots=tuple(tensors[1:]))


class Optimizer(ABC):
    """An update rule with its hyperparameters.

    defaults: hyperparameter name -> value. param_groups: overrides for some parameters, each a mapping with the key
        `params` (a name pattern such as `"*.bias"`, a list of them, or a predicate on the name) and hyperparameters;
        a parameter belongs to the first entry that matches (group 1, 2, ...), all others to group 0, the defaults.
    """

    slots: tuple[str, ...]

    def __init__(self, defaults: Mapping[str, float], param_groups: Sequence[Mapping[str, Any]] = ()):
        self.defaults = {name: float(value) for name, value in defaults.items()}
        self.param_groups = [dict(group) for group in param_groups]
        for name, value in self.defaults.items():
            self.check_range(name, value)
        for i, group in enumerate(self.param_groups, 1):
            if "params" not in group:
                raise BadArgument(f"expected the key 'params' (name patterns) in every parameter group; got {group}")
            self._check_names(set(group) - {"params"})
            for name in set(group) - {"params"}:
                self.check_range(name, float(group[name]), f"{name} of parameter group {i}")

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

    def table(self, hyper: Hyper = None) -> Tensor:
        """The hyperparameters of one step as float64 `[G, H]`: the defaults, overridden by `hyper`.

        hyper: name -> number or tensor of shape `[]` or `[G]`; a tensor is taken to be a table already.
        """
        if isinstance(hyper, Tensor):
            return hyper
        table = torch.zeros(self.groups, self.width, dtype=torch.float64)
        for name, value in self.defaults.items():
            table[:, self.column(name)] = value
        for row, group in enumerate(self.param_groups, start=1):
            for name, value in group.items():
                if name != "params":
                    table[row, self.column(name)] = float(value)
        self._check_names(set(hyper or ()))
        for name, value in (hyper or {}).items():
            values = torch.as_tensor(value, dtype=torch.float64).detach()
            if values.shape not in ((), (self.groups,)):
                raise BadArgument(f"expected {name!r} of shape [] or [{self.groups}]; got {list(values.shape)}")
            table[:, self.column(name)] = values
        return table

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

    @torch.no_grad()
    def step_(self, state: OptimizerState, grad: Tensor, hyper: Hyper = None, grad_scale: float | Tensor = 1.0) -> None:
        """Advance `state` by one step with the gradient `grad_scale * grad`, in place."""
        self._check(state, grad)
        self._step_(state, grad, self.table(hyper), grad_scale)
        state.step += 1

    @torch.no_grad()
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
        out = self.vjp_table_(state, grad, self.table(hyper), adjoint, u, grad_scale)
        grads = {name: out[:, self.column(name)] for name in self.hyper_names}
        return u, {**grads, "grad_scale": out[:, -1]}

    @torch.no_grad()
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
        tables = hypers if isinstance(hypers, Tensor) else torch.stack([self.table(hyper) for hyper in hypers])
        self._replay_(state, grads, tables, [1.0] * len(grads) if grad_scales is None else grad_scales)
        state.step += len(grads)

    def _check(self, state: OptimizerState, grad: Tensor) -> None:
        if grad.shape != state.params.shape or grad.device != state.params.device:
            raise BadArgument(
                f"expected a gradient {list(state.params.shape)} on {state.params.device}; "
                f"got {list(grad.shape)} on {grad.device}"
            )

    @abstractmethod
    def _step_(self, state: OptimizerState, grad: Tensor, table: Tensor, grad_scale: float | Tensor) -> None: ...

    @torch.no_grad()
    def vjp_table_(
        self,
        state: OptimizerState,
        grad: Tensor,
        table: Tensor,
        adjoint: OptimizerState,
        u: Tensor,
        grad_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """`step_vjp_` with hyperparameters and their cotangents as tables: float64 `[G, H]` in, `[G, H + 1]` out."""
        return self._vjp_(state, grad, table, adjoint, u, grad_scale)

    @abstractmethod
    def _vjp_(
        self,
        state: OptimizerState,
        grad: Tensor,
        table: Tensor,
        adjoint: OptimizerState,
        u: Tensor,
        grad_scale: float | Tensor,
    ) -> Tensor: ...

    def _replay_(
        self,
        state: OptimizerState,
        grads: Sequence[Tensor],
        tables: Tensor,
        grad_scales: Sequence[float | Tensor],
    ) -> None:
        for i, (grad, scale) in enumerate(zip(grads, grad_scales, strict=True)):
            self._step_(self._at(state, state.step + i), grad, tables[i], scale)

    @staticmethod
    def _at(state: OptimizerState, step: int) -> OptimizerState:
        return replace(state, step=step)


class FusedOptimizer(Optimizer):
    """An optimizer whose rule has kernels; its columns are those of the rule."""

    rule: Rule

    def __init__(
        self,
        rule: Rule,
        defaults: Mapping[str, float],
        columns: Mapping[str, str] = {},
        param_groups: Sequence[Mapping[str, Any]] = (),
    ):
        """columns: public hyperparameter name -> name in the rule, where the two differ."""
        self.rule = rule
        self.slots = rule.slots
        self._columns = {name: rule.column(columns.get(name, name)) for name in defaults}
        super().__init__(defaults, param_groups)

    @property
    def width(self) -> int:
        return len(self.rule.hyper)

    def column(self, name: str) -> int:
        return self._columns[name]

    def check_range(self, name: str, values: float | Tensor, called: str = "") -> None:
        """BadArgument unless the values are finite, betas in [0, 1), `eps` and `eps_root` at least 0."""
        check_range(RANGES, name, values, called)

    def backend(self, params: Tensor, grad: Tensor):
        """The module that will run this optimizer's kernels on these tensors."""
        return dispatch.choose(self.rule, params, grad)

    def _step_(self, state, grad, table, grad_scale):
        self.backend(state.params, grad).step_(
            self.rule, state.params, state.slots, grad, table, state.next_count, state.segments, grad_scale
        )

    def _vjp_(self, state, grad, table, adjoint, u, grad_scale):
        return self.backend(state.params, grad).vjp_(
            self.rule,
            state.params,
            state.slots,
            grad,
            table,
            state.next_count,
            state.segments,
            adjoint.params,
            adjoint.slots,
            u,
            grad_scale,
        )

    def _replay_(self, state, grads, tables, grad_scales):
        self.backend(state.params, grads[0]).replay_(
            self.rule, state.params, state.slots, grads, tables, state.next_count, state.segments, grad_scales
        )


class SGD(FusedOptimizer):
    """SGD with momentum, dampening and Nesterov as `torch.optim.SGD`; `decoupled` applies weight decay to the
    parameters directly, as AdamW does, in place of the L2 term. With `momentum=0` the state holds no buffer."""

    def __init__(
        self,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        decoupled: bool = False,
        param_groups: Sequence[Mapping[str, Any]] = (),
    ):
        with_momentum = momentum != 0 or any(group.get("momentum", 0) for group in param_groups)
        if nesterov and not with_momentum:
            raise BadArgument("expected a momentum other than 0 with Nesterov; got 0")
        rule = (SGD_NESTEROV if nesterov else SGD_MOMENTUM) if with_momentum else SGD_PLAIN
        defaults = {"lr": lr, "weight_decay": weight_decay}
        if with_momentum:
            defaults |= {"momentum": momentum, "dampening": dampening}
        super().__init__(rule, defaults, {} if decoupled else {"weight_decay": "l2"}, param_groups)


class Adam(FusedOptimizer):
    """Adam (arXiv 1412.6980) with L2 weight decay, as `torch.optim.Adam`; `eps_root` stands inside the square root,
    as in optax, and keeps the derivative finite where the second moment vanishes."""

    _decay_column = "l2"

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_root: float = 0.0,
        weight_decay: float = 0.0,
        param_groups: Sequence[Mapping[str, Any]] = (),
    ):
        beta1, beta2 = betas
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "eps_root": eps_root,
        }
        super().__init__(ADAM, defaults, {"weight_decay": self._decay_column}, param_groups)


class AdamW(Adam):
    """Adam with decoupled weight decay (arXiv 1711.05101), as `torch.optim.AdamW`, and `eps_root`."""

    _decay_column = "weight_decay"

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_root: float = 0.0,
        weight_decay: float = 0.01,
        param_groups: Sequence[Mapping[str, Any]] = (),
    ):
        super().__init__(lr, betas, eps, eps_root, weight_decay, param_groups)
