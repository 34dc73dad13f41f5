"""Steps as device graphs on a pretended device, by an emulated recorder."""

from __future__ import annotations

import device_cases
import pretended
import pytest
from device_cases import PRETENDED, on, pretended_only, same
from emulated_graphs import Emulated, emulated

import mgd
from mgd.step.agreement import Agreement
from mgd.util.devices import set_aside

pytestmark = pretended_only
CASES = {
    "mlp": device_cases.mlp,
    "convnet": device_cases.convnet,
    "microbatches": lambda: device_cases.mlp(microbatches=3, max_grad_norm=0.5),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", [None, mgd.Budget(device="1MB", host="1MB")])
def test_same_bits(name, budget):
    options = {} if budget is None else {"budget": budget}
    expected = on(CASES[name](), PRETENDED).metagradient(trace=True, **options)
    case = on(CASES[name](), PRETENDED)
    with emulated("pretend"):
        f = case.function(trace=True, **options)
        found = [f.metagradient(case.z) for _ in range(2)]
        assert Emulated.replays > 2 * len(case)
    for each in found:
        same(each, expected, tolerance=0)
        assert "device graphs" in each.report.execution and "one by one" not in each.report.execution


def test_a_step_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(Agreement, "_largest", lambda *arguments: 0.0)
    counts = []
    with emulated("pretend"):
        for steps in (16, 32):
            case = on(device_cases.mlp(steps=steps), PRETENDED)
            f = case.function(trace=True, budget=mgd.Budget(device="100KB"))
            f.metagradient(case.z)
            with pretended.counted() as found:
                f.metagradient(case.z)
            counts.append((found.waits, found.uploads))
    assert counts[1][0] <= counts[0][0] + 2 and counts[0][1] == counts[1][1], counts


def test_a_number_on_the_host_is_not_frozen():
    """Python numbers of a batch reach a graph as tensors of the CPU."""
    found = []
    for graphed in (True, False):
        case = on(device_cases.mlp(), PRETENDED)
        loss = lambda model, batch, z, case=case: case.loss(model, batch[:3], z) * batch[3]
        batches = [(*batch, 1.0 + t) for t, batch in enumerate(case.batches)]
        case = case.but(loss=loss, batches=batches)
        with emulated("pretend" if graphed else "nothing"):
            found.append(case.metagradient(trace=True))
            assert not Emulated.made
    same(*found, tolerance=0)
    assert "one by one: expected plain tensors on pretend:0" in found[0].report.execution
    assert found[1].report.execution == "captured"


def test_the_default_budget_leaves_out_what_is_set_aside():
    f = on(device_cases.mlp(), PRETENDED).function()
    before = f.plan().limits["device"]
    set_aside[PRETENDED] += pretended.MEMORY // 2
    try:
        assert f.plan().limits["device"] < 0.6 * before
    finally:
        del set_aside[PRETENDED]
