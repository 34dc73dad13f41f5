"""A training that does not repeat itself is an error, never a wrong metagradient."""

import itertools
import random

import pytest
import torch
from cases import cross_entropy
from refusals import STEPS, base, refused

from mgd import errors


class Augmented(list):
    """Batches of which one is another one every time it is asked for."""

    def __init__(self, batches, other):
        super().__init__(batches)
        self.other, self.asked = other, 0

    def __getitem__(self, t):
        x, y, i = super().__getitem__(t)
        self.asked += t == self.other
        return (x + 0.1 * self.asked if t == self.other else x), y, i


@pytest.mark.parametrize("schedule, step", [("log", STEPS - 1), ("revolve", 3)])
def test_batches_that_differ_when_asked_again(schedule, step):
    case = base(schedule=schedule)
    message, batches = f"batches[{step}] differs", Augmented(case.batches, step)
    refused(errors.ReplayDivergence, message, step=step, case=case, batches=batches)


def test_a_batch_that_is_asked_for_once_may_be_any():
    """Its graph was kept: the gradient is that of the training that was run."""
    case = base(schedule="log", trace=False)
    found = case.but(batches=Augmented(case.batches, 3)).metagradient()
    seen = [(x + 0.1 if t == 3 else x, y, i) for t, (x, y, i) in enumerate(case.batches)]
    assert torch.equal(found.grads["lr"], case.but(batches=seen).metagradient().grads["lr"])


def test_a_loss_with_state_outside_the_model():
    count = itertools.count()

    def loss(m, b, z):
        return cross_entropy(m, b, z) * (1 + 0.01 * next(count))

    error = refused(errors.ReplayDivergence, "bit by bit", "state kept outside the model", loss=loss)
    assert error.step == STEPS - 1


def test_random_numbers_that_are_not_torchs():
    stream = random.Random(0)
    loss = lambda m, b, z: cross_entropy(m, b, z) * (1 + stream.random())
    refused(errors.ReplayDivergence, "random numbers", step=STEPS - 1, loss=loss, trace=False)


class OtherIndices(list):
    """Batches whose examples have other numbers from the second reading on. Equal weights hide it from the loss."""

    def __init__(self, batches):
        super().__init__(batches)
        self.read = [0] * len(batches)

    def __getitem__(self, t):
        x, y, i = super().__getitem__(t)
        self.read[t] += 1
        return x, y, i if self.read[t] == 1 else i.flip(0)


def test_batches_that_have_other_indices_when_asked_again():
    case = base(trace=False)
    refused(errors.ReplayDivergence, "other indices or labels", case=case, batches=OtherIndices(case.batches))


def test_labels_that_the_loss_masks_in_place():
    """To the same end each time: that is no divergence."""

    def mask(model, batch, z):
        batch[1][0] = 0
        return cross_entropy(model, batch, z)

    def masked(model, batch, z):
        x, y, i = batch
        return cross_entropy(model, (x, torch.cat([y.new_zeros(1), y[1:]]), i), z)

    case = base(trace=False)
    batches = [(x, y.clone(), i) for x, y, i in case.batches]
    expected = case.but(loss=masked).metagradient()
    assert torch.equal(case.but(loss=mask, batches=batches).metagradient().grads["lr"], expected.grads["lr"])
