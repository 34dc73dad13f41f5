"""`since`: only the last steps are differentiated: the training that continues where the others ended, bit by bit."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import adamw, convnet, initial, mlp, relative_error, supervised, weighted, weights
from same_bits import same

import mgd
from mgd.errors import BadArgument, BadMetaparameter
from mgd.plan.actions import Advance, Reverse, Save
from mgd_kernels import SGD

T, K = 9, 4


def case(model=None, shape=(5,), optimizer=None, **options):
    found = supervised(model or mlp(dropout=0.2), shape, steps=T, optimizer=optimizer or adamw(), **options)
    return found.but({"data_weights": weights()}, loss=weighted)


def in_two_parts(case, **options):
    """The last K steps as a training of their own, and its metagradient."""
    z, first, last = case.z, slice(0, T - K), slice(T - K, T)
    before = case.but(batches=case.batches[first], z={"lr": z["lr"][first]}).function(optimizer_state={}, **options)
    end = before.train({**z, "lr": z["lr"][first]})
    model = copy.deepcopy(case.model)
    model.load_state_dict(end.model_state)
    after = case.but(model=model, batches=case.batches[last], z={"lr": z["lr"][last]})
    return after, after.metagradient(optimizer_state=end.optimizer_state, **options)


@pytest.mark.parametrize("options", [{"trace": False}, {"trace": True}, {"microbatches": 2, "max_grad_norm": 0.3}])
def test_it_is_the_training_of_the_last_steps_alone(options):
    whole = case()
    found, (_, expected) = whole.metagradient(since=K, **options), in_two_parts(whole, **options)
    assert torch.equal(found.value, expected.value)
    assert torch.equal(found.grads["data_weights"], expected.grads["data_weights"])
    assert not found.grads["lr"][: T - K].any() and torch.equal(found.grads["lr"][T - K :], expected.grads["lr"])
    assert found.report.adjoint_norms.isnan().tolist() == [True] * (T - K) + [False] * K


@pytest.mark.parametrize("model, shape", [(mlp(), (5,)), (convnet(), (1, 6, 6))])
@pytest.mark.parametrize("optimizer", [adamw(), SGD(lr=0.1, momentum=0.9)])
def test_it_is_unrolled_backpropagation_through_the_last_steps(model, shape, optimizer):
    whole = case(model, shape, optimizer)
    late = whole.but(batches=[(*batch, torch.full((6,), t >= T - K)) for t, batch in enumerate(whole.batches)])

    def loss(model, batch, z):  # earlier steps see z without a gradient
        seen = z["data_weights"] if batch[3].all() else z["data_weights"].detach()
        return weighted(model, batch[:3], {"data_weights": seen})

    rates = torch.cat([whole.z["lr"][: T - K].detach(), whole.z["lr"][T - K :]])
    expected = late.but({"lr": rates}, loss=loss).unrolled()
    found = whole.metagradient(since=K)
    assert relative_error(found.grads["data_weights"], expected.grads["data_weights"]) < 1e-10
    assert relative_error(found.grads["lr"][T - K :], expected.grads["lr"][T - K :]) < 1e-10


def test_forward_mode_and_finite_differences_agree():
    f, z = case().function(since=K), case().z
    checked = mgd.check(f, z, steps=(1e-4, 1e-5, 1e-6))
    assert checked.passed, checked
    assert all(key.relative_error < 1e-7 for key in checked.keys.values())


def test_nothing_is_logged_or_saved_before_the_last_steps():
    for schedule in ("auto", "revolve", "all"):
        actions = list(case().function(since=K, schedule=schedule).plan().actions())
        assert actions[0] == Advance(T - K)
        assert all(not isinstance(action, Save) or action.step >= T - K for action in actions)
        assert [action.step for action in actions if isinstance(action, Reverse)] == list(range(T - 1, T - K - 1, -1))
    short, full = (case().function(**options).plan() for options in ({"since": K}, {}))
    assert short.peak["host"] < full.peak["host"] and short.phases[2].adjoint == K


def test_all_steps_are_the_default_to_the_same_bits():
    assert same(case().metagradient(since=T), case().metagradient())


def test_what_would_be_zero_is_refused():
    whole = case()
    with pytest.raises(BadMetaparameter, match="'init'"):
        whole.but({"init": initial(whole.model)}).metagradient(since=K)
    early = lambda model, batch, z: weighted(model, batch[:3], z if not batch[3].any() else {"data_weights": weights()})
    batches = [(*batch, torch.full((6,), t >= T - K)) for t, batch in enumerate(whole.batches)]
    with pytest.raises(BadMetaparameter, match=f"from {T - K} on"):
        whole.but(loss=early, batches=batches).metagradient(since=K, trace=False)


@pytest.mark.parametrize("since", [0, -1, T + 1, True, 2.0])
def test_numbers_of_steps_that_are_none(since):
    with pytest.raises(BadArgument, match="since between 1 and 9"):
        case().function(since=since)


def test_an_anchor_has_the_keys_of_z():
    whole = case()
    anchored = whole.function(since=K).anchored(whole.z)
    with pytest.raises(BadMetaparameter, match="keys of its anchor"):
        anchored.value({"data_weights": whole.z["data_weights"]})
    assert whole.function().anchored(whole.z).since is None
