"""The front of captured steps: what it keeps alive, and what it no longer calls."""

import functools
import gc
import logging
import warnings
import weakref

import torch
from cases import cross_entropy, mlp, supervised
from same_bits import same
from torch import nn


def test_a_captured_training_is_let_go_of():
    """Dynamo keeps its caches for the life of the process; data of the loss must not hang on them."""

    class Data:
        pass

    def captured() -> weakref.ref:
        data = Data()
        loss = lambda model, batch, z, data=data: cross_entropy(model, batch, z)
        f = supervised(mlp(), (5,), 2).but(loss=loss).function(trace=True)
        assert f.metagradient({"lr": torch.full((2,), 0.1, dtype=torch.float64)}).report.execution == "captured"
        return weakref.ref(data)

    reference = captured()
    gc.collect()
    assert reference() is None


def activation(scale: float):
    class Scaled:
        def __call__(self, x):
            return scale * torch.tanh(x)

    return Scaled()


class Activated(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.activation = mlp(), activation(1.0)

    def forward(self, x):
        return self.body[3](self.activation(self.body[0](x)))


def test_code_for_a_class_that_is_gone_is_not_called():
    """Dynamo replaces its guards of a class that was freed by ones that always hold."""
    case = supervised(Activated(), (5,), 2)
    f = case.function(trace=True)
    before = f.metagradient(case.z)
    known = weakref.ref(type(case.model.activation))
    case.model.activation = activation(2.0)
    gc.collect()
    assert known() is None, "a vacuous case"
    expected = case.metagradient(trace=False)
    assert same(f.metagradient(case.z), expected) and not same(before, expected)


def test_captured_code_outlives_a_reset_of_dynamo():
    """Which frees its entries, whoever refers to them."""
    case = supervised(mlp(), (5,), 2)
    f = case.function(trace=True)
    before = f.metagradient(case.z)
    (front,) = f._evaluator._fronts.values()
    assert front._known, "a vacuous case"
    torch._dynamo.reset()
    assert all(guards.cache_entry is None for guards, _ in front._known)
    after = f.metagradient(case.z)
    assert same(before, after) and after.report.execution == "captured"


@functools.lru_cache(None)
def said_once(logger, message):
    logger.warning(message)


def execution(say) -> str:
    logger = logging.getLogger("a model's")

    def loss(model, batch, z):
        say(logger)
        return cross_entropy(model, batch, z)

    f = supervised(mlp(), (5,), 2).but(loss=loss).function(trace=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f.metagradient({"lr": torch.full((2,), 0.1, dtype=torch.float64)}).report.execution


def test_what_is_logged_once_may_be_left_out_and_what_is_logged_at_each_step_may_not(monkeypatch):
    monkeypatch.setattr(logging.Logger, "warning_once", said_once, raising=False)
    assert execution(lambda logger: logger.warning_once("a default is taken")) == "captured"
    assert "given up" in execution(lambda logger: logger.warning("a step"))
