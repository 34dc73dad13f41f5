"""`mgd bench ...`: tables, JSON and pages; wrong results are noticed, and words without a meaning refused."""

from __future__ import annotations

import json

import pytest
import torch
from command_cases import CLOSE, run

from mgd.bench import kernel_cases, methods, peak, throughput
from mgd.bench.cases import Case
from mgd.bench.kernels import PRECISE, static_rows


def test_throughput_writes_table_json_and_page(capsys, tmp_path):
    out, _ = run(
        capsys, *"bench throughput --workload small --steps 8 --methods sqrt,captured --rounds 1 --no-memory".split(),
        "--json", tmp_path / "t.json", "--out", tmp_path / "page",
    )  # fmt: skip
    found = json.loads((tmp_path / "t.json").read_text())
    (result,) = found["results"]
    assert found["command"] == "bench throughput" and found["machine"]["versions"]["torch"] == torch.__version__
    assert result["steps"] == 8 and result["parameters"] == 26_122 and result["threads"] == 1
    assert set(result["methods"]) == {"sqrt", "captured"}
    for entry in result["methods"].values():
        assert entry["agrees"] and entry["ratio"]["median"] > 1 and max(entry["difference"].values()) < CLOSE
    assert (
        result["methods"]["captured"]["phases"]["hvp"] > 0 and result["methods"]["captured"]["execution"] == "captured"
    )
    assert "small: 8 steps, 26,122 trained parameters" in out and "captured" in out
    assert {"index.html", "throughput.png", "phases.png"} <= {path.name for path in (tmp_path / "page").iterdir()}


def test_throughput_fails_where_a_method_finds_another_gradient(capsys, monkeypatch):
    right = methods.METHODS["states"]

    def wrong(case: Case):
        def run():
            found = right.prepare(case)()
            return methods.Outcome(found.value, {key: 1.05 * g for key, g in found.grads.items()})

        return run

    monkeypatch.setitem(methods.METHODS, "states", methods.Method("wrong by 5%", wrong))
    arguments = "bench throughput --workload small --steps 3 --methods states --rounds 1 --no-memory".split()
    out, _ = run(capsys, *arguments, code=1)
    assert "DISAGREES" in out and "states on small differ" in out


def test_throughput_shortens_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(peak, "extrapolated", lambda *args: {"bytes": 1 << 50, "fits_steps": 4, "from_steps": [4, 8]})
    monkeypatch.setattr(peak, "measure", lambda *args: {"bytes": 1000})
    found = throughput.measure("small", ("unrolled", "eager"), rounds=1, steps=10)
    assert found["methods"]["unrolled"]["timed_steps"] == 4 and found["methods"]["eager"]["timed_steps"] == 10
    assert found["methods"]["unrolled"]["peak_bytes"] == 1 << 50 and found["methods"]["unrolled"]["agrees"]
    line = next(row for row in throughput.rows(found) if row[0].startswith("unrolled"))
    assert line[0] == "unrolled (4 steps)" and line[5].startswith("~")


def test_throughput_compares_forward_mode_with_the_gradient():
    found = throughput.measure("small", ["forward", "directions"], rounds=1, steps=3, memory=False)["methods"]
    assert set(found) == {"forward", "directions"} and found["directions"]["objectives"] > 1
    assert all(entry["agrees"] and 0 < entry["difference"]["along"] < 1e-4 for entry in found.values())


def test_kernels_compares_with_float64(capsys, tmp_path, monkeypatch):
    arguments = "bench kernels --parameters 70k --rounds 1 --json".split()
    run(capsys, *arguments, tmp_path / "k.json")
    rows = json.loads((tmp_path / "k.json").read_text())["rows"]
    assert [row["bytes_per_parameter"] for row in rows] == [28, 44, 44, 44, 56, 56, 20, 32, 32, 32, 48, 40]
    assert all(0 < row["error"] <= PRECISE and row["times_torch"] > 0 for row in rows)
    step = kernel_cases.Problem.step

    def off(self):
        step(self)
        self.state[0].mul_(1 + 1e-5)

    monkeypatch.setattr(kernel_cases.Problem, "step", off)
    out, _ = run(capsys, *arguments, tmp_path / "k.json", code=1)
    assert "WRONG" in out


def test_predictions_are_called_predictions():
    row = {
        "kernel": "adam step",
        "gradient": "fp32",
        "target": "sm_90",
        "registers": 67,
        "spills": 0,
        "occupancy": 0.4375,
        "bytes_per_parameter": 28.0,
        "predicted_ms": {"H100 SXM": 0.28, "H200 SXM": 0.196},
    }
    head, line = static_rows([row])
    assert head[-1] == "predicted ms" and line[-1] == "H100 SXM 0.28, H200 SXM 0.20" and line[5] == "44%"


def test_offload_measures_store_and_sweeps(capsys, tmp_path):
    out, _ = run(
        capsys, *"bench offload --workload small --steps 6 --rounds 1 --sizes".split(), "64 KB",
        "--directory", tmp_path, "--json", tmp_path / "o.json", "--out", tmp_path / "page",
    )  # fmt: skip
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["store"][0]["size"] == 65536 and found["store"][0]["write_ratio"] > 0
    assert found["sweeps"][0]["ratios"]["reverse wall"]["median"] > 0 and "the promise" in out
    assert (tmp_path / "page" / "offload.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("bench throughput --methods states,magic", "expected methods among unrolled"),
        ("bench throughput --workload huge", "expected workloads among mlp"),
        ("bench throughput --device tpu", "expected a device such as"),
        ("bench memory --steps 16,many", "expected numbers of training steps"),
        ("bench memory --budgets 3parsecs", "expected a size such as"),
        ("bench kernels --parameters many", "expected a number of parameters"),
        ("bench offload --directory no/such/place", "expected a directory"),
        ("bench offload --sizes 1GB", "expected sizes among 64 KB"),
    ],
)
def test_what_means_nothing_is_the_users_error(capsys, arguments, says):
    _, err = run(capsys, *arguments.split(), code=2)
    assert says in err
