"""The forecast of a metagradient on many ranks: its formulas, and what was measured on a few."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mgd.errors import BadArgument
from mgd.plan.budget import Budget
from mgd.plan.scale import DEVICES, UTILISATION, Scale, forecast

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "2026-11-30-processes.json"


def test_traffic_is_counted_in_flat_buffers():
    scale = Scale(1000, 4, width=4, gradient_width=2)
    assert scale.trained_bytes == (4 + 2) * 750 and scale.reversed_bytes == (2 * 4 + 2) * 750
    assert scale.gathered_bytes == 4 * 750
    assert Scale(1000, 4, objectives=3, gradient_width=2).reversed_bytes == (4 * 4 + 3 * 2) * 750
    alone = Scale(1000, 1)
    assert alone.trained_bytes == alone.reversed_bytes == alone.gathered_bytes == 0


def test_a_rank_owns_its_share_of_state_adjoints_and_directions():
    assert Scale(1000, 4).owned_bytes == (3 + 3 + 1) * 1000
    assert Scale(1000, 4, objectives=2, slots=1).owned_bytes == (2 + 2 * 2 + 2) * 1000
    assert Scale(1000, 4).sizes.snapshot == 3000 and Scale(1000, 4).sizes.gradient == 1000


def test_seconds_are_those_of_operations_and_of_what_is_sent():
    scale, device = Scale(10**9, 10), DEVICES["h100"]
    costs = scale.costs(device, 50e9, 10**6)
    compute = 6e15 / (10 * UTILISATION * device.flops)
    assert costs.step == pytest.approx(compute + 8e9 * 0.9 / 50e9 + 2.8e9 / device.memory_rate)
    assert costs.hvp == pytest.approx(3 * compute + 12e9 * 0.9 / 50e9 + 4.4e9 / device.memory_rate)
    faster = scale.costs(device, 100e9, 10**6)
    assert costs.step - faster.step == pytest.approx(8e9 * 0.9 / 100e9)


def test_a_forecast_adds_up():
    found = forecast(100, Scale(10**9, 64, gradient_width=2), DEVICES["h200"], 50e9)
    made = found.plan
    sent = made.model_steps * found.scale.trained_bytes + 100 * found.scale.reversed_bytes + found.scale.gathered_bytes
    assert found.network_bytes == sent and made.model_steps == 100 and found.tokens == 20 * 10**9 / 100
    assert found.fits and found.to_dict()["seconds"] == made.predicted_seconds
    assert found.memory_bytes["kept"] <= DEVICES["h200"].memory / 2
    small = forecast(100, Scale(10**9, 64), DEVICES["h200"], 50e9, budget=Budget(disk=("x", "20GB")))
    assert small.plan.bytes_moved["disk"]["written"] > 0 and small.memory_bytes["kept"] == 0


def test_what_does_not_fit_is_said():
    found = forecast(1000, Scale(70 * 10**9, 1024, gradient_width=2), DEVICES["h100"], 50e9)
    assert not found.fits and "does not fit" in found.explain()
    with pytest.raises(BadArgument, match="at least one parameter"):
        Scale(0, 4)


def test_forecasts_are_within_a_quarter_of_what_was_measured():
    """On 1, 2 and 4 processes, by `python benchmarks/processes.py`."""
    rows = json.loads(RESULTS.read_text())
    assert list(rows) == ["1", "2", "4"]
    for row in rows.values():
        for key, value in row["predicted"].items():
            assert abs(row["measured"][key] - value) <= 0.25 * value, key
