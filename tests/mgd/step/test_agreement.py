"""A slight discrepancy between two evaluations of a step: what confirms that it is rounding."""

import pytest
import torch
from cases import mlp, supervised

import mgd.step.step
from mgd.autodiff.eager import EagerEvaluator
from mgd.errors import ReplayDivergence
from mgd.step.agreement import Agreement
from mgd.step.step import StepFunction

STEPS = 3


@pytest.fixture
def doubtful(monkeypatch):
    """Every discrepancy is more than the tolerance, and slight; how often the plain evaluation is asked."""
    asked = []
    real = EagerEvaluator.second_derivatives
    plain = lambda self, *given: asked.append(given) or real(self, *given)
    monkeypatch.setattr(EagerEvaluator, "second_derivatives", plain)
    monkeypatch.setattr(Agreement, "tolerance", property(lambda self: -1e-9, lambda self, x: None), raising=False)
    monkeypatch.setattr(mgd.step.step, "SLIGHT", -1e9)
    return asked


@pytest.fixture
def nothing_kept(monkeypatch):
    real = StepFunction.gradient

    def gradient(self, *given, **options):
        result = real(self, *given, **options)
        result.residuals = None
        return result

    monkeypatch.setattr(StepFunction, "gradient", gradient)


def metagradient():
    f = supervised(mlp(), (5,), STEPS).function(trace=True)
    return f.metagradient({"lr": torch.full((STEPS,), 0.1, dtype=torch.float64)})


def test_from_residuals_the_plain_evaluation_confirms_it(doubtful):
    assert (
        metagradient().report.execution == "captured" and len(doubtful) == STEPS - 1
    )  # nothing depends on the gradient of the first


def test_graphs_confirm_it_by_their_own_gradient(doubtful, nothing_kept):
    assert metagradient().report.execution == "captured" and not doubtful


def test_another_gradient_is_not_rounding(doubtful, nothing_kept, monkeypatch):
    """The gradient that trained is changed behind the step: graphs do not have it, nor has the plain evaluation."""
    real, changed = StepFunction.gradient, []

    def gradient(self, t, *given, **options):
        result = real(self, t, *given, **options)
        if t == 1 and not changed:
            changed.append(result.gradient.mul_(1.01))
        return result

    monkeypatch.setattr(StepFunction, "gradient", gradient)
    with pytest.raises(ReplayDivergence, match="gradient of"):
        metagradient()
    assert doubtful
