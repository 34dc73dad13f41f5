"""After every call, even one that fails, everything that belongs to the user is as before."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import convnet, cross_entropy, initial, lstm, supervised, weights
from torch import nn
from watched import Watched

STEPS = 5


def case(**options):
    model = convnet()
    model[0].bias.requires_grad_(False)
    model.train()
    model[2].eval()  # modes of modules may differ
    made = supervised(model, (1, 6, 6), STEPS, **options)

    def loss(m, batch, z):
        each = F.cross_entropy(m(batch[0]), batch[1], reduction="none")
        return (z["data_weights"][batch[2]] * each).mean()

    return made.but({"data_weights": weights(), "init": initial(model)}, loss=loss)


@pytest.mark.parametrize("options", [{}, {"autocast": torch.bfloat16}, {"schedule": "revolve"}])
def test_every_call(options):
    made = case(**options)
    watched, f = Watched(made), made.function()
    for call in (f.metagradient, f.value, f.train, f):
        call(made.z)
        watched.check()
    f.plan()
    f.metagradient(made.z, progress=True)
    watched.check()


def test_backward_of_the_differentiable_call():
    made = case()
    watched = Watched(made)
    value = made.function()(made.z | {"lr": made.z["lr"].clone().requires_grad_()})
    value.backward()
    watched.check()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", [Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("evaluation", [0, 3, STEPS, STEPS + 1])
def test_an_exception_in_the_loss(kind, evaluation):
    """Before and after the model is called, in the first sweep (evaluations 0 to T-1) and in the reverse sweep."""
    for inside in (False, True):
        made, count = case(trace=False), itertools.count()
        plain = made.loss

        def loss(m, batch, z, plain=plain, count=count, inside=inside):
            stop = next(count) == evaluation
            if stop and not inside:
                raise kind
            m.eval()
            value = plain(m.train(), batch, z)
            if stop:
                raise kind
            return value

        made = made.but(loss=loss)
        watched = Watched(made)
        with pytest.raises(kind):
            made.metagradient()
        watched.check()


@pytest.mark.parametrize("kind", [Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["metagradient", "value"])
def test_an_exception_in_the_objective(kind, call):
    def objective(model):
        model.eval()(torch.ones(2, 1, 6, 6, dtype=torch.float64))
        raise kind

    made = case().but(objective=objective)
    watched = Watched(made)
    with pytest.raises(kind):
        getattr(made.function(), call)(made.z)
    watched.check()


@pytest.mark.parametrize("kind", [Interrupted, KeyboardInterrupt])
def test_an_exception_in_the_batches(kind):
    class Batches(list):
        def __getitem__(self, t):
            torch.rand(3)
            if t == 2:
                raise kind
            return super().__getitem__(t)

    made = case()
    made = made.but(batches=Batches(made.batches))
    watched = Watched(made)
    with pytest.raises(kind):
        made.metagradient()
    watched.check()


def test_a_module_that_replaces_its_buffers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("late", None)

        def forward(self, x):
            y = self.linear(x)
            self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
            self.late = self.mean.detach()
            return y - self.mean

    made = supervised(Net(), (5,), STEPS)
    watched = Watched(made)
    made.metagradient()
    watched.check()
    assert made.model.late is None


def test_a_recurrent_network_can_be_copied_and_run_afterwards():
    """nn.LSTM keeps a list of its parameters beside them."""
    import copy

    made = supervised(lstm(), (4, 5), STEPS)
    x = made.batches[0][0]
    before = made.model(x)
    made.metagradient()
    assert torch.equal(copy.deepcopy(made.model)(x), before)
    assert torch.equal(made.model(x), before)


def test_gradients_of_the_user_are_left_alone():
    made = case()
    cross_entropy(made.model, made.batches[0], {}).backward()
    gradients = {name: (p.grad, p.grad.clone()) for name, p in made.model.named_parameters() if p.grad is not None}
    made.metagradient()
    for name, p in made.model.named_parameters():
        if name in gradients:
            assert p.grad is gradients[name][0] and torch.equal(p.grad, gradients[name][1])
