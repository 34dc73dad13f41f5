"""TorchOpt and higher: libraries that differentiate a training by one autograd graph through all of its steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_unflatten

from mgd.bench.baselines import PlainTorch, State, Unsupported
from mgd.bench.cases import Case
from mgd.bench.methods import Outcome
from mgd_kernels import SGD, AdamW


def library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unsupported(f"{name} cannot be imported ({error})") from error


class _Plain(PlainTorch):
    """Refuses what the libraries' loops below have not."""

    def __init__(self, case: Case):
        super().__init__(case.function, case.z)
        if case.function.microbatches > 1 or case.function.max_grad_norm is not None or case.function.autocast:
            raise Unsupported("the comparison has no microbatches, clipping or autocast")

    def view(self, batch: Any) -> dict[str, Any]:
        """What the loss sees of z."""
        per_example = self.function.per_example
        return {
            key: value[per_example[key](batch)] if key in per_example else value for key, value in self.seen.items()
        }


def torchopt(case: Case) -> Callable[[], Outcome]:
    """Its functional optimizers. Their weight decay is a number, which has no gradient."""
    package, optimizer, defaults = library("torchopt"), case.function.optimizer, case.function.optimizer.defaults

    def run() -> Outcome:
        plain = _Plain(case)
        rates, decay = plain.z["lr"], float(case.z.get("weight_decay", defaults["weight_decay"]))
        schedule = (lambda count: rates[int(count)]) if rates.ndim else (lambda count: rates)
        if isinstance(optimizer, AdamW):
            betas = defaults["beta1"], defaults["beta2"]
            inner = package.adamw(schedule, betas, defaults["eps"], decay, eps_root=defaults["eps_root"])
        elif isinstance(optimizer, SGD) and optimizer.slots:
            inner = package.sgd(schedule, defaults["momentum"], defaults["dampening"], decay, optimizer.rule.nesterov)
        else:
            raise Unsupported(f"the comparison with TorchOpt has no {type(optimizer).__name__} of this kind")
        first = plain.initial()
        params, kept = tuple(first.params), inner.init(tuple(first.params))
        for t in range(plain.T):
            batch = case.function.batches[t]
            state = State(list(params), [], {})
            loss = plain.run(case.function.loss, state, first.buffers, batch, plain.view(batch))
            grads = torch.autograd.grad(loss, params, create_graph=True)
            updates, kept = inner.update(grads, kept, params=params, inplace=False)
            params = package.apply_updates(params, updates, inplace=False)
        value = plain.objective(State(list(params), [], first.buffers))
        wanted = {key: leaf for key, leaf in plain.z.items() if key != "weight_decay"}
        grads = torch.autograd.grad(value, list(wanted.values()))
        return Outcome(value.detach(), dict(zip(wanted, grads, strict=True)))

    return run


def higher(case: Case) -> Callable[[], Outcome]:
    """Its patched modules, with an AdamW registered with it: it brings none, and its Adam has no eps_root."""
    package, optimizer = library("higher"), case.function.optimizer
    defaults = optimizer.defaults

    def run() -> Outcome:
        plain = _Plain(case)
        base: torch.optim.Optimizer
        if isinstance(optimizer, AdamW):
            package.register_optim(torch.optim.AdamW, _adamw(package, plain))
            base = torch.optim.AdamW(plain.model.parameters(), defaults["lr"])
        elif isinstance(optimizer, SGD):
            base = torch.optim.SGD(
                plain.model.parameters(), defaults["lr"], defaults.get("momentum", 0), 0.0, defaults["weight_decay"]
            )
        else:
            raise Unsupported(f"the comparison with higher has no {type(optimizer).__name__}")
        with (
            sdpa_kernel(SDPBackend.MATH),
            package.innerloop_ctx(plain.model, base, copy_initial_weights=True) as (model, inner),
        ):
            for t in range(plain.T):
                batch = case.function.batches[t]
                hyper = {name: [plain._hyper(name, t)] for name in ("lr", "weight_decay") if name in plain.z}
                inner.step(case.function.loss(model, batch, plain.view(batch)), override=hyper)
            value = case.function.objective(model)
            grads: list[Tensor] = list(torch.autograd.grad(value, plain.leaves, materialize_grads=True))
        return Outcome(value.detach(), tree_unflatten(grads, plain.spec))

    return run


def _adamw(package: ModuleType, plain: PlainTorch) -> type:
    class Differentiable(package.optim.DifferentiableOptimizer):  # type: ignore[name-defined, misc]
        def _update(self, grouped_grads: Any, **_: Any) -> None:
            for number, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
                for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                    if g is None:
                        continue
                    state = self.state[number][i]
                    slots = state.get("slots") or [torch.zeros_like(p), torch.zeros_like(p)]
                    hyper = plain.optimizer.defaults | {"lr": group["lr"], "weight_decay": group["weight_decay"]}
                    state["step"] = state.get("step", 0) + 1
                    group["params"][i], *state["slots"] = plain.update(p, slots, g, hyper, state["step"])

    return Differentiable
