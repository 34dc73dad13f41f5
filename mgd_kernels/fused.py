"""The optimizers that run on fused kernels: SGD, Adam and AdamW."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mgd_kernels import dispatch
from mgd_kernels.errors import BadArgument
from mgd_kernels.optimizer import Optimizer, OptimizerState, Value
from mgd_kernels.rules import ADAM, RANGES, SGD_MOMENTUM, SGD_NESTEROV, SGD_PLAIN, Rule, check_range


class FusedOptimizer(Optimizer):
    """An optimizer whose rule has kernels; its columns are those of the rule."""

    rule: Rule
    elementwise = True

    def __init__(
        self,
        rule: Rule,
        defaults: Mapping[str, Value],
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
        backend = self.backend(state.params, grad)
        given = self.rule, state.params, state.slots, grad, table, state.next_count, state.segments, grad_scale
        if not getattr(backend, "WRITES_COPY", False):
            return backend.step_(*given)
        with _copied(state) as copy:
            backend.step_(*given, **copy)

    def _vjp_(self, state, grad, table, adjoint, u, grad_scale, wanted):
        backend = self.backend(state.params, grad)
        options = {}
        if wanted is not None and getattr(backend, "CHOOSES_SUMS", False):
            options["wanted"] = self.rule.wanted([self.column(name) for name in wanted])
        return backend.vjp_(
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
            **options,
        )

    def _jvp_(self, state, grad, table, tangents, grad_tangents, hyper_tangents, grad_scale, advance):
        self.backend(state.params, grad).jvp_(
            self.rule,
            state.params,
            state.slots,
            grad,
            table,
            state.next_count,
            state.segments,
            [tangent.tensors() for tangent in tangents],
            [moved.to(state.params.dtype) for moved in grad_tangents],
            hyper_tangents,
            grad_scale,
            advance,
        )

    def _replay_(self, state, grads, tables, grad_scales):
        backend = self.backend(state.params, grads[0])
        given = self.rule, state.params, state.slots, grads, tables, state.next_count, state.segments, grad_scales
        if not getattr(backend, "WRITES_COPY", False):
            return backend.replay_(*given)
        with _copied(state) as copy:
            backend.replay_(*given, **copy)


@contextlib.contextmanager
def _copied(state: OptimizerState) -> Iterator[dict[str, Tensor]]:
    """In the block, arguments by which a backend writes the copy of the parameters, too, that the arena keeps."""
    kept = state.arena.kept(state.params) if state.arena else None
    if kept is None or kept.copy.dtype.itemsize != 2:
        yield {}
        return
    kept.version = -1  # of no buffer, while it is written
    yield {"low": kept.copy}
    kept.version = state.params._version


class SGD(FusedOptimizer):
    """SGD with momentum, dampening and Nesterov as `torch.optim.SGD`; `decoupled` applies weight decay to the
    parameters directly, as AdamW does, in place of the L2 term. With `momentum=0` the state holds no buffer."""

    def __init__(
        self,
        lr: Value,
        momentum: Value = 0.0,
        dampening: Value = 0.0,
        weight_decay: Value = 0.0,
        nesterov: bool = False,
        decoupled: bool = False,
        param_groups: Sequence[Mapping[str, Any]] = (),
    ):
        with_momentum = any(
            callable(m) or torch.as_tensor(m).any() for m in (momentum, *(g.get("momentum", 0) for g in param_groups))
        )
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
        lr: Value = 1e-3,
        betas: tuple[Value, Value] = (0.9, 0.999),
        eps: Value = 1e-8,
        eps_root: Value = 0.0,
        weight_decay: Value = 0.0,
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
        lr: Value = 1e-3,
        betas: tuple[Value, Value] = (0.9, 0.999),
        eps: Value = 1e-8,
        eps_root: Value = 0.0,
        weight_decay: Value = 0.01,
        param_groups: Sequence[Mapping[str, Any]] = (),
    ):
        super().__init__(lr, betas, eps, eps_root, weight_decay, param_groups)
