"""Norms of the adjoint: those of unrolled backpropagation, on every path; and the warning where they grow too much."""

from __future__ import annotations

import math

import pytest
import torch
from cases import adamw, mlp, supervised, weighted, weights
from torch import nn

import mgd
from mgd.errors import UnstableTraining
from mgd.sweep.growth import growth
from mgd_kernels import SGD


def expected(case):
    """The norm of the objective's gradient at the parameters after each step, by plain autograd; plain SGD alone."""
    params = {n: p.detach().clone().requires_grad_() for n, p in case.model.named_parameters()}

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = case.model

        def forward(self, function, *args):
            return function(self.model, *args)

    def call(function, values, *args):
        return torch.func.functional_call(Call(), {f"model.{n}": p for n, p in values.items()}, (function, *args))

    states = []
    for t, batch in enumerate(case.batches):
        loss = call(case.loss, params, batch, case.z)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {n: p - case.z["lr"][t] * g for (n, p), g in zip(params.items(), grads, strict=True)}
        states.append(list(params.values()))
    value = call(case.objective, params)
    found = [torch.autograd.grad(value, state, retain_graph=True) for state in states]
    return torch.stack([torch.stack([g.square().sum() for g in grads]).sum().sqrt() for grads in found])


def plain(**options):
    case = supervised(mlp(), (5,), optimizer=SGD(lr=0.1), **options)
    return case.but({"data_weights": weights(), "lr": torch.full((len(case),), 0.1).double()}, loss=weighted)


@pytest.mark.parametrize("options", [{"trace": True}, {"trace": False}, {"microbatches": 3}, {"schedule": "revolve"}])
def test_they_are_the_norms_of_unrolled_gradients(options):
    case = plain()
    found = case.metagradient(**options).report.adjoint_norms
    torch.testing.assert_close(found, expected(case), rtol=1e-10, atol=0)


def test_each_objective_has_its_own_and_steps_that_are_not_differentiated_have_none():
    case = plain()
    x = torch.randn(4, 5, dtype=torch.float64)
    several = case.but(objective=lambda model: model(x).logsumexp(1)).metagradient()
    assert several.report.adjoint_norms.shape == (4, len(case))
    late = lambda model, batch, z: weighted(model, batch[:3], z if batch[3] else {"data_weights": weights()})
    batches = [(*batch, torch.tensor(t >= 5)) for t, batch in enumerate(case.batches)]
    fixed = {"lr": case.z.pop("lr")}
    found = case.but(loss=late, batches=batches).metagradient(fixed=fixed).report.adjoint_norms
    assert found.isnan().tolist() == [True] * 5 + [False] * 3


def test_they_are_part_of_results_and_of_files(tmp_path):
    result = plain().metagradient()
    result.save(tmp_path / "result")
    assert torch.equal(mgd.load(tmp_path / "result").report.adjoint_norms, result.report.adjoint_norms)
    assert result.report.to_dict()["adjoint_norms"] == result.report.adjoint_norms.tolist()
    assert "norms between" in str(result.report)


def rough(rate=1.0, steps=30):
    case = supervised(mlp(), (5,), steps=steps, optimizer=SGD(lr=rate))
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-2, 2, p.numel()).view_as(p).sin())
    return case.but(model=model, z={"lr": torch.full((steps,), rate, dtype=torch.float64)})


def test_an_unstable_training_warns_and_names_steps_and_parameters():
    with pytest.warns(UnstableTraining, match=r"from step \d+ back to step \d+.*belongs to '(0|2)\.(weight|bias)'"):
        result = rough(rate=20.0).metagradient()
    factor, steepest, start, stop = growth(result.report.adjoint_norms.tolist())
    assert factor > 100 and steepest > 1.5 and start > stop


def test_a_stable_training_does_not_warn():
    factor, *_ = growth(rough(rate=0.05).metagradient().report.adjoint_norms.tolist())
    assert factor < 100
    supervised(mlp(), (5,), steps=30, optimizer=adamw()).metagradient()


@pytest.mark.parametrize(
    "norms, found",
    [
        ([8.0, 4.0, 2.0, 1.0], (8.0, 2.0, 2, 0)),
        ([1.0, 300.0, 3.0, 2.9, 2.8, 2.7, 5.0], (300 / 2.7, 100.0, 1, 1)),
        ([math.nan, math.nan, 6.0, 2.0, 4.0], (3.0, 3.0, 2, 2)),
        ([1.0, 2.0, 3.0], (1.0, 1.0, 2, 2)),
        ([5.0, 0.0, 0.0], (1.0, 1.0, 2, 2)),
    ],
)
def test_where_growth_begins(norms, found):
    assert growth(norms) == pytest.approx(found)
