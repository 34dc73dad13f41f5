"""A small training and settings of every transformation, for the tests of the drop-in for TorchOpt.

TorchOpt computes its bias corrections `1 - beta^k` in the default dtype, whatever the parameters' dtype: under float32
they are off by up to 6e-5 at beta2 = 0.999. Comparisons therefore run with float64 as the default dtype.
"""

from __future__ import annotations

import pytest
import torch

torchopt = pytest.importorskip("torchopt")

LINEAR = torchopt.schedule.linear_schedule(0.1, 0.02, 4)
SETTINGS = [
    ("adamw", {"lr": 0.1, "eps_root": 1e-6}),
    ("adamw", {"lr": 0.1, "eps_root": 1e-2, "weight_decay": 0.0, "maximize": True}),
    ("adamw", {"lr": LINEAR, "eps_root": 1e-6, "betas": (0.8, 0.95), "moment_requires_grad": True}),
    ("adam", {"lr": 0.1, "eps_root": 1e-6, "weight_decay": 0.1}),
    ("adam", {"lr": LINEAR, "eps": 1e-3, "eps_root": 1e-6}),
    ("sgd", {"lr": 0.02}),
    ("sgd", {"lr": LINEAR, "momentum": 0.9, "weight_decay": 0.1}),
    ("sgd", {"lr": 0.02, "momentum": 0.9, "dampening": 0.3}),
    ("sgd", {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    ("sgd", {"lr": 1e-4, "momentum": 0.5, "maximize": True}),
]


@pytest.fixture(autouse=True)
def float64_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def problem():
    torch.manual_seed(0)
    params = {
        "weight": torch.randn(7, 5, requires_grad=True),
        "rest": (torch.randn(5, requires_grad=True), [torch.randn((), requires_grad=True)]),
    }
    inputs, weights = torch.randn(11, 7), torch.ones(11, requires_grad=True)

    def loss(params):
        bias, (scale,) = params["rest"]
        out = torch.tanh(inputs @ params["weight"] + bias) * scale
        return (weights[:, None] * out**2).sum() + (scale - 1) ** 2

    return params, weights, loss


def grads_of(loss, params):
    leaves, spec = torchopt.pytree.tree_flatten(params)
    return torchopt.pytree.tree_unflatten(spec, torch.autograd.grad(loss(params), leaves, create_graph=True))


def unroll(transformation, steps=5):
    """The objective after an unrolled training, its gradient, and that gradient's own gradient in one direction."""
    params, weights, loss = problem()
    wanted = [*torchopt.pytree.tree_leaves(params), weights]
    state = transformation.init(params)
    for _ in range(steps):
        updates, state = transformation.update(grads_of(loss, params), state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    objective = sum((leaf**2).sum() for leaf in torchopt.pytree.tree_leaves(params))
    return objective, torch.autograd.grad(objective, wanted, create_graph=True), wanted
