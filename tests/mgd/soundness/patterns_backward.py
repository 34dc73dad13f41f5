"""Python state that enters the backward pass alone: reversal, `detach`, hooks.

The loss is the same whatever the state is, so that no comparison of losses sees it. Where a backward pass is scaled,
the layers after it are frozen and linear: there autograd and finite differences agree.
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from pattern import REFUSABLE, STATEFUL, Training, mean, mlp, pattern, randn, seeded, training
from patterns_operators import weighted
from torch import Tensor, nn


class Counted(nn.Module):
    """f, tanh, d, with a count of the calls in training mode. through: what happens between f and d."""

    def __init__(self, through=lambda self, h: h, frozen: bool = False) -> None:
        super().__init__()
        self.f, self.d, self.n, self.through = nn.Linear(4, 6), nn.Linear(6, 1), 0, through
        self.d.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        self.n += self.training
        return self.d(self.through(self, torch.tanh(self.f(x))))


def counted(through, loss=mean, frozen: bool = False) -> Training:
    held = randn(5, 4, g=9)

    def objective(m):  # past `through` and the hooks
        return F.linear(torch.tanh(m.f(held)), m.d.weight, m.d.bias).square().mean()

    return training(loss, seeded(Counted, through, frozen), objective=objective)


def critic(m, b, z) -> Tensor:
    """Linear in the output."""
    return weighted(m(b["x"])[:, 0], b, z)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, c):
        ctx.c = c
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return -ctx.c * g, None


def growing(n: int) -> float:
    return 2 / (1 + math.exp(-n / 5)) - 1


@pattern(STATEFUL)
def reversal_that_grows() -> Training:
    """Domain-adversarial training with its usual warm-up."""
    return counted(lambda m, h: Reverse.apply(h, growing(m.n)), critic, frozen=True)


@pattern(STATEFUL, honest=False)
def reversal_that_grows_trained_critic() -> Training:
    return counted(lambda m, h: Reverse.apply(h, growing(m.n)))


@pattern(STATEFUL)
def reversal_of_two_phases() -> Training:
    return counted(lambda m, h: Reverse.apply(h, 1.0 if m.n < 5 else -0.5), critic, frozen=True)


@pattern(STATEFUL)
def reversal_every_other_call() -> Training:
    return counted(lambda m, h: Reverse.apply(h, 1.0 if m.n % 2 else -0.5), critic, frozen=True)


@pattern(STATEFUL)
def detached_for_first_calls() -> Training:
    return counted(lambda m, h: h.detach() if m.n <= 4 else h)


@pattern(STATEFUL, honest=False)
def detached_after_first_calls() -> Training:
    return counted(lambda m, h: h if m.n <= 4 else h.detach())


@pattern(STATEFUL, honest=False)
def metaparameter_detached_for_first_steps() -> Training:
    def loss(m, b, z):
        o = m(b["x"])
        w = z["w"].detach() if m.n <= 4 else z["w"]
        return (w[b["i"]] * (o - b["y"]).square()[:, 0]).mean()

    return counted(lambda m, h: h, loss)


@pattern(STATEFUL, honest=False)
def metaparameter_that_fades_in() -> Training:
    def loss(m, b, z):
        o = m(b["x"])
        k = 0.05 * m.n
        w = k * z["w"] + (1 - k) * z["w"].detach()
        return (w[b["i"]] * (o - b["y"]).square()[:, 0]).mean()

    return counted(lambda m, h: h, loss)


@pattern(STATEFUL)
def tensor_hook_that_grows() -> Training:
    def loss(m, b, z):
        o = m(b["x"])
        k = 0.2 * m.n
        o.register_hook(lambda g: g * k)
        return weighted(o[:, 0], b, z)

    return counted(lambda m, h: h, loss, frozen=True)


@pattern(STATEFUL, honest=False)
def tensor_hook_on_hidden_that_grows() -> Training:
    def through(m, h):
        k = 0.2 * m.n
        h.register_hook(lambda g: g * k)
        return h

    return counted(through)


@pattern()
def tensor_hook() -> Training:
    """A constant one; pure."""

    def loss(m, b, z):
        o = m(b["x"])
        o.register_hook(lambda g: g * 0.3)
        return weighted(o[:, 0], b, z)

    return counted(lambda m, h: h, loss, frozen=True)


class Scaled(nn.Linear):
    """A layer whose weight is kept larger by sqrt(2): gradient descent on it moves the effective weight half as far."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.weight.data.copy_(layer.weight.detach() * 2**0.5)
        self.bias.data.copy_(layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.5**0.5, self.bias)


def halved(by_hook: bool) -> Training:
    model = mlp()
    if by_hook:
        model[0].weight.register_hook(lambda g: 0.5 * g)
    else:
        model[0] = Scaled(model[0]).double()
    return training(mean, model)


@pattern(REFUSABLE, plain=lambda: halved(False))
def parameter_hook() -> Training:
    """A hook on a parameter that halves its gradient."""
    return halved(True)


@pattern(STATEFUL)
def random_detach() -> Training:
    """By Python's generator; `d` is not trained, so the loss's dependence on h is through the branch alone."""
    random.seed(5)
    return counted(lambda m, h: h.detach() + 0 * h if random.random() < 0.5 else h, critic, frozen=True)


@pattern(STATEFUL)
def module_backward_hook_that_grows() -> Training:
    t = counted(lambda m, h: h, critic, frozen=True)
    t.model.d.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.2 * t.model.n,))
    return t
