"""`mgd bench gpu` on a pretended device: its gate, its measurements, and its list."""

from __future__ import annotations

import device_cases  # noqa: F401  # makes the device known
import pytest
import torch
from emulated_graphs import Emulated, emulated

from mgd.autodiff import device_graphs
from mgd.autodiff.device_recording import Recording
from mgd.bench import gpu
from mgd.cli.main import main
from mgd.errors import BadArgument
from mgd.ranks.shards import Shards

WHERE = {"accelerators": ["a GPU"], "driver": "1.2", "versions": {"torch": "2", "triton": "3"}, "date": "today"}


def test_the_gate_holds_and_a_wrong_number_shuts_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "GATE", ("small",))
    monkeypatch.setattr(gpu, "GATE_STEPS", 2)
    with emulated("pretend"):
        checks = gpu.gate("pretend")
        assert Emulated.replays
    assert all(check["holds"] for check in checks) and len(checks) == 9, checks
    exact = Shards.vjp_
    wrong = lambda *arguments: (x := exact(*arguments)) * (1.0 if x.device.type == "cpu" else 1.01)
    monkeypatch.setattr(Shards, "vjp_", wrong)
    monkeypatch.setattr(gpu, "measure", lambda *arguments, **options: pytest.fail("timed past a shut gate"))
    page = tmp_path / "page.md"
    page.write_text(f"{gpu.BEGIN}\n{gpu.END}\n")
    with pytest.raises(SystemExit) as end:
        main(["bench", "gpu", "--device", "pretend", "--json", str(tmp_path / "x.json"), "--list", str(page)])
    assert end.value.code == 1, capsys.readouterr()
    assert "float32 against the CPU" in capsys.readouterr().out.replace("\n", " ")
    assert page.read_text() == f"{gpu.BEGIN}\n{gpu.END}\n"


def test_everything_is_measured(monkeypatch):
    monkeypatch.setattr(gpu, "METHODS", ("eager",))
    with emulated("pretend"):
        found = gpu.measure("pretend", parameters=1 << 12, rounds=1, steps=6, table=("small",))
    (measured,) = found["workloads"]
    assert not [entry for entry in measured["methods"].values() if not entry.get("agrees", True)]
    assert measured["flops_per_second"]["ratio"] > 0 and measured["deterministic"]["ratio"]["median"] > 0
    ways = found["host_microseconds_per_step"]
    assert list(ways) == ["device graphs", "one by one"]
    assert all(x > 0 for columns in ways.values() for x in columns.values()) and Emulated.replays
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_bits_of_device_graphs_shut_the_gate(monkeypatch):
    class Other(Recording):
        def _handed_out(self, inputs):
            found = super()._handed_out(inputs)
            # An error that the first call does not have, and that is within the limits of the other checks.
            return [x * (1 + 1e-6) if self.confirmed and isinstance(x, torch.Tensor) else x for x in found]

    monkeypatch.setattr(gpu, "GATE", ("small",))
    monkeypatch.setattr(device_graphs, "Recording", Other)
    with emulated("pretend"):
        failed = [check for check in gpu.gate("pretend") if not check["holds"]]
    assert [check["check"] for check in failed] == ["small: other bits as device graphs"]


def test_a_gpu_enters_the_list(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu.BEGIN}\n| an older one |\n{gpu.END}\nafter\n")
    gpu.enlist(page, WHERE, "today-gpu.json")
    line = "| a GPU | 1.2 | 2 | 3 | today | `today-gpu.json` |"
    assert page.read_text().splitlines() == ["before", gpu.BEGIN, "| an older one |", line, gpu.END, "after"]
    page.write_text("nothing")
    with pytest.raises(BadArgument, match="expected a page"):
        gpu.enlist(page, WHERE, "today-gpu.json")
