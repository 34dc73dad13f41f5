"""What a loss keeps for itself: calls beyond those of the training are undone, or are not made."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import mlp, relative_error, supervised
from torch import nn

from mgd.autodiff import payoff
from mgd.errors import ReplayDivergence
from mgd.step.hidden_state import HiddenState
from mgd.step.model import Binding

COUNT = {"calls": 0}


class Keeps(nn.Module):
    """A model whose output depends on how often it was called, as it keeps it: in a list, a dict, an attribute, a
    buffer that was None and is tested for that."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.kind, self.calls, self.named, self.count = mlp(), kind, [], {}, 0
        self.register_buffer("first", None)

    def forward(self, x):
        y = self.body(x)
        if not self.training:
            return y
        if self.kind == "buffer":
            factor, self.first = 2.0 if self.first is None else 1.0, torch.ones(1)
        elif self.kind == "list":
            self.calls.append(1)
            factor = 1 + 0.1 * len(self.calls)
        elif self.kind == "dict":
            self.named["n"] = self.named.get("n", 0) + 1
            factor = 1 + 0.1 * self.named["n"]
        else:
            self.count += 1
            factor = 1 + 0.1 * self.count
        return y * factor


KINDS = ["list", "dict", "number", "buffer"]


def by_hand(kind):
    """The loss at the end of the training, by this package's own value without graphs, of a model of its own."""
    return supervised(Keeps(kind), (5,), steps=6)


@pytest.mark.filterwarnings("ignore:mgd evaluates steps by autograd")
@pytest.mark.parametrize("trace", [None, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_calls_a_loss_once_per_step(kind, trace):
    z = by_hand(kind).z
    h = 1e-6
    up, down = (by_hand(kind).function(trace=False).value({"lr": z["lr"] * (1 + s)}) for s in (h, -h))
    found = by_hand(kind).function(trace=trace).jvp(z, z)
    torch.testing.assert_close(found.value, by_hand(kind).function(trace=False).value(z), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.tangent, (up - down) / (2 * h), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:mgd evaluates steps by autograd")
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_is_compared_leaves_no_count(kind, monkeypatch):
    monkeypatch.setattr(payoff, "CAUTION", 0.0)
    expected = by_hand(kind).function(trace=False).value(by_hand(kind).z)
    case = by_hand(kind)
    f = case.function()
    for _ in range(3):
        case.model.calls.clear(), case.model.named.clear()
        case.model.count = 0
        assert f.value(case.z) == expected


@pytest.mark.filterwarnings("ignore:mgd evaluates steps by autograd")
@pytest.mark.parametrize("trace", [None, False, True])
def test_labels_that_are_masked_in_place_with_microbatches(trace):
    def loss(model, batch, z):
        x, y, _ = batch
        y[y == 2] = -100
        return F.cross_entropy(model(x), y, ignore_index=-100, reduction="sum") / len(x)

    def case():
        return supervised(mlp(), (5,), steps=4, batch=6).but(loss=loss)

    found = case().function(trace=trace, microbatches=2).metagradient(case().z)
    assert relative_error(found.grads["lr"], case().unrolled().grads["lr"]) < 1e-9


def test_another_count_of_labels_in_one_microbatch_is_seen():
    case = supervised(mlp(), (5,), steps=3, batch=6)
    reads = [0]

    class Batches(list):
        def __getitem__(self, t):
            x, y, i = super().__getitem__(t)
            reads[0] += t == 1
            return (x, torch.cat([y[:-1], 1 - y[-1:]]) if t == 1 and reads[0] > 1 else y, i)

    f = case.but(batches=Batches(case.batches)).function(trace=False, microbatches=2, schedule="sqrt")
    with pytest.raises(ReplayDivergence):
        f.metagradient(case.z)


def test_it_is_put_back():
    model = Keeps("list")
    model.calls, model.named, inner = [1], {"a": 2}, [3]
    local, number = [4], 5

    def loss(model, batch, z):
        return local, number, COUNT, inner

    state = HiddenState(Binding(model), loss)
    model.calls.append(2)
    model.named["b"] = 3
    model.count, model.new, model.first = 7, torch.ones(1), torch.ones(2)
    local.append(6)
    number, COUNT["calls"] = 8, 9
    state.put_back()
    assert (model.calls, model.named, model.count, model.first) == ([1], {"a": 2}, 0, None)
    assert not hasattr(model, "new") and local == [4] and number == 5 and COUNT == {"calls": 0}
