"""The gate to the kernels: views whose memory says something else, tensors without memory, and overlaps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mgd_kernels.functional as F
from mgd_kernels import SGD, AdamW, Arena, RMSprop, Store, dispatch, use_backend
from mgd_kernels.errors import BadArgument
from mgd_kernels.memory import address, addresses, check_apart

N = 64


def negated(tensor: Tensor) -> Tensor:
    """Equal to `tensor`; in memory it has the other sign."""
    return torch._neg_view(-tensor)


def normal(seed: int, dtype=torch.float32) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- Views of other values ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:mgd_kernels runs on the slow reference")
def test_a_negated_gradient_counts_with_its_sign():
    optimizer, grad = AdamW(lr=0.1), normal(0)
    found, expected = optimizer.init(normal(1)), optimizer.init(normal(1))
    optimizer.step_(found, negated(grad))
    optimizer.step_(expected, grad)
    torch.testing.assert_close(found.tensors(), expected.tensors())
    assert dispatch.dot(negated(grad), grad) == dispatch.dot(grad, grad)


def test_a_negated_table_counts_with_its_sign():
    optimizer, grad = SGD(lr=0.1), normal(0)
    found, expected = optimizer.init(normal(1)), optimizer.init(normal(1))
    optimizer.step_(found, grad, negated(optimizer.table()))
    optimizer.step_(expected, grad)
    assert torch.equal(found.params, expected.params)


@pytest.mark.parametrize("place", ["slot", "adjoint", "u"])
def test_other_negated_tensors_are_refused(place):
    optimizer = AdamW()
    state, u = optimizer.init(normal(1)), torch.zeros(N)
    adjoint = state.zeros_like()
    if place == "slot":
        state.slots = (state.slots[0], negated(state.slots[1]))
    elif place == "adjoint":
        adjoint.slots = (negated(adjoint.slots[0]), adjoint.slots[1])
    else:
        u = negated(u)
    with pytest.raises(BadArgument, match="negated view"):
        optimizer.step_vjp_(state, normal(0), None, adjoint, u)


def test_negated_inputs_of_operators():
    x = normal(0).view(4, 16)
    assert torch.equal(F.layer_norm(negated(x), (16,)), F.layer_norm(x, (16,)))
    assert torch.equal(F.gelu(negated(x)), F.gelu(x))


def test_the_store_and_negated_views():
    with Store(host=1 << 20) as store:
        store.put("x", negated(normal(0)))
        assert torch.equal(store.get("x"), normal(0))
        with pytest.raises(BadArgument, match="negated"):
            store.get("x", out=negated(torch.zeros(N)))


# --- Tensors without memory -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_fake_tensors_are_refused():
    real = SGD(lr=0.1, momentum=0.9).init(torch.zeros(N))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.zeros(N)
        table = torch.zeros(1, 5, dtype=torch.float64)
    optimizer = SGD(lr=0.1, momentum=0.9)
    for state, grad, hyper in (
        (optimizer.init(fake), torch.zeros(N), optimizer.table()),
        (real, fake, optimizer.table()),
        (real, torch.zeros(N), table),
    ):
        with pytest.raises(BadArgument, match="expected a tensor with memory; got none in a FakeTensor"):
            optimizer.step_(state, grad, hyper)
    with Store(host=1 << 20) as store, pytest.raises(BadArgument, match="with memory"):
        store.put("x", fake)


def test_meta_tensors_are_refused():
    optimizer = SGD(lr=0.1)
    state = optimizer.init(torch.zeros(N))
    with pytest.raises(BadArgument, match="meta"):
        optimizer.step_(state, torch.zeros(N, device="meta"))
    with pytest.raises(BadArgument, match="meta"):
        optimizer.step_(state, torch.zeros(N), torch.zeros(1, 5, dtype=torch.float64, device="meta"))


# --- Memory that overlaps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1, N - 1])
@pytest.mark.parametrize("optimizer", [SGD(lr=0.1), AdamW(), RMSprop()], ids=["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_gradient_on_the_parameters_is_refused(backend, optimizer, shift):
    memory = torch.zeros(2 * N)
    state, grad = optimizer.init(memory[:N]), memory[shift : shift + N]
    with use_backend(backend):
        for attempt in (
            lambda: optimizer.step_(state, grad),
            lambda: optimizer.replay_(state, [torch.zeros(N), grad], [None, None]),
            lambda: optimizer.step_vjp_(state, grad, None, state.zeros_like(), u=memory[shift : shift + N]),
        ):
            with pytest.raises(BadArgument, match="apart"):
                attempt()
        optimizer.step_(state, memory[N:])  # which begins where the parameters end


def test_what_is_only_read_may_overlap():
    optimizer, grad = SGD(lr=0.1), normal(0)
    state, expected = optimizer.init(torch.zeros(N)), optimizer.init(torch.zeros(N))
    optimizer.replay_(state, [grad, grad], [None, None])
    optimizer.step_(expected, grad)
    optimizer.step_(expected, grad)
    assert torch.equal(state.params, expected.params)


@pytest.mark.parametrize(
    ("written", "read", "apart"),
    [
        ([(0, 4)], [(4, 8)], True),
        ([(0, 5)], [(4, 8)], False),
        ([(4, 8)], [(0, 12)], False),
        ([(0, 4), (3, 6)], [], False),
        ([(20, 24)], [(0, 4), (2, 6), (0, 4)], True),
        ([(4, 8)], [(0, 6), (1, 2)], False),
        ([(2, 4)], [(0, 6), (1, 2)], False),
        ([(0, 4)], [(2, 2), (0, 0)], True),  # nothing
    ],
)
def test_which_stretches_are_apart(written, read, apart):
    if apart:
        check_apart(written, read)
    else:
        with pytest.raises(BadArgument, match="apart"):
            check_apart(written, read)


def test_two_targets_of_one_read_are_apart():
    out = torch.zeros(N)
    with Store(host=1 << 20) as store:
        store.put("x", [normal(0), normal(1)])
        with pytest.raises(BadArgument, match="apart"):
            store.get("x", out=[out, out])


def test_addresses_at_once_are_those_of_each():
    x, empty = torch.ones(3), torch.ones(0)
    assert addresses([x, None, empty, x[1:], None]) == [address(x), 0, 0, address(x[1:]), 0]
    negated = torch._neg_view(x)
    for bad in (torch.ones(3, device="meta"), negated):
        with pytest.raises(BadArgument, match="expected a tensor"):
            addresses([x, None, bad])


# --- Shapes in an arena ---------------------------------------------------------------------------------------------


def test_an_arena_copies_no_other_shapes():
    arena = Arena({"a": torch.zeros(3), "b": torch.zeros(2, 2)})
    flat = arena.zeros()
    for source in ([torch.ones(1), torch.ones(2, 2)], [torch.ones(3)], {"a": torch.ones(3), "b": torch.ones(2)}):
        with pytest.raises(BadArgument, match=r"'b': \[2, 2\]"):
            arena.copy_(flat, source)
    with pytest.raises(BadArgument, match="expected tensors"):
        arena.joined([torch.ones(2), torch.ones(2, 2)])
    with pytest.raises(BadArgument, match="flat buffer"):
        arena.joined([torch.ones(3), torch.ones(2, 2)], into=torch.zeros(3))
    assert not flat.any()
