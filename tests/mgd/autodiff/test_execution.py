"""How captured graphs are run."""

import itertools

import cases
import pytest
import torch
from cases import TOLERANCE, errors, mlp, supervised, weighted, weights
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import mgd
from mgd.autodiff import joint
from mgd.autodiff.execution import direct
from mgd.errors import ReplayDivergence


def test_a_graph_run_directly_has_the_bits_of_the_module():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.LayerNorm(4))
    scale = torch.randn(4)  # becomes a constant of the graph

    def function(x, w):
        low, high = (model(x) @ w * scale).split(2)
        return low.sum(), (high + 1).var(0, correction=0), None

    x, w = torch.randn(4, 3), torch.randn(4, 4)
    module = make_fx(function)(x, w)
    torch.manual_seed(0)
    expected = module(x, w)
    torch.manual_seed(0)
    found = direct(module)(x, w)
    assert found[2] is None and all(map(torch.equal, found[:2], expected[:2]))


def test_a_graph_run_directly_goes_past_the_operators_objects(monkeypatch):
    module = make_fx(lambda x: x.relu() + 1)(torch.ones(2))
    run = direct(module)
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", lambda *arguments: None)
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize("size", [1e-6, 1e-2])
def test_compiled_parts_of_a_graph_may_round_differently(size, monkeypatch):
    """Each is compiled on its own. A loss that differs by more than rounding is still seen."""
    count = itertools.count()

    def compiled(module):
        factor = 1 + size * next(count)

        def run(*inputs):
            first, *rest = module(*inputs)
            return (first * factor if first is not None and first.ndim == 0 else first, *rest)

        return run

    monkeypatch.setattr(joint, "compiled", compiled)
    case = cases.supervised(cases.mlp(), (5,), steps=4).to(torch.float32)
    run = lambda: case.metagradient(compile=True, budget=mgd.Budget(host="3KB"))  # too little for residuals
    if size < 1e-4:
        result = run()
        assert result.report.kept_bytes == 0 and result.report.execution == "captured, compiled"
        assert cases.relative_error(result.grads, case.metagradient().grads) < 1e-4
    else:
        with pytest.raises(ReplayDivergence, match="the loss of microbatch 0"):
            run()


def test_steps_compiled_by_inductor_have_the_metagradient():
    """With dropout, whose masks are those of the eager steps; and again, from graphs that are there."""
    case = supervised(mlp(0.3), (5,)).but(loss=weighted, z={"data_weights": weights()})
    expected, case = case.unrolled(), case.to(torch.float32)
    f = case.function(compile=True)
    for _ in range(2):
        result = f.metagradient(case.z)
        assert result.report.execution == "captured, compiled"
        assert max(errors(result, expected).values()) < TOLERANCE[torch.float32]
