"""The same metagradients in plain torch, as one writes them without this package: what it is compared with.

unrolled: one autograd graph through every step. states: keep every training state, then go back step by step,
differentiating the whole step (its gradient included, so reverse over reverse) by autograd. sqrt: the same with
a state kept every sqrt(T) steps, the steps in between trained again (Chen et al. 2016, arXiv 1604.06174).
All three return the numbers of `TrainingFunction.metagradient` up to rounding.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from mgd import TrainingFunction
from mgd.errors import BadArgument
from mgd.step.batches import microbatches
from mgd.step.model import modes_kept
from mgd.step.rng import seed_generators, seed_of
from mgd.sweep.clipping import EPSILON as CLIP_EPSILON
from mgd_kernels import SGD, Adam, AdamW
from mgd_kernels.fused import FusedOptimizer

Found = tuple[Tensor, dict[str, Any]]  # the objective's value, and the gradient of every entry of z


class Unsupported(BadArgument):
    """The comparison is not written for this training; the message says which part of it."""


@dataclass
class State:
    """Parameters, and the optimizer's tensors in the order of its slots, one a parameter; buffers by name."""

    params: list[Tensor]
    slots: list[list[Tensor]]
    buffers: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        return [*self.params, *(tensor for slot in self.slots for tensor in slot)]

    def leaves(self) -> State:
        def fresh(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.detach().requires_grad_() for tensor in tensors]

        return State(fresh(self.params), [fresh(slot) for slot in self.slots], self.buffers)


class _Call(nn.Module):
    """`function(model, *args)` for `torch.func.functional_call`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        return function(self.model, *args)


class PlainTorch:
    """The steps and the objective of a training function, as differentiable functions of their state.

    Running statistics (BatchNorm) are carried along but not differentiated, as torch does it: right for an objective
    that does not read them.
    """

    def __init__(self, function: TrainingFunction, z: Mapping[str, Any]):
        if function.optimizer.param_groups:
            raise Unsupported("the plain torch comparison has no parameter groups")
        if "init" in z:
            raise Unsupported("the plain torch comparison does not differentiate initial parameters")
        self.function, self.optimizer, self.T = function, function.optimizer, len(function)
        self.model = copy.deepcopy(function.model)
        self.call = _Call(self.model)
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.device = next(self.model.parameters()).device
        leaves, self.spec = tree_flatten(dict(z))
        self.leaves = [torch.as_tensor(leaf).detach().clone().requires_grad_() for leaf in leaves]
        self.z = tree_unflatten(self.leaves, self.spec)
        self.seen = {key: value for key, value in self.z.items() if key not in self.optimizer.hyper_names}

    def initial(self) -> State:
        named = dict(self.model.named_parameters())
        params = [named[name].detach().clone().requires_grad_() for name in self.names]
        slots = [[torch.zeros_like(p) for p in params] for _ in self.optimizer.slots]
        return State(params, slots, {name: b.clone() for name, b in self.model.named_buffers()})

    def run(self, function: Callable[..., Tensor], state: State, buffers: dict[str, Tensor], *args: Any) -> Tensor:
        """A function of the model with these tensors; `buffers` are changed in place."""
        tensors = {f"model.{name}": p for name, p in zip(self.names, state.params, strict=True)}
        tensors |= {f"model.{name}": b for name, b in buffers.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            return torch.func.functional_call(self.call, tensors, (function, *args))

    def step(self, t: int, state: State, graph: bool) -> State:
        """The state after step `t`. graph: as a differentiable function of `state` and `z`; else detached."""
        function = self.function
        if not graph:
            state = state.leaves()
        buffers = {name: b.clone() for name, b in state.buffers.items()}
        grads: list[Tensor] = []
        for i, (batch, share) in enumerate(microbatches(function.batches[t], function.microbatches, t)):
            view = {
                key: value[function.per_example[key](batch)] if key in function.per_example else value
                for key, value in self.seen.items()
            }
            seed_generators(seed_of(function.seed, t, i), self.device)
            cast = (
                torch.autocast(self.device.type, function.autocast) if function.autocast else contextlib.nullcontext()
            )
            with cast:
                loss = share * self.run(function.loss, state, buffers, batch, view)
            found = torch.autograd.grad(loss, state.params, create_graph=graph, materialize_grads=True)
            grads = [a + b for a, b in zip(grads, found, strict=True)] if grads else list(found)
        with contextlib.nullcontext() if graph else torch.no_grad():
            if function.max_grad_norm is not None:
                norm = torch.stack([(g * g).sum() for g in grads]).sum().sqrt()
                factor = (function.max_grad_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
                grads = [g * factor for g in grads]
            hyper = {name: self._hyper(name, t) for name in self.optimizer.hyper_names}
            columns = [
                self.update(p, [slot[i] for slot in state.slots], grads[i], hyper, t + 1)
                for i, p in enumerate(state.params)
            ]
        params, *slots = ([column[i] for column in columns] for i in range(1 + len(state.slots)))
        return State(params, slots, buffers)

    def _hyper(self, name: str, t: int) -> Any:
        value = self.z.get(name)
        if value is None:
            return self.optimizer.defaults[name]
        if value.ndim > 1 or (value.ndim == 1 and len(value) != self.T):
            raise Unsupported(f"the plain torch comparison takes {name!r} of shape [] or [T]; got {list(value.shape)}")
        return value[t] if value.ndim else value

    def update(self, p: Tensor, slots: list[Tensor], g: Tensor, h: dict[str, Any], k: int) -> tuple[Tensor, ...]:
        """`(parameter, *slots)` after update number k, of one parameter tensor."""
        optimizer = self.optimizer
        if isinstance(optimizer, Adam):
            m, v = slots
            if not isinstance(optimizer, AdamW):
                g = g + h["weight_decay"] * p
            beta1, beta2 = h["beta1"], h["beta2"]
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            root = (v / (1 - beta2**k) + h["eps_root"]).sqrt()
            shrunk = (1 - h["lr"] * h["weight_decay"]) * p if isinstance(optimizer, AdamW) else p
            return shrunk - (h["lr"] / (1 - beta1**k)) * (m / (root + h["eps"])), m, v
        if isinstance(optimizer, SGD):
            decoupled = optimizer.rule.hyper[optimizer.column("weight_decay")] == "weight_decay"
            if not decoupled:
                g = g + h["weight_decay"] * p
            shrunk = (1 - h["lr"] * h["weight_decay"]) * p if decoupled else p
            if not slots:
                return (shrunk - h["lr"] * g,)
            # The clone keeps the buffer apart from the gradient, as torch.optim.SGD does.
            buffer = g.clone() if k == 1 else h["momentum"] * slots[0] + (1 - h["dampening"]) * g
            direction = g + h["momentum"] * buffer if optimizer.rule.nesterov else buffer
            return shrunk - h["lr"] * direction, buffer
        if isinstance(optimizer, FusedOptimizer):
            raise Unsupported(f"the plain torch comparison has no update rule for {type(optimizer).__name__}")
        new, left = optimizer.update(p, dict(zip(optimizer.slots, slots, strict=True)), g, h, k)  # type: ignore[attr-defined]
        return new, *(left[slot] for slot in optimizer.slots)

    def objective(self, state: State) -> Tensor:
        seed_generators(seed_of(self.function.seed, self.T), self.device)
        with modes_kept(self.model):
            if self.function.objective_mode == "eval":
                self.model.eval()
            value = self.run(self.function.objective, state, {name: b.clone() for name, b in state.buffers.items()})
        if value.ndim:
            raise Unsupported("the plain torch comparison takes one objective")
        return value

    def found(self, value: Tensor, grads: list[Tensor]) -> Found:
        return value.detach(), tree_unflatten(grads, self.spec)


def unrolled(function: TrainingFunction, z: Mapping[str, Any]) -> Found:
    """Autograd through every step of the training at once."""
    plain = PlainTorch(function, z)
    state = plain.initial()
    for t in range(plain.T):
        state = plain.step(t, state, graph=True)
    value = plain.objective(state)
    del state
    return plain.found(value, list(torch.autograd.grad(value, plain.leaves, materialize_grads=True)))


def states(function: TrainingFunction, z: Mapping[str, Any]) -> Found:
    """Every state kept, and one step differentiated at a time."""
    return _by_segments(function, z, len(function))


def sqrt(function: TrainingFunction, z: Mapping[str, Any]) -> Found:
    """A state kept every sqrt(T) steps, and the segments between them trained again, the last first."""
    return _by_segments(function, z, isqrt(max(0, len(function) - 1)) + 1)


def _by_segments(function: TrainingFunction, z: Mapping[str, Any], length: int) -> Found:
    plain = PlainTorch(function, z)
    state = plain.initial()
    kept: list[State] = []
    trajectory: list[State] = []
    for t in range(plain.T):
        if t % length == 0:
            kept.append(state)
            trajectory = []
        trajectory.append(state)
        state = plain.step(t, state, graph=False)
    state = state.leaves()
    value = plain.objective(state)
    adjoint = list(torch.autograd.grad(value, state.tensors(), materialize_grads=True))
    total = [torch.zeros_like(leaf) for leaf in plain.leaves]
    own = len(adjoint)
    for t in reversed(range(plain.T)):
        if not trajectory:  # train the segment again; its last step's result is not needed
            state = kept[-1]
            for s in range(t - length + 1, t + 1):
                trajectory.append(state)
                state = plain.step(s, state, graph=False) if s < t else state
        if t % length == 0:
            kept.pop()
        state = trajectory.pop().leaves()
        outputs = plain.step(t, state, graph=True).tensors()
        inputs = [*state.tensors(), *plain.leaves]
        grads = torch.autograd.grad(outputs, inputs, adjoint, materialize_grads=True)
        adjoint = list(grads[:own])
        total = [a + b for a, b in zip(total, grads[own:], strict=True)]
    return plain.found(value, total)


# --- training alone ----------------------------------------------------------------------------------------------


class Training:
    """Plain eager training of the same steps: torch.optim, zero_grad, backward, step. `reset` begins again."""

    def __init__(self, function: TrainingFunction, z: Mapping[str, Any]):
        self.function, self.z = function, z
        self.model = copy.deepcopy(function.model)
        self.initial = copy.deepcopy(self.model.state_dict())
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.device = self.params[0].device
        self.seen = {
            k: v.detach() if isinstance(v, Tensor) else v for k, v in z.items() if k not in self._hyper_names()
        }
        self.rates = self._rates()
        self.reset()

    def _hyper_names(self) -> set[str]:
        return {*self.function.optimizer.hyper_names, "init"}

    def _rates(self) -> list[float] | None:
        lr = self.z.get("lr")
        return lr.tolist() if isinstance(lr, Tensor) and lr.shape == (len(self.function),) else None

    def reset(self) -> None:
        self.model.load_state_dict(self.initial)
        h = self.function.optimizer.defaults
        match self.function.optimizer:
            case Adam() as adam:
                kind = torch.optim.AdamW if isinstance(adam, AdamW) else torch.optim.Adam
                betas = (h["beta1"], h["beta2"])
                self.optimizer: torch.optim.Optimizer = kind(self.params, h["lr"], betas, h["eps"], h["weight_decay"])
            case SGD() as sgd:
                self.optimizer = torch.optim.SGD(
                    self.params, h["lr"], h.get("momentum", 0), h.get("dampening", 0), h["weight_decay"],
                    sgd.rule.nesterov,
                )  # fmt: skip
            case other:
                raise Unsupported(f"torch.optim has no {type(other).__name__}")

    def __call__(self) -> None:
        function, optimizer = self.function, self.optimizer
        for t in range(len(function)):
            if self.rates is not None:
                for group in optimizer.param_groups:
                    group["lr"] = self.rates[t]
            optimizer.zero_grad()
            for i, (batch, share) in enumerate(microbatches(function.batches[t], function.microbatches, t)):
                view = {
                    k: v[function.per_example[k](batch)] if k in function.per_example else v
                    for k, v in self.seen.items()
                }
                seed_generators(seed_of(function.seed, t, i), self.device)
                cast = (
                    torch.autocast(self.device.type, function.autocast)
                    if function.autocast
                    else contextlib.nullcontext()
                )
                with cast:
                    loss = function.loss(self.model, batch, view)
                (loss if share == 1.0 else share * loss).backward()
            if function.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.params, function.max_grad_norm)
            optimizer.step()
