"""The benchmarks' peak memory is that of the method, and what is too long is extrapolated."""

from __future__ import annotations

import pytest
from command_cases import in_this_process

from mgd.bench import memory, peak


def test_peak_memory_is_that_of_the_states_kept_and_of_the_budget():
    steps, state = 200, 3 * 4 * 26_122
    kept = peak.measure("small", "states", steps)
    # Every state is kept; the rest of the rise is one step's graph and what the allocator does not give back.
    assert steps * state < kept["bytes"] < 1.6 * steps * state
    planned = peak.measure("small", "package", steps, options={"budget": {"host": 3_000_000}})
    assert planned["report"]["plan"]["peak"]["host"] <= 3_000_000
    # Beside the budget: the state, its adjoints, one step's evaluation. Keeping each gradient would take 20 MB more.
    assert planned["bytes"] < 14_000_000


def test_memory_of_a_failing_process_is_an_error_with_its_reason():
    with pytest.raises(peak.Failed, match=r"unrolled on nothing.*expected a workload among"):
        peak.measure("nothing", "unrolled")


def test_memory_extrapolates_only_what_is_too_long(monkeypatch):
    monkeypatch.setattr(peak, "measure", in_this_process)
    chosen = {name: memory.methods(["2MB"])[name] for name in ("torch unrolled", "mgd auto, 2 MB")}
    found = memory.measure("small", (2, 4, 8), chosen, unrolled=4)
    assert found["bit_identical"] and found["agree"]
    assert [p["extrapolated"] for p in found["methods"]["torch unrolled"]] == [False, False, True]
    a, b, c = (p["peak_bytes"] for p in found["methods"]["torch unrolled"])
    assert c == pytest.approx(b + 2 * (b - a))
    assert not any(p["extrapolated"] for p in found["methods"]["mgd auto, 2 MB"])
    assert found["methods"]["mgd auto, 2 MB"][2]["stored_bytes"] <= 2_000_000
    table = memory.rows(found, memory.memory_cell, "plain training")
    assert table[2][0] == "torch unrolled" and table[2][3].startswith("~") and not table[2][2].startswith("~")


def test_memory_notices_gradients_that_differ():
    assert memory._agree({"a": {"lr": 1.0}, "b": {"lr": 1.001}})
    assert not memory._agree({"a": {"lr": 1.0}, "b": {"lr": 1.1}})
