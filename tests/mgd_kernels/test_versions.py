"""Autograd hears of what the kernels write: a graph that saved a tensor before refuses to use it afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgd_kernels import SGD, AdamW, OptimizerState, RMSprop, Store, use_backend

N = 32
OPTIMIZERS = {"sgd": SGD(lr=0.1, momentum=0.9), "adamw": AdamW(), "rmsprop": RMSprop()}


def versions(*tensors: Tensor) -> list[int]:
    return [tensor._version for tensor in tensors]


@pytest.fixture(params=[(name, backend) for name in OPTIMIZERS for backend in ("cpu", "reference")], ids="-".join)
def optimizer(request):
    name, backend = request.param
    with use_backend(backend):
        yield OPTIMIZERS[name]


def new_state(optimizer) -> OptimizerState:
    return optimizer.init(torch.ones(N))


def test_a_step_between_forward_and_backward_raises(optimizer):
    state = new_state(optimizer)
    weights = state.params[: N // 2].requires_grad_()  # a view, as a model's parameters are
    loss = weights.square().sum()
    optimizer.step_(state, torch.ones(N))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_tensor_that_is_written_has_a_new_version(optimizer):
    state, u, grad = new_state(optimizer), torch.zeros(N), torch.ones(N)
    adjoint = state.zeros_like()
    before = versions(*state.tensors())
    optimizer.replay_(state, [grad, grad], [None, None])
    assert all(a > b for a, b in zip(versions(*state.tensors()), before, strict=True))
    written, read = (*adjoint.tensors(), u), (*state.tensors(), grad)
    before, before_read = versions(*written), versions(*read)
    optimizer.step_vjp_(state, grad, None, adjoint, u)
    assert all(a > b for a, b in zip(versions(*written), before, strict=True))
    assert versions(*read) == before_read


def test_tensors_of_inference_mode_are_written(optimizer):
    with torch.inference_mode():
        state = new_state(optimizer)
        optimizer.step_(state, torch.ones(N))
    assert state.params.is_inference() and (state.params < 1).all()


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_read_of_the_store_raises_in_backward(tmp_path, tier):
    out = torch.ones(N)
    with Store(host=1 << 20, disk=(tmp_path, 1 << 20), staging=1 << 19) as store:
        store.put("x", torch.zeros(N), tier=tier)
        loss = (out * torch.ones(N, requires_grad=True)).sum()
        store.get("x", out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
