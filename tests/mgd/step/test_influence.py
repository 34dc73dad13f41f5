"""dL/dz of a step's evaluations: the same up to rounding, or told."""

import math
from types import SimpleNamespace

import pytest
import torch

import mgd.step.step
from mgd.autodiff.joint import JointGraph
from mgd.bench.overhead import smallest
from mgd.errors import ReplayDivergence
from mgd.step.influence import PROBES, Influence, projections

CPU, EPSILON = torch.device("cpu"), torch.finfo(torch.float64).eps


def compared(first: list[torch.Tensor | None], again: list[torch.Tensor | None], others: float = 1.0) -> None:
    """A step that has `first`, then `again`, among two whose derivatives are of size `others`."""
    influence = Influence(3, 1)
    influence.prepare(SimpleNamespace(owner=[str(i) for i in range(len(first))]))
    for t in (1, 2):
        typical = [torch.full((3,), others, dtype=torch.float64) for _ in first]
        influence.compared(t, projections(typical, CPU).reshape(-1).tolist(), EPSILON)
    for values in (first, again):
        influence.compared(0, projections(values, CPU).reshape(-1).tolist(), EPSILON)


@pytest.mark.parametrize("size", [0.0, 1e-300, 1e-160, 1e-40, 1e-10, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("n", [0, 1, 5, 3000])
def test_what_repeats_itself_passes(size, n):
    x = size * torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    compared([x, None], [x.clone(), None])
    compared([x.float()], [x.float()])


@pytest.mark.parametrize("others", [1.0, 1e18, 1e100])
@pytest.mark.parametrize("n", [1, 5, 3000])
@pytest.mark.parametrize("change", [lambda x: None, lambda x: -x, lambda x: 1.001 * x, lambda x: x.flip(0) + 1e-3])
def test_another_derivative_is_told(others, n, change):
    x = others * torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(ReplayDivergence, match=r"with respect to z\['1'\]"):
        compared([None, x], [None, change(x)] if others == 1.0 or n > 1 else [None, None])


def test_one_large_step_does_not_hide_the_others():
    influence, x = Influence(5, 1), torch.ones(4, dtype=torch.float64)
    influence.prepare(SimpleNamespace(owner=["w"]))
    for t, size in enumerate([1.0, 1.0, 1.0, 1e25, math.inf]):
        influence.compared(t, projections([size * x], CPU).reshape(-1).tolist(), EPSILON)
    with pytest.raises(ReplayDivergence, match="step 1"):
        influence.compared(1, [0.0] * PROBES, EPSILON)


def test_many_leaves_share_numbers_and_are_told_apart():
    leaves = [torch.full((2,), float(i + 1), dtype=torch.float64) for i in range(20)]
    compared(leaves, [x.clone() for x in leaves])
    for i in range(20):
        with pytest.raises(ReplayDivergence):
            compared(leaves, [x if j != i else None for j, x in enumerate(leaves)])


def test_a_training_that_is_not_reversed_computes_none(monkeypatch, tmp_path):
    counts = {"projected": 0, "computed": 0}
    forward = JointGraph.forward

    def projecting(*arguments):
        counts["projected"] += 1
        return projections(*arguments)

    def computing(*arguments):
        found = forward(*arguments)
        counts["computed"] += len(found[2])
        return found

    monkeypatch.setattr(mgd.sweep.resident, "MOST", 0)  # of steps that are evaluated once there is nothing to compare
    function, z = smallest(3)
    value, losses = function.value(z), function.train(z).losses
    monkeypatch.setattr(mgd.step.step, "projections", projecting)
    monkeypatch.setattr(JointGraph, "forward", computing)
    assert torch.equal(function.value(z), value)
    assert torch.equal(function.train(z).losses, losses)
    assert counts == {"projected": 0, "computed": 0}
    found = function.metagradient(z)
    assert torch.equal(found.value, value)
    assert torch.equal(found.losses, losses)
    assert counts == {"projected": 3, "computed": 3}
    function.train(z, resume=tmp_path / "run")  # another process may go on with it
    assert counts == {"projected": 6, "computed": 6}
