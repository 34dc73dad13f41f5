"""`mgd profile ...` on a user's own script, and the cases that it measures."""

from __future__ import annotations

import json

import pytest
import torch
from command_cases import CLOSE, in_this_process, run

from mgd.bench import peak
from mgd.bench.cases import load


def test_a_shortened_case_is_the_head_of_the_training():
    case = load("small", 6)
    case.z["lr"] = torch.arange(6.0)
    short = case.shortened(4)
    assert len(short) == 4 and short.z["lr"].tolist() == [0, 1, 2, 3]
    assert short.z["data_weights"] is case.z["data_weights"]
    assert all(torch.equal(short.function.batches[t][0], case.function.batches[t][0]) for t in range(4))


SCRIPT = """
import torch, torch.nn.functional as F
from torch import nn
import mgd
from mgd_kernels import AdamW

def case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(16, 4), torch.arange(16) % 3
    batches = [(x, y)] * 5

    def loss(model, batch, z):
        return (z["w"] * F.cross_entropy(model(batch[0]), batch[1], reduction="none")).mean()

    def objective(model):
        model.eval()
        return F.cross_entropy(model(x), y)

    f = mgd.TrainingFunction(model, loss, batches, optimizer=AdamW(lr=0.01, eps_root=1e-6), objective=objective)
    return f, {"lr": torch.full((5,), 0.01), "w": torch.ones(16)}

number = 3
def nothing():
    return None
"""


def test_profile_time_takes_a_script_and_keeps_its_dropout(capsys, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    out, _ = run(
        capsys, "profile", "time", f"{tmp_path}/script.py:case",
        *"--methods mgd,unrolled,states --rounds 1 --no-memory --steps 4 --trace".split(), tmp_path / "trace.json",
        "--json", tmp_path / "p.json",
    )  # fmt: skip
    (result,) = json.loads((tmp_path / "p.json").read_text())["results"]
    assert result["steps"] == 4
    assert all(max(entry["difference"].values()) < CLOSE for entry in result["methods"].values())
    assert "4 training steps" in out  # the plan
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"mgd: training", "mgd: hvp", "mgd: optimizer vjp"} <= {event["name"] for event in events}


def test_profile_memory_takes_a_script(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(peak, "measure", in_this_process)
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [f"{tmp_path}/script.py:case", *"--budgets 1MB --steps 2 --json".split(), tmp_path / "m"]
    run(capsys, "profile", "memory", *arguments)
    found = json.loads((tmp_path / "m").read_text())
    assert found["steps"] == [1, 2] and found["agree"] and found["bit_identical"]
    assert set(found["methods"]) == {"torch unrolled", "torch all states", "mgd, as set up", "mgd, 1 MB"}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no-such.py:case", "there is no file"),
        ("script.py:number", "define a function 'number'"),
        ("script.py:nothing", "to return (TrainingFunction, z); got NoneType"),
    ],
)
def test_a_script_that_is_none_is_the_users_error(capsys, tmp_path, monkeypatch, source, says):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    _, err = run(capsys, "profile", "time", source, code=2)
    assert says in err
