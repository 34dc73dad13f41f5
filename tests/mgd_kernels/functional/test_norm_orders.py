"""Norms that the kernels do not serve are torch's, with derivatives of any order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mgd_kernels import functional


def standardised(x, dims):
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + 1e-5).rsqrt()


def affine(y, shape, parameters):
    return y if not parameters else y * parameters[0].view(shape) + parameters[1].view(shape)


def group(x, *parameters):
    return affine(standardised(x.reshape(4, 2, -1), 2).view(x.shape), [-1, 1], parameters)


# Ours, torch's, and the same in plain arithmetic; the shape of weight and bias.
KINDS = {
    "layer": (
        lambda x, *p: functional.layer_norm(x, (6, 5), *p), lambda x, *p: F.layer_norm(x, (6, 5), *p),
        lambda x, *p: affine(standardised(x, [1, 2]), [6, 5], p), (6, 5),
    ),
    "batch": (
        lambda x, *p: functional.batch_norm(x, None, None, *p, training=True),
        lambda x, *p: F.batch_norm(x, None, None, *p, training=True),
        lambda x, *p: affine(standardised(x, [0, 2]), [-1, 1], p), (6,),
    ),
    "group": (lambda x, *p: functional.group_norm(x, 2, *p), lambda x, *p: F.group_norm(x, 2, *p), group, (6,)),
}  # fmt: skip


def derivatives(function, inputs, order):
    inputs = [x.clone().requires_grad_() for x in inputs]
    g = torch.Generator().manual_seed(1)
    values, found = [function(*inputs)], []
    for _ in range(order):
        value = sum((torch.randn(x.shape, generator=g, dtype=x.dtype) * x.sin()).sum() for x in values)
        values = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
        found.append(values)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parameters", [True, False])
def test_three_orders_in_float64(kind, parameters):
    ours, torchs, plain, shape = KINDS[kind]
    g = torch.Generator().manual_seed(0)
    random = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    inputs = [random(4, 6, 5), *([random(*shape), random(*shape)] if parameters else [])]
    assert torch.equal(ours(*inputs), torchs(*inputs))
    for got, value in zip(derivatives(ours, inputs, 3), derivatives(plain, inputs, 3), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-10)
    for got, value in zip(derivatives(ours, inputs, 1), derivatives(torchs, inputs, 1), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_batched_cotangents(kind):
    ours = KINDS[kind][0]
    x = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    y, cotangents = ours(x), torch.randn(3, 4, 6, 5, dtype=torch.float64)
    (batched,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, retain_graph=True)
    for got, cotangent in zip(batched, cotangents, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(y, x, cotangent, retain_graph=True)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes_and_transforms_are_torchs(kind):
    ours, torchs, _, _ = KINDS[kind]
    x = torch.randn(4, 6, 5, dtype=torch.bfloat16)
    assert torch.equal(ours(x), torchs(x))
    x = x.double()
    gradient = torch.func.grad(lambda x: ours(x).sin().sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: torchs(x).sin().sum())(x))
