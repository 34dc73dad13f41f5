"""The joint graph: the gradient that trains and its second derivatives from one trace."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCE, cross_entropy, errors, mlp, supervised
from same_bits import cases, same
from torch import nn

import mgd
from mgd.sweep.residuals import ResidualCache


@pytest.mark.parametrize("name", ["mlp", "convnet", "gpt"])
def test_the_metagradient_is_the_references(name):
    case = cases()[name]
    f = case.function(trace=True)
    first = f.metagradient(case.z)
    assert first.report.execution == "captured"
    assert max(errors(first, case.unrolled()).values()) < TOLERANCE[torch.float64]
    assert same(f.metagradient(case.z), first)


@pytest.mark.parametrize("name", ["mlp", "convnet", "gpt"])
def test_what_is_not_kept_is_computed_again_to_the_same_bits(name, monkeypatch):
    monkeypatch.setattr(mgd.sweep.resident, "MOST", 0)  # or the second one would keep everything
    case = cases()[name].to(torch.float32)
    kept = case.metagradient(trace=True)
    monkeypatch.setattr(mgd.sweep.storage, "residual_cache", lambda *_: ResidualCache())
    again = case.metagradient(trace=True)
    assert same(kept, again)
    assert kept.report.kept_bytes > 0 == again.report.kept_bytes
    assert "kept for them" in str(kept.report) and "kept for them" not in str(again.report)


class Noisy(nn.Module):
    """Draws numbers that the loss does not read, before those that it does."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(0.3)
        self.register_buffer("noise", torch.zeros(5, dtype=torch.float64))

    def forward(self, x):
        torch.rand(3)
        self.noise.mul_(0.9).add_(torch.randn(5, dtype=x.dtype))
        return self.layers(x)


@pytest.mark.parametrize("room", [0, 10**9])
def test_random_numbers_that_the_loss_does_not_read_are_drawn_again(room, monkeypatch):
    monkeypatch.setattr(mgd.sweep.storage, "residual_cache", lambda *_: ResidualCache(room))
    case = supervised(Noisy(), (5,))
    captured = case.metagradient(trace=True)
    assert captured.report.execution == "captured"
    assert same(captured, case.metagradient(trace=False))


def test_what_is_kept_stays_within_the_budget():
    case = cases()["gpt"].to(torch.float32)
    whole = case.metagradient(trace=True)
    stored = sum(whole.report.plan["peak"].values())
    budget = mgd.Budget(host=stored + whole.report.kept_bytes // 2)
    part = case.function(trace=True, budget=budget).metagradient(case.z)
    assert same(whole, part)
    assert 0 < part.report.kept_bytes <= budget.host - sum(part.report.plan["peak"].values())


def test_the_next_plan_counts_on_what_the_first_call_measured(monkeypatch):
    monkeypatch.setattr(mgd.sweep.resident, "MOST", 0)  # or there would be no plan
    case = cases()["gpt"].to(torch.float32)
    f = case.function(trace=True)
    first, second = (f.metagradient(case.z) for _ in range(2))
    assert same(first, second)
    before, after = (result.report.plan for result in (first, second))
    assert before["sizes"]["residuals"] == 0 == before["residuals_held"]
    assert after["residuals_held"] == after["steps_with_residuals"] == len(f)
    assert after["sizes"]["residuals"] * len(f) == pytest.approx(second.report.kept_bytes, rel=0.2)
    # With room for the log and less than all residuals, a plan says how many are kept.
    room = sum(after["peak"].values()) + after["sizes"]["residuals"] * (len(f) - 1)
    f.budget = mgd.Budget(host=room)
    assert f.plan().layout.kept >= 1 and same(f.metagradient(case.z), first)


def test_a_convnet_keeps_its_products_alone(monkeypatch):
    """Elementwise results are computed again: kept, they would take most of the memory."""
    case = cases()["convnet"].to(torch.float32)
    products = case.metagradient(trace=True)
    monkeypatch.setattr(mgd.autodiff.joint, "_WORTHWHILE", float("inf"))
    everything = cases()["convnet"].to(torch.float32).metagradient(trace=True)  # another model, and so another graph
    assert same(products, everything)
    assert 0 < products.report.kept_bytes < everything.report.kept_bytes / 2


@pytest.mark.parametrize("spare", [0, 10**9])
def test_frozen_parameters_are_constants_of_every_part(spare, monkeypatch):
    monkeypatch.setattr(mgd.sweep.storage, "residual_cache", lambda *_: ResidualCache(spare))
    model = mlp()
    model[-1].weight.requires_grad_(False)
    case = supervised(model, (5,))
    found = case.metagradient(trace=True)
    assert found.report.execution == "captured"
    assert max(errors(found, case.unrolled()).values()) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("spare", [0, 10**9])
def test_several_objectives_share_what_depends_on_no_direction(spare, monkeypatch):
    case = cases()["mlp"]
    objectives = case.but(objective=lambda model: torch.stack([case.objective(model), 2 * case.objective(model)]))
    monkeypatch.setattr(mgd.sweep.storage, "residual_cache", lambda *_: ResidualCache(spare))
    both, one = objectives.metagradient(trace=True), case.metagradient(trace=True)
    for key, grad in one.grads.items():
        if isinstance(grad, torch.Tensor):
            torch.testing.assert_close(both.grads[key][0], grad, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(both.grads[key][1], 2 * grad, rtol=1e-12, atol=1e-15)


def test_the_training_has_the_bits_of_the_eager_one():
    case = supervised(mlp(), (5,)).to(torch.float32)
    assert torch.equal(case.metagradient(trace=True).value, case.metagradient(trace=False).value)


def test_python_that_changes_from_step_to_step_is_run_once_per_step():
    """The factor follows a counter: the metagradient is that of the training that ran."""

    def case():
        count = itertools.count()
        loss = lambda model, batch, z: cross_entropy(model, batch, z) * (1.0 if next(count) < 3 else 2.0)
        return supervised(mlp(), (5,)).but(loss=loss)

    result = case().metagradient(trace=True)
    assert max(errors(result, case().unrolled()).values()) < TOLERANCE[torch.float64]


def test_a_loss_that_cannot_be_traced_is_eager():
    loss = lambda model, batch, z: F.cross_entropy(model(batch[0]), batch[1]) * (2.0 if batch[0].sum() > 0 else 1.0)
    case = supervised(mlp(), (5,)).but(loss=loss, per_example={})
    case.z = {"lr": torch.full((len(case),), 0.05, dtype=torch.float64)}
    with pytest.warns(RuntimeWarning, match="Data-dependent"):
        result = case.metagradient(trace=True)
    assert result.report.execution.startswith("eager, since capture was given up")
    assert max(errors(result, case.unrolled()).values()) < TOLERANCE[torch.float64]
