"""A loss or an objective that writes to what it is given past autograd's count of versions, as through `.data`."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from cases import cross_entropy
from refusals import base, refused

from mgd import errors
from mgd.step.overrides import FunctionOverrides


def clip(parameter):
    parameter.data.clamp_(-0.1, 0.1)


def assign(parameter):
    parameter.data = parameter.data.clamp(-0.1, 0.1)


def through_numpy(parameter):
    memory = parameter.detach().numpy()
    np.clip(memory, -0.1, 0.1, out=memory)


def through_storage(parameter):
    torch.empty(0, dtype=parameter.dtype).set_(parameter.untyped_storage()).clamp_(-0.1, 0.1)


def clipped(write, model, batch, z):
    for parameter in model.parameters():
        write(parameter)
    return cross_entropy(model, batch, z)


@pytest.mark.parametrize("write", [clip, assign, through_numpy, through_storage])
def test_parameters(write):
    """Clipping is idempotent, so that every evaluation repeats itself: nothing else would see it."""
    loss = lambda model, batch, z: clipped(write, model, batch, z)
    refused(errors.ParametersModified, "changed parameters in place", step=0, loss=loss, trace=False, schedule="all")


@pytest.mark.parametrize("write", [clip, assign])
def test_parameters_of_a_captured_step(write):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "mgd evaluates steps by autograd that it cannot capture")
        refused(
            errors.ParametersModified,
            step=0,
            loss=lambda model, batch, z: clipped(write, model, batch, z),
            trace=True,
        )


def test_frozen_parameters_and_metaparameters():
    case = base(trace=False)
    case.model[0].weight.requires_grad_(False)

    def loss(model, batch, z):
        clip(model[0].weight)
        return cross_entropy(model, batch, z)

    refused(errors.ParametersModified, "do not require a gradient", step=0, case=case, loss=loss)

    def of_z(model, batch, z):
        z["scale"].data.clamp_(0.9, 1.1)
        return cross_entropy(model, batch, z) * z["scale"]

    z = {"scale": torch.tensor(2.0, dtype=torch.float64)}
    refused(errors.ParametersModified, "metaparameters", step=0, case=base(trace=False), loss=of_z, z=z)


def test_an_objective():
    def objective(model):
        clip(model[0].weight)
        return model[0].weight.square().sum()

    refused(errors.BadObjective, "in place", objective=objective, trace=False)


def test_reading_is_allowed():
    """And costs a copy of what is read alone."""

    def loss(model, batch, z):
        largest = max(float(parameter.data.abs().max()) for parameter in model.parameters())
        assert largest > 0 and model[0].weight.detach().numpy().any()
        return cross_entropy(model, batch, z)

    case = base(trace=False)
    assert torch.equal(case.but(loss=loss).metagradient().value, case.but(loss=cross_entropy).metagradient().value)
    with FunctionOverrides() as overrides:
        overrides.in_loss = True
        (torch.ones(3) * 2).sum()
    assert not overrides.opened
