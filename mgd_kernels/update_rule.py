"""Any optimizer: an update written as a torch function, differentiated by autograd.

RMSprop and Muon are written this way, as a user would write their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mgd_kernels.errors import BadArgument
from mgd_kernels.memory import check_extents_apart
from mgd_kernels.optimizer import Optimizer, OptimizerState
from mgd_kernels.rules import RANGES, check_range

Update = Callable[[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor], int], tuple[Tensor, dict[str, Tensor]]]


class UpdateRule(Optimizer):
    """An optimizer from a torch function.

    update(param, slots, grad, hyper, step) -> (param, slots): pure and differentiable in its tensors. `slots` maps
        the names of `slots` to tensors of the parameter's shape (zero before the first step), `hyper` the names of
        `defaults` to 0-d float64 tensors, and `step` counts 1, 2, ...
    elementwise: the update treats every element alike, so it is called once per parameter group on the flat buffers
        rather than once per parameter.
    compile: run the update through `torch.compile`, which fuses it and its VJP.
    """

    def __init__(
        self,
        update: Update,
        slots: Sequence[str] = (),
        defaults: Mapping[str, float] = {"lr": 1e-3},
        elementwise: bool = False,
        compile: bool = False,
        param_groups: Sequence[Mapping[str, Any]] = (),
    ):
        super().__init__(defaults, param_groups)
        self.slots = tuple(slots)
        self.update = torch.compile(update) if compile else update
        self.elementwise = elementwise

    def _pieces(self, state: OptimizerState, *buffers: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """`(group, views)` of the buffers, one entry for each call of the update."""
        arena = state.arena
        if self.elementwise:
            for start, stop, group in state.segments.rows():
                yield group, [buffer[start:stop] for buffer in buffers]
        elif arena is None and state.params.numel():
            raise BadArgument("expected init(flat, arena): an update that is not element-wise needs the shapes")
        elif arena is not None:
            groups = [state.segments.group_at(place) for place in arena.offsets]
            for group, *views in zip(groups, *(arena.slices(buffer) for buffer in buffers), strict=True):
                yield group, views

    def _call(self, param: Tensor, slots: Sequence[Tensor], grad: Tensor, hyper: Sequence[Tensor], step: int):
        new, new_slots = self.update(
            param,
            dict(zip(self.slots, slots, strict=True)),
            grad,
            dict(zip(self.defaults, hyper, strict=True)),
            step,
        )
        if set(new_slots) != set(self.slots):
            raise BadArgument(f"expected the update to return the slots {self.slots}; got {tuple(new_slots)}")
        return [new, *(new_slots[name] for name in self.slots)]

    def _step_(self, state, grad, table, grad_scale):
        check_extents_apart(state.tensors(), [grad, table])
        scaled = grad.to(state.params.dtype) * grad_scale
        for group, (g, *views) in self._pieces(state, scaled, *state.tensors()):
            new = self._call(views[0], views[1:], g, table[group].unbind(), state.next_count)
            _assign(views, new)

    def _vjp_(self, state, grad, table, adjoint, u, grad_scale, wanted):
        check_extents_apart([*adjoint.tensors(), u], [*state.tensors(), grad, table])
        out = torch.zeros(table.shape[0], self.width + 1, dtype=torch.float64, device=state.params.device)
        raw = grad.to(state.params.dtype)
        buffers = (raw, u, *state.tensors(), *adjoint.tensors())
        count = len(self.slots) + 1
        for group, (g, du, *views) in self._pieces(state, *buffers):
            with torch.enable_grad():
                leaves = [view.detach().requires_grad_() for view in (g * grad_scale, *views[:count])]
                hyper = table[group].detach().clone().requires_grad_()
                new = self._call(leaves[1], leaves[2:], leaves[0], hyper.unbind(), state.next_count)
                if not new[0].requires_grad:
                    raise BadArgument("expected an update of differentiable torch operations; got a detached parameter")
                live = [(y, a) for y, a in zip(new, views[count:], strict=True) if y.requires_grad]
                grads = torch.autograd.grad(
                    [y for y, _ in live],
                    [*leaves, hyper],
                    [a for _, a in live],
                    materialize_grads=True,
                    allow_unused=True,
                )
            ug, *new_adjoints, dh = grads
            out[group, :-1] += dh.to(out)
            out[group, -1] += (ug.double() * g.double()).sum()
            du.copy_(ug * grad_scale)  # before the adjoints change, one of which it may be
            _assign(views[count:], new_adjoints)
        return out

    def _jvp_(self, state, grad, table, tangents, grad_tangents, hyper_tangents, grad_scale, advance):
        for tangent, grad_tangent, hyper_tangent in zip(tangents, grad_tangents, hyper_tangents, strict=True):
            self._jvp_along_(state, grad, table, tangent, grad_tangent, hyper_tangent, grad_scale)
        if advance:
            self._step_(state, grad, table, grad_scale)

    def _jvp_along_(self, state, grad, table, tangent, grad_tangent, hyper_tangent, grad_scale):
        check_extents_apart(tangent.tensors(), [*state.tensors(), grad, grad_tangent, table, hyper_tangent])
        dtype, count = state.params.dtype, len(self.slots) + 1
        buffers = (grad.to(dtype) * grad_scale, grad_tangent.to(dtype), *state.tensors(), *tangent.tensors())
        for group, (g, dg, *views) in self._pieces(state, *buffers):
            with torch.enable_grad():  # the derivative of the VJP, which is linear in its cotangent
                inputs = [x.detach().requires_grad_() for x in (g, *views[:count], table[group])]
                g, param, *slots, hyper = inputs
                new = self._call(param, slots, g, hyper.unbind(), state.next_count)
                seeds = [torch.zeros_like(x).requires_grad_() for x in new]
                pulled = torch.autograd.grad(new, inputs, seeds, create_graph=True, materialize_grads=True)
                tangents = (dg, *views[count:], hyper_tangent[group])
                along = torch.stack([(x * y).sum().double() for x, y in zip(pulled, tangents, strict=True)]).sum()
                moved = torch.autograd.grad(along, seeds, materialize_grads=True, allow_unused=True)
            _assign(views[count:], moved)


def _assign(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write all values as if at once: an update may return its own inputs, say the parameters as a slot."""
    written = {target.untyped_storage().data_ptr() for target in targets}
    values = [value.clone() if value.untyped_storage().data_ptr() in written else value for value in values]
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _rmsprop(param, slots, grad, hyper, step):
    grad = grad + hyper["weight_decay"] * param
    square_avg = hyper["alpha"] * slots["square_avg"] + (1 - hyper["alpha"]) * grad * grad
    direction = grad / ((square_avg + hyper["eps_root"]).sqrt() + hyper["eps"])
    buffer = hyper["momentum"] * slots["momentum_buffer"] + direction
    return param - hyper["lr"] * buffer, {"square_avg": square_avg, "momentum_buffer": buffer}


class RMSprop(UpdateRule):
    """RMSprop as `torch.optim.RMSprop` (not centered), with `eps_root` inside the square root."""

    def __init__(
        self,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        eps_root: float = 1e-12,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        compile: bool = False,
        param_groups: Sequence[Mapping[str, Any]] = (),
    ):
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "eps_root": eps_root,
            "weight_decay": weight_decay,
            "momentum": momentum,
        }
        super().__init__(_rmsprop, ("square_avg", "momentum_buffer"), defaults, True, compile, param_groups)

    def check_range(self, name: str, values: float | Tensor, called: str = "") -> None:
        """BadArgument unless the values are finite, `alpha` in [0, 1), `eps` and `eps_root` at least 0."""
        check_range({**RANGES, "alpha": (0.0, 1.0)}, name, values, called)


# Coefficients of the quintic Newton-Schulz iteration, from Keller Jordan's Muon (2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Approximately `U V^T` for `matrix = U S V^T`, by Newton-Schulz iteration; differentiable."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / ((x * x).sum() + eps * eps).sqrt()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def _muon(param, slots, grad, hyper, step):
    buffer = hyper["momentum"] * slots["momentum_buffer"] + grad
    direction = grad + hyper["momentum"] * buffer  # Nesterov
    if param.ndim >= 2:
        matrix = direction.reshape(param.shape[0], -1)
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        direction = scale * orthogonalize(matrix).reshape(param.shape)
        lr = hyper["lr"]
    else:
        lr = hyper["vector_lr"]
    return (1 - lr * hyper["weight_decay"]) * param - lr * direction, {"momentum_buffer": buffer}


class Muon(UpdateRule):
    """Muon (Keller Jordan 2024): Nesterov momentum, orthogonalised for every matrix (a convolution's weight is one,
    `[out, rest]`). Vectors take the plain momentum step with `vector_lr`."""

    def __init__(
        self,
        lr: float = 2e-2,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        vector_lr: float = 1e-2,
        compile: bool = False,
        param_groups: Sequence[Mapping[str, Any]] = (),
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "vector_lr": vector_lr}
        super().__init__(_muon, ("momentum_buffer",), defaults, False, compile, param_groups)
