"""Losses whose logits are not held: which graphs have one, and the metagradient through it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mgd
from mgd.autodiff import linear_losses
from mgd.autodiff.linear_losses import linear_then_cross_entropy, without_logits
from mgd.step.agreement import Agreement
from mgd_kernels import SGD, functional

VOCABULARY = 50


class LanguageModel(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY, bias=bias)

    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x)))


class Tied(LanguageModel):
    def __init__(self):
        super().__init__(bias=False)
        self.head.weight = self.embedding.weight


def next_token(model, x, y):
    return F.cross_entropy(model(x)[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="none").square().mean()


FOUND = {
    "flattened": lambda model, x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten()),
    "next token": next_token,
    "transformers": lambda model, x, y: F.cross_entropy(
        model(x).float().view(-1, VOCABULARY), y.view(-1), ignore_index=3, label_smoothing=0.1, reduction="sum"
    ),
    "module": lambda model, x, y: nn.CrossEntropyLoss(label_smoothing=0.1)(
        model(x).reshape(-1, VOCABULARY), y.view(-1)
    ),
}


def regularised(model, x, y):
    logits = model(x).flatten(0, 1)
    return F.cross_entropy(logits, y.flatten()) + logits.square().mean()


LEFT = {
    "another reader": regularised,
    "classes in the second dimension": lambda model, x, y: F.cross_entropy(model(x).transpose(1, 2), y),
    "other rows": lambda model, x, y: F.cross_entropy(model(x).view(-1, VOCABULARY // 2), y.flatten().repeat(2) // 2),
    "fewer classes": lambda model, x, y: F.cross_entropy(model(x)[:, :, :40].flatten(0, 1), y.flatten() % 40),
    "weights of classes": lambda model, x, y: F.cross_entropy(
        model(x).flatten(0, 1), y.flatten(), torch.ones(VOCABULARY)
    ),
    "cast": lambda model, x, y: F.cross_entropy(model(x).double().flatten(0, 1), y.flatten()),
    "no layer": lambda model, x, y: F.cross_entropy(torch.tanh(model(x)).flatten(0, 1), y.flatten()),
}


def tokens(seed=0):
    return torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(seed))


def captured(loss):
    """The value by the rewritten graph, the value by the graph, and how many losses without logits there are."""
    torch.manual_seed(0)
    model, found = LanguageModel(), []

    def backend(module, examples):
        def run(*inputs):
            rewritten = without_logits(module)
            calls = [node for node in rewritten.graph.nodes if node.target is linear_then_cross_entropy]
            found.extend([rewritten(*inputs)[0], value := module(*inputs), len(calls)])
            return value

        return run

    value = torch.compile(loss, backend=backend, fullgraph=True)(model, tokens(), tokens(1))
    return found[0], value, found[2]


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("many", [True, False])
def test_found(monkeypatch, name, many):
    monkeypatch.setattr(linear_losses, "MANY_LOGITS", 0 if many else 1 << 24)
    mine, value, calls = captured(FOUND[name])
    assert calls == many
    torch.testing.assert_close(mine, value)


@pytest.mark.parametrize("name", LEFT)
def test_left_as_they_are(monkeypatch, name):
    monkeypatch.setattr(linear_losses, "MANY_LOGITS", 0)
    mine, value, calls = captured(LEFT[name])
    assert calls == 0 and torch.equal(mine, value)


@pytest.mark.parametrize("doubted", [False, True])
@pytest.mark.parametrize("model", [LanguageModel, Tied])
def test_metagradient_without_logits(monkeypatch, model, doubted):
    """Of a capture that may round otherwise, beside autograd's, which confirms it where it is doubted."""
    if doubted:
        monkeypatch.setattr(
            Agreement, "tolerance", property(lambda self: -1.0, lambda self, tolerance: None), raising=False
        )
    torch.manual_seed(0)
    net = model().double()
    batches = [(tokens(i), tokens(i + 1), torch.tensor([i % 2])) for i in range(4)]

    def loss(model, batch, z):
        x, y, index = batch
        return z["weights"][index].squeeze() * next_token(model, x, y)

    f = {
        trace: mgd.TrainingFunction(
            net, loss, batches, optimizer=SGD(lr=0.5), objective=lambda m: next_token(m, tokens(9), tokens(8)),
            trace=trace,
        )
        for trace in (True, False)
    }  # fmt: skip
    z = {"weights": torch.ones(2, dtype=torch.float64)}
    calls = 0

    def counted(*args, real=functional.linear_cross_entropy, **kwargs):
        nonlocal calls
        calls += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(functional, "linear_cross_entropy", counted)
    monkeypatch.setattr(linear_losses, "MANY_LOGITS", 0)
    mine, plain = f[True].metagradient(z), f[False].metagradient(z)
    assert mine.report.execution == "captured" and calls
    torch.testing.assert_close(mine.grads["weights"], plain.grads["weights"], rtol=1e-10, atol=1e-12)
