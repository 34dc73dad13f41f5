"""`mgd bench plan`: every phase that a plan predicts is measured, with everything in memory, on disk and on both."""

import json

import pytest
from command_cases import run

from mgd.bench import plan_times
from mgd.bench.workloads import small
from mgd.errors import BadArgument


def test_every_phase_is_predicted_and_measured(capsys, tmp_path):
    arguments = "bench plan --workload small --steps 6 --rounds 1 --core -2".split()
    out, _ = run(capsys, *arguments, "--directory", tmp_path, "--json", tmp_path / "a")
    result = json.loads((tmp_path / "a").read_text())
    (found,) = result["runs"]
    assert set(found["budgets"]) == {"memory", "little memory", "disk", "both"} and found["steps"] == 6
    for name, compared in found["budgets"].items():
        assert {"first sweep", "reverse sweep"} <= set(compared["phases"]), name
        assert compared["overlap"] == ["disk"]
        for phase in compared["phases"].values():
            ratio = phase["predicted"] / phase["measured"]
            assert phase["ratio"]["median"] == pytest.approx(ratio) and ratio > 0
    assert "replay" in found["budgets"]["little memory"]["phases"]
    good, phases = result["close"]
    assert 0 <= good <= phases and f"{good} of {phases} phases are predicted within 20%" in out


def test_the_budgets_are_of_memory_disk_and_both(tmp_path):
    workload = small(steps=64)
    budgets = plan_times.budgets(workload, str(tmp_path))
    peaks = {name: workload.function(budget=budget).plan().peak for name, budget in budgets.items()}
    assert set(peaks["disk"]) >= {"disk"} and peaks["disk"]["disk"] > 0
    assert 4 * peaks["little memory"]["host"] <= peaks["memory"]["host"]


@pytest.mark.parametrize("steps", ["", "1", "x", "16,", "16,1"])
def test_bad_numbers_of_steps_are_refused(steps):
    with pytest.raises(BadArgument, match="each at least 2, such as 16,64; got"):
        plan_times._counts(steps)


def test_close_counts_medians_within_a_fifth():
    def runs(*ratios):
        return [{"budgets": {"memory": {"phases": {str(r): {"ratio": {"median": r}} for r in ratios}}}}]

    assert plan_times.close(runs(0.81, 1.19, 0.79, 1.21)) == (2, 4)
