"""What changes between calls of one model and loss, which share their graphs."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import mlp, supervised
from same_bits import same
from torch import nn
from torch.overrides import TorchFunctionMode

from mgd.autodiff import payoff
from mgd.autodiff.captured import MOST_FAILURES


@pytest.fixture
def at_once(monkeypatch):
    """The default captures as soon as it may."""
    monkeypatch.setattr(payoff, "CAUTION", 0.0)


def halved(module: nn.Module, *seen):
    return 0.5 * seen[-1] if isinstance(module, nn.Tanh) else None


def halved_gradient(module: nn.Module, *seen):
    return (0.5 * seen[0][0],) if isinstance(module, nn.Tanh) else None


everywhere = torch.nn.modules.module
HOOKS: dict[str, Callable[[nn.Module], torch.utils.hooks.RemovableHandle]] = {
    "forward": lambda module: module.register_forward_hook(halved),
    "before": lambda module: module.register_forward_pre_hook(lambda module, inputs: (0.5 * inputs[0],)),
    "backward": lambda module: module.register_full_backward_hook(halved_gradient),
    "of all modules": lambda module: everywhere.register_module_forward_hook(halved),
    "backward of all modules": lambda module: everywhere.register_module_full_backward_hook(halved_gradient),
}


@pytest.mark.filterwarnings("ignore:mgd evaluates steps by autograd", "ignore:Full backward hook")
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_come_and_go(kind, at_once):
    case = supervised(mlp(), (5,))
    f = case.function()
    without = case.metagradient(trace=False)
    assert same(f.metagradient(case.z), without) and f.metagradient(case.z).report.execution == "captured"
    handle = HOOKS[kind](case.model[1])
    try:
        hooked = case.metagradient(trace=False)
        assert same(f.metagradient(case.z), hooked) and not same(hooked, without)
    finally:
        handle.remove()
    assert same(f.metagradient(case.z), without)


class Scaled(nn.Module):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def scaled(self, y):
        return self.factor * y

    @property
    def depth(self):
        return 1.0

    def forward(self, x):
        return self.depth * self.scaled(self.body(x))


# What is put into the model's class, or into the model
PATCHES = {
    "forward": lambda model: (Scaled, "forward", lambda self, x: 0.5 * self.body(x)),
    "another method": lambda model: (Scaled, "scaled", lambda self, y: 0.5 * y),
    "a property": lambda model: (Scaled, "depth", property(lambda self: 0.5)),
    "a number": lambda model: (Scaled, "factor", 0.5),
    "a layer's forward": lambda model: (nn.Tanh, "forward", lambda self, x: 0.5 * torch.tanh(x)),
    "the model's own forward": lambda model: (model, "forward", lambda x: 0.5 * model.body(x)),
    "a layer's own forward": lambda model: (model.body[1], "forward", lambda x: 0.5 * torch.tanh(x)),
}


@pytest.mark.parametrize("what, trace", [("forward", None), *((what, True) for what in PATCHES)])
def test_methods_are_replaced_between_calls(what, trace, at_once, monkeypatch):
    case = supervised(Scaled(), (5,))
    f = case.function(trace=trace)
    before = case.metagradient(trace=False)
    assert same(f.metagradient(case.z), before) and same(f.metagradient(case.z), before)
    with monkeypatch.context() as patch:
        patch.setattr(*PATCHES[what](case.model))
        expected = case.metagradient(trace=False)
        assert same(f.metagradient(case.z), expected) and not same(before, expected)
    again = f.metagradient(case.z)
    assert same(again, before) and again.report.execution == "captured"


FIRST = """
import sys
sys.path[:0] = {path!r}
from cases import mlp, supervised
case = supervised(mlp(), (5,), 2)
f = case.function(trace=True)
print(["capture" in f.metagradient(case.z).report.seconds for _ in range(2)])
"""


def test_the_first_capture_of_a_process_stays():
    """In it, Dynamo replaces methods of nn.Module."""
    found = subprocess.run([sys.executable, "-c", FIRST.format(path=sys.path)], capture_output=True, text=True)
    assert found.stdout.strip() == "[True, False]", found


class Criterion(nn.Module):
    """A loss that is a module."""

    def inner(self, value):
        return value

    def forward(self, model, batch, z):
        return self.inner(F.cross_entropy(model(batch[0]), batch[1]))


class Scale:
    def __call__(self, x):
        return x


class Helped(nn.Module):
    """Calls what is no module."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = mlp(), Scale()

    def forward(self, x):
        return self.scale(self.body(x))


@pytest.mark.parametrize("loss", [Criterion(), Criterion().forward], ids=["module", "method"])
def test_methods_of_a_loss_and_of_helpers_are_replaced(loss, monkeypatch):
    case = supervised(Helped(), (5,)).but(loss=loss)
    f = case.function(trace=True)
    before = f.metagradient(case.z)
    for kind, name, other in (
        (Criterion, "inner", lambda self, value: 0.5 * value),
        (Scale, "__call__", lambda self, x: 0.5 * x),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, other)
            expected = case.metagradient(trace=False)
            assert same(f.metagradient(case.z), expected) and not same(before, expected)
    monkeypatch.setattr(Scale.__call__, "__code__", (lambda self, x: 0.5 * x).__code__)
    expected = case.metagradient(trace=False)
    assert same(f.metagradient(case.z), expected) and not same(before, expected)


class Doubled(nn.Module):
    """Another function in a graph than without one, once the batch says so."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, number):
        y = self.body(x)
        return 2 * y if number > 0 and torch.compiler.is_compiling() else y


@pytest.mark.filterwarnings("ignore:mgd evaluates steps by autograd")
@pytest.mark.parametrize("trace", [None, True])
def test_every_graph_is_compared_with_the_loss_as_it_is_written(trace, at_once):
    case = supervised(Doubled(), (5,))
    case.batches = [(*batch, float(t > 4)) for t, batch in enumerate(case.batches)]
    case.loss = lambda model, batch, z: F.cross_entropy(model(batch[0], batch[3]), batch[1])
    case.objective = lambda model: model.body[0].weight.square().sum()
    expected = case.metagradient(trace=False)
    assert same(case.metagradient(trace=trace), expected)
    dz = {"lr": case.z["lr"]}
    assert torch.equal(case.function(trace=trace).jvp(case.z, dz).value, expected.value)


class Warm(nn.Module):
    """Counts its calls, and does what cannot be captured."""

    def __init__(self):
        super().__init__()
        self.body, self.calls = mlp(), 0

    def forward(self, x):
        self.calls += 1
        torch.Generator().manual_seed(0)
        return self.body(x) * min(self.calls / 5, 1.0)


@pytest.mark.filterwarnings("ignore:mgd evaluates steps by autograd")
@pytest.mark.parametrize("trace", [None, True])
def test_a_capture_that_fails_counts_no_call(trace, at_once):
    def value(trace):
        case = supervised(Warm(), (5,)).but(objective=lambda model: model.body[0].weight.square().sum())
        return case.function(trace=trace).jvp(case.z, {"lr": case.z["lr"]}).value

    assert torch.equal(value(trace), value(False))


class Halved(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 0.5 * result if function is torch.tanh else result


def test_a_mode_of_torch_functions_is_heard():
    case = supervised(mlp(), (5,))
    f = case.function(trace=True)
    without = f.metagradient(case.z)
    with torch.device("cpu"):
        assert same(f.metagradient(case.z), without)
    assert f.metagradient(case.z).report.execution == "captured"
    with Halved():
        halved = case.metagradient(trace=False)
        assert same(f.metagradient(case.z), halved) and not same(halved, without)


def norm(model: nn.Module) -> torch.Tensor:
    return model[0].weight.square().sum()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_a_copy_of_a_captured_training_is_captured_for_itself(copied):
    case = supervised(mlp(), (5,)).but(objective=norm)
    f = case.function(trace=True)
    result = f.metagradient(case.z)
    other = copied(f)
    assert same(other.metagradient(case.z), result)
    with torch.no_grad():
        other.model[0].weight.mul_(2)
    assert other.metagradient(case.z).report.execution == "captured"
    assert same(f.metagradient(case.z), result) and not same(other.metagradient(case.z), result)


@pytest.mark.parametrize("first", [None, torch.bfloat16])
def test_the_precision_of_one_training_is_not_that_of_another(first):
    """Gradients of autocast are compared within the rounding of its dtype."""
    case = supervised(mlp(), (5,)).to(torch.float32)
    other = torch.bfloat16 if first is None else None
    case.metagradient(autocast=first)
    assert same(case.metagradient(autocast=other), case.metagradient(autocast=other, trace=False))


@pytest.mark.filterwarnings("ignore:mgd evaluates steps by autograd")
def test_what_can_no_longer_be_captured_is_tried_a_few_times(at_once, monkeypatch):
    case = supervised(mlp(), (5,))
    draws = False

    def loss(model, batch, z):
        if draws:
            torch.Generator().manual_seed(0)  # which Dynamo refuses
        return F.cross_entropy(model(batch[0]), batch[1])

    f = case.but(loss=loss).function()
    assert f.metagradient(case.z).report.execution == "captured"
    draws, tries = True, 0
    call = f._evaluator.call

    def counted(*args):
        nonlocal tries
        tries += 1
        return call(*args)

    monkeypatch.setattr(f._evaluator, "call", counted)
    assert same(f.metagradient(case.z), f.replaced(trace=False).metagradient(case.z))
    assert tries == MOST_FAILURES
