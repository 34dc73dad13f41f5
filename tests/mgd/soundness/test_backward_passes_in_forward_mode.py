"""Forward mode takes the derivative of a gradient from the gradient's own VJP, and says where that is another one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import mlp, supervised
from torch import nn

from mgd.errors import BadLoss, BadObjective, MetagradientError


class Reversed(torch.autograd.Function):
    """Reverses gradients, as domain-adversarial trainings do."""

    @staticmethod
    def forward(ctx, x, strength):
        ctx.save_for_backward(strength)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        (strength,) = ctx.saved_tensors
        return -strength * g, None


class Rounded(torch.autograd.Function):
    """Its backward pass is no Jacobian: it adds to the gradient what the forward pass does not show."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g + 0.1 * x.roll(1, -1) * g.sum()


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()


class Detached(Squared):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (2 * g * x).detach()


class Once(Squared):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


def through(function):
    """A loss with a function between its layers."""
    return lambda model, batch, z: F.cross_entropy(model[2:](function(model[:2](batch[0]), z)), batch[1])


def hooked(y, z):
    y.register_hook(lambda g: g * z["strength"])
    return y


STRENGTH = {"strength": torch.tensor(0.5, dtype=torch.float64)}
LOSSES = {
    "reversed": (through(lambda y, z: Reversed.apply(y, z["strength"])), STRENGTH),
    "changed by a hook": (through(hooked), STRENGTH),
    "no Jacobian": (through(lambda y, z: Rounded.apply(y)), {}),
    "detached": (through(lambda y, z: Detached.apply(y)), {}),
    "once differentiable": (through(lambda y, z: Once.apply(y)), {}),
}


@pytest.mark.filterwarnings("ignore:mgd evaluates steps by autograd")
@pytest.mark.parametrize("trace", [None, False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss(kind, trace):
    loss, z = LOSSES[kind]
    case = supervised(mlp(), (5,), steps=3).but(z, loss=loss)
    with pytest.raises(MetagradientError, match=r"forward mode expects|differentiate twice"):
        case.function(trace=trace).jvp(case.z, case.z)


@pytest.mark.parametrize("function", [Detached, Once])
def test_an_objective_of_several_outputs(function):
    case = supervised(mlp(), (5,), steps=3)
    x = torch.randn(4, 5, dtype=torch.float64)
    f = case.but(objective=lambda model: function.apply(model(x)).sum(1)).function()
    with pytest.raises((BadLoss, BadObjective), match="forward mode expects"):
        f.jvp(case.z, case.z)
    one = case.but(objective=lambda model: function.apply(model(x)).sum()).function()
    found, grads = one.jvp(case.z, case.z), one.metagradient(case.z).grads
    torch.testing.assert_close(found.tangent, (grads["lr"] * case.z["lr"]).sum(), rtol=1e-9, atol=1e-13)


class Averaging(nn.Module):
    """A buffer that follows the activations, through a backward pass without a derivative."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("mean", torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        y = self.body(x)
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * Detached.apply(y).mean(0)
        return y * self.mean


def test_a_buffer():
    case = supervised(Averaging(), (5,), steps=3)
    with pytest.raises(BadLoss, match="forward mode expects"):
        case.function(trace=False).jvp(case.z, case.z)
