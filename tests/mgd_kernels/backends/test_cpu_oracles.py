"""The C++ backend against other people's optimizers, in float64, where the rules coincide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mgd_kernels.arena import Segments
from mgd_kernels.backends import cpu
from mgd_kernels.rules import ADAM, SGD_MOMENTUM, SGD_NESTEROV, SGD_PLAIN, Rule

STEPS, N = 12, 97


def gradients() -> list[Tensor]:
    random = torch.Generator().manual_seed(11)
    return [torch.randn(N, generator=random, dtype=torch.float64) for _ in range(STEPS)]


def start() -> Tensor:
    return torch.linspace(-2, 2, N, dtype=torch.float64)


def ours(rule: Rule, hyper: dict[str, float], grad_scale: float = 1.0) -> Tensor:
    params = start()
    slots = [torch.zeros_like(params) for _ in rule.slots]
    row = torch.tensor([[hyper.get(name, 0.0) for name in rule.hyper]], dtype=torch.float64)
    for k, grad in enumerate(gradients(), start=1):
        cpu.step_(rule, params, slots, grad, row, k, Segments.single(N), grad_scale)
    return params


def torchs(optimizer, **arguments) -> Tensor:
    params = start().requires_grad_()
    optimizer = optimizer([params], **arguments)
    for grad in gradients():
        params.grad = grad.clone()
        optimizer.step()
    return params.detach()


def agree(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)  # float64 rounding of a dozen steps


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.07])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0, 0, False), (0.9, 0, False), (0.8, 0.3, False), (0.7, 0, True)]
)
@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_torch_sgd(momentum, dampening, nesterov, weight_decay, maximize, implementation):
    rule = SGD_NESTEROV if nesterov else SGD_MOMENTUM if momentum else SGD_PLAIN
    flags = {"momentum": momentum, "dampening": dampening}
    theirs = torchs(
        torch.optim.SGD, lr=0.1, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize,
        **flags, **{implementation: True},
    )  # fmt: skip
    agree(ours(rule, {"lr": 0.1, "l2": weight_decay, **flags}, -1.0 if maximize else 1.0), theirs)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.07])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.6, 0.7), (0.0, 0.5)])
@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_torch_adam_and_adamw(decoupled, betas, weight_decay, maximize, implementation):
    theirs = torchs(
        torch.optim.AdamW if decoupled else torch.optim.Adam, lr=0.02, betas=betas, eps=1e-6,
        weight_decay=weight_decay, maximize=maximize, **{implementation: True},
    )  # fmt: skip
    decay = {"weight_decay" if decoupled else "l2": weight_decay}
    hyper = {"lr": 0.02, "beta1": betas[0], "beta2": betas[1], "eps": 1e-6, **decay}
    agree(ours(ADAM, hyper, -1.0 if maximize else 1.0), theirs)


@pytest.mark.parametrize("eps_root", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("weight_decay", [None, 0.07])
def test_optax_adam_and_adamw_with_eps_root(weight_decay, eps_root):
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    flags = {"b1": 0.8, "b2": 0.95, "eps": 1e-5, "eps_root": eps_root}
    with jax.enable_x64(True):
        if weight_decay is None:
            transform = optax.adam(0.02, **flags)
        else:
            transform = optax.adamw(0.02, weight_decay=weight_decay, **flags)
        params = jax.numpy.asarray(start().numpy())
        state = transform.init(params)
        for grad in gradients():
            updates, state = transform.update(jax.numpy.asarray(grad.numpy()), state, params)
            params = optax.apply_updates(params, updates)
        theirs = torch.from_numpy(np.array(params))
    assert theirs.dtype == torch.float64
    hyper = {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-5, "eps_root": eps_root}
    agree(ours(ADAM, hyper | {"weight_decay": weight_decay or 0.0}), theirs)
