"""A training that goes on where another ended makes the bits of one training of both lengths."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from mgd import TrainingFunction, errors
from mgd_kernels import SGD, AdamW, Optimizer
from mgd_kernels.update_rule import RMSprop

FIRST, SECOND = 5, 4

OPTIMIZERS = {
    "adamw": AdamW(lr=1e-2, eps_root=1e-6),
    "momentum": SGD(lr=1e-2, momentum=0.9, dampening=0.3),
    "plain": SGD(lr=1e-2),
    "rmsprop": RMSprop(lr=1e-3, eps_root=1e-6),
}


class Network(nn.Module):
    """A network with dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


generator = torch.Generator().manual_seed(1)
X, Y = torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator)
BATCHES = [(X[i], Y[i], i) for i in (torch.randint(40, (8,), generator=generator) for _ in range(FIRST + SECOND))]


def loss(model, batch, z):
    x, y, index = batch
    return (z["weights"][index] * F.cross_entropy(model(x), y, reduction="none")).mean()


def training(model: nn.Module, batches: list, optimizer: Optimizer, **options) -> TrainingFunction:
    objective = lambda m: F.cross_entropy(m.eval()(X), Y)
    return TrainingFunction(model, loss, batches, optimizer=optimizer, objective=objective, **options)


WEIGHTS = {"weights": torch.linspace(0.5, 1.5, 40)}


def halves(optimizer: Optimizer, **options):
    """The metagradients of the first steps and of the rest."""
    model = Network()
    first = training(model, BATCHES[:FIRST], optimizer, optimizer_state={}, **options).metagradient(WEIGHTS)
    model.load_state_dict(first.model_state)
    state = first.optimizer_state
    second = training(model, BATCHES[FIRST:], optimizer, optimizer_state=state, **options).metagradient(WEIGHTS)
    return first, second


EAGER = [{}, {"max_grad_norm": 0.5, "microbatches": 2}]
GRAPHS = [{"trace": True}]  # of the model alone: how it is updated makes no difference to them


@pytest.mark.parametrize(
    "name, options",
    [*itertools.product(OPTIMIZERS, EAGER), *itertools.product(["adamw"], GRAPHS)],
)
def test_two_trainings_are_one(name, options):
    optimizer = OPTIMIZERS[name]
    whole = training(Network(), BATCHES, optimizer, optimizer_state={}, **options).metagradient(WEIGHTS)
    first, second = halves(optimizer, **options)
    assert torch.equal(torch.cat([first.losses, second.losses]), whole.losses)
    for part in ("model_state", "optimizer_state", "value"):
        a, b = tree_leaves(getattr(second, part)), tree_leaves(getattr(whole, part))
        assert all(x == y if isinstance(x, int) else torch.equal(x, y) for x, y in zip(a, b, strict=True)), part
    assert second.optimizer_state["step"] == FIRST + SECOND


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_metagradient_of_the_second_is_that_of_the_whole(name):
    """Where the weights enter from step FIRST on, the whole training's metagradient is the second one's."""

    def late(model, batch, z):
        x, y, index = batch
        weights = z["weights"] if any(torch.equal(index, b[2]) for b in BATCHES[FIRST:]) else WEIGHTS["weights"]
        return (weights[index] * F.cross_entropy(model(x), y, reduction="none")).mean()

    whole = training(Network(), BATCHES, OPTIMIZERS[name]).replaced(loss=late).metagradient(WEIGHTS)
    _, second = halves(OPTIMIZERS[name])
    assert torch.equal(second.grads["weights"], whole.grads["weights"])
    assert second.grads["weights"].norm() > 0


def test_the_state_counts():
    """Without moments and step count, or without random streams that go on, the bits would differ."""
    optimizer = OPTIMIZERS["adamw"]
    first, second = halves(optimizer)
    model = Network()
    model.load_state_dict(first.model_state)
    f = training(model, BATCHES[FIRST:], optimizer, optimizer_state={})
    assert not torch.equal(f.metagradient(WEIGHTS).value, second.value)
    f.optimizer_state = {**first.optimizer_state, "step": FIRST + 1}
    assert not torch.equal(f.metagradient(WEIGHTS).value, second.value)
    f.optimizer_state = first.optimizer_state
    again = f.metagradient(WEIGHTS)
    assert torch.equal(again.value, second.value), "the attribute is read at every call"
    assert torch.equal(f.value(WEIGHTS), second.value)


def test_the_state_passed_in_stays_and_the_one_returned_is_a_copy():
    first, _ = halves(OPTIMIZERS["adamw"])
    given = copy.deepcopy(first.optimizer_state)
    model = Network()
    model.load_state_dict(first.model_state)
    result = training(model, BATCHES[FIRST:], OPTIMIZERS["adamw"], optimizer_state=given).metagradient(WEIGHTS)
    for slot in ("exp_avg", "exp_avg_sq"):
        for name, tensor in given[slot].items():
            assert torch.equal(tensor, first.optimizer_state[slot][name])
            assert not torch.equal(result.optimizer_state[slot][name], tensor)


def test_a_resumed_metagradient_gives_the_state_back(tmp_path):
    f = training(Network(), BATCHES, OPTIMIZERS["adamw"], optimizer_state={})
    there = f.metagradient(WEIGHTS, resume=tmp_path).optimizer_state
    here = f.metagradient(WEIGHTS).optimizer_state
    assert all(map(torch.equal, tree_leaves(here["exp_avg"]), tree_leaves(there["exp_avg"])))
    assert training(Network(), BATCHES, OPTIMIZERS["adamw"]).metagradient(WEIGHTS).optimizer_state is None


@pytest.mark.parametrize(
    "state, words",
    [
        ({"step": 3}, "it lacks .*exp_avg"),
        ({"step": -1}, "count steps"),
        ({"step": 2.0}, "count steps"),
        ({"step": 0, "momentum_buffer": {}}, "another optimizer's"),
        ({"step": 0, "exp_avg": {"layers.0.weight": torch.zeros(2)}}, "a tensor for every trained parameter"),
    ],
)
def test_states_that_do_not_fit(state, words):
    with pytest.raises(errors.BadArgument, match=words):
        training(Network(), BATCHES, OPTIMIZERS["adamw"], optimizer_state=state).train(WEIGHTS)
