"""Parameters without a gradient at some steps: the numbers of torch.optim, or a warning that says where they differ."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import cross_entropy
from refusals import base
from torch import nn

from mgd_kernels import SGD, Adam, AdamW

SOMETIMES, NEVER = "sometimes", "never"


def training(optimizer, head: str, **options):
    case = base(optimizer=optimizer, trace=False).but(**options)
    case.model.head = nn.Parameter(torch.linspace(0.5, 1.5, 3, dtype=torch.float64))
    chosen = case.batches[2][0]

    def loss(model, batch, z):
        used = head == SOMETIMES and torch.equal(batch[0], chosen)
        return cross_entropy(model, batch, z) + (model.head.square().sum() if used else 0.0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = case.model, case.model.head
            del case.model.head

        def forward(self, x):
            return self.body(x)

    return case.but(model=Model(), loss=loss)


def by_torch(case, make):
    model, z = case.model, case.z | {"weights": case.z.get("weights")}
    optimizer = make(model.parameters())
    for batch in case.batches:
        optimizer.zero_grad()
        case.loss(model, batch, z).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "optimizer, make, head",
    [
        (Adam(lr=0.05), lambda x: torch.optim.Adam(x, lr=0.05), NEVER),
        (SGD(lr=0.1, momentum=0.9), lambda x: torch.optim.SGD(x, lr=0.1, momentum=0.9), NEVER),
        (SGD(lr=0.1), lambda x: torch.optim.SGD(x, lr=0.1), SOMETIMES),
    ],
)
@pytest.mark.filterwarnings("ignore:.*exactly 0")
def test_where_a_gradient_of_zero_does_nothing(optimizer, make, head):
    case = training(optimizer, head)
    z = {key: value for key, value in case.z.items() if key not in optimizer.hyper_names}
    trained = case.function().train(z)  # warnings are errors
    expected = by_torch(case, make)
    assert trained.parameters.keys() == expected.keys()
    assert all(torch.allclose(trained.parameters[n], expected[n], rtol=1e-12, atol=0) for n in expected)


@pytest.mark.parametrize(
    "optimizer, head",
    [(AdamW(lr=0.05, eps_root=1e-8), NEVER), (Adam(lr=0.05, eps_root=1e-8), SOMETIMES), (SGD(0.1, 0.9), SOMETIMES)],
)
@pytest.mark.parametrize("trace", [False, True])
def test_where_torch_would_skip_them(optimizer, head, trace):
    case = training(optimizer, head)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        case.function(trace=trace).train(case.z)
    (warning,) = [str(w.message) for w in found if "no gradient" in str(w.message)]
    assert warning.startswith("'head' had no gradient at some steps. torch.optim would skip")


def test_frozen_they_are_as_in_torch():
    case = training(AdamW(lr=0.05, eps_root=1e-8), NEVER)
    case.model.head.requires_grad_(False)
    case.function().train(case.z)  # warnings are errors
