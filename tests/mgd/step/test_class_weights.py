"""Class weights as metaparameters, against the weighted loss written out, and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mgd
from mgd.step import class_weights
from mgd_kernels import SGD

X, Y = torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,)).index_fill(0, torch.tensor([2]), -100)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(), (5,)])
def test_values_are_those_of_torch(reduction, shape):
    x, y = torch.randn(6, 3, *shape, dtype=torch.float64), torch.randint(3, (6, *shape))
    y.view(-1)[1] = -100
    w = torch.rand(3, dtype=torch.float64)
    learned = w.clone().requires_grad_()
    for smoothing in (0.0, 0.3):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        for weight in (learned, w):
            expected = F.cross_entropy(x, y, w, **options)
            torch.testing.assert_close(class_weights.cross_entropy(x, y, weight, **options), expected)
            one = F.cross_entropy(x[0], y[0], w, **options) if not shape else None
            if one is not None:
                torch.testing.assert_close(class_weights.cross_entropy(x[0], y[0], weight, **options), one)
    for own, theirs in ((class_weights.cross_entropy, F.cross_entropy), (class_weights.nll_loss, F.nll_loss)):
        torch.testing.assert_close(own(x, y, learned, reduction=reduction), theirs(x, y, w, reduction=reduction))
        torch.testing.assert_close(own(x, y, w, reduction=reduction), theirs(x, y, w, reduction=reduction))


def smoothed(*args, **kwargs):
    return F.cross_entropy(*args, **kwargs, label_smoothing=0.3)


@pytest.mark.filterwarnings("ignore:mgd evaluates steps by autograd")  # what Dynamo itself does not take
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("loss", [F.cross_entropy, smoothed, lambda x, *a, **k: F.nll_loss(x.log_softmax(1), *a, **k)])
def test_a_training_with_learned_class_weights(trace, loss):
    torch.manual_seed(0)
    f = mgd.TrainingFunction(
        nn.Linear(4, 3).double(),
        lambda model, batch, z: loss(model(batch[0]), batch[1], weight=z["classes"]),
        [(X, Y)] * 4,
        optimizer=SGD(lr=0.5),
        objective=lambda model: F.cross_entropy(model(X), Y),
        trace=trace,
    )
    w, v = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    gradient = f.metagradient({"classes": w}).grads["classes"]
    ahead, behind = (f.value({"classes": w + h * v}) for h in (1e-5, -1e-5))
    torch.testing.assert_close(gradient @ v, (ahead - behind) / 2e-5, rtol=1e-7, atol=1e-11)
