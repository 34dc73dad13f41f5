"""What this package costs beside the work itself: its import, its Python per step, and graphs that are made once."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mgd.bench import baselines, bergson, overhead, workloads
from mgd.cli import main as cli

IMPORT = """
import gc, time
gc.disable()  # a collection of torch's own objects falls on whichever import is next when it is due
start = time.process_time()
import torch
middle = time.process_time()
import mgd
print((time.process_time() - middle) / (middle - start))
"""


def test_importing_mgd_takes_little_beside_torch(tmp_path):
    # As in installed packages, the modules are compiled: the first of these processes does that.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}

    def ratio():
        command = [sys.executable, "-c", IMPORT]
        return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    ratio()
    assert min(ratio() for _ in range(2)) < 0.1


def test_overhead_says_what_this_package_costs_per_step(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "overhead", "--steps", "40", "--rounds", "2", "--core", "-2", "--json", str(tmp_path / "a")])
    assert end.value.code == 0
    found = json.loads((tmp_path / "a").read_text())
    assert found["parameters"] == 15 and found["steps"] == 40
    out = capsys.readouterr().out
    parts = dict(found["microseconds"]["captured"])
    whole, own = parts.pop("whole"), parts.pop("own")
    assert len(parts) == 2 and min(whole, own) > 0
    assert own == pytest.approx(whole - sum(parts.values()))
    assert f"{own:.0f}" in out


def test_a_second_metagradient_traces_nothing(monkeypatch):
    function, z = overhead.smallest(4)
    function.metagradient(z)
    monkeypatch.setattr("mgd.autodiff.graphs.make_fx", lambda *a, **k: pytest.fail("traced again"))
    function.metagradient({**z, "lr": torch.full((4,), 2e-3)})


def test_bergson_says_that_it_is_missing_where_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "bergson", None)
    monkeypatch.setitem(sys.modules, "bergson.magic.trainer", None)
    workload = workloads.small(2)
    with pytest.raises(baselines.Unsupported, match="pip install bergson"):
        bergson.magic(workload.function(), workload.z())
