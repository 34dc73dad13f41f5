"""`mgd bench short`: every method has the metagradients of the unrolled graph."""

import json

import pytest
import torch
from command_cases import CLOSE, run

from mgd.bench import short
from mgd.errors import BadArgument


def test_short_compares_with_an_unrolled_graph(capsys, tmp_path, monkeypatch):
    monkeypatch.delitem(short.METHODS, "compiled")  # compilers take half a minute
    monkeypatch.setattr(short, "PATIENCE", 0.0)
    arguments = "bench short --workload images --tasks 2 --steps 2 --rounds 1 --core -2".split()
    out, _ = run(capsys, *arguments, "--json", tmp_path / "a")
    found = json.loads((tmp_path / "a").read_text())
    assert set(found["methods"]) - {"higher"} == set(short.METHODS) - {"higher"} and found["tasks"] == 2
    for entry in found["methods"].values():
        assert entry["difference"] < CLOSE and entry["ratio"]["median"] > 0
    assert "captured, batches set anew" in out


def test_short_fails_where_a_method_finds_another_gradient(capsys, monkeypatch):
    def wrong(tasks):
        return lambda: [(value, init, 1.05 * rate) for value, init, rate in short._unrolled(tasks)()]

    monkeypatch.setattr(short, "METHODS", {"wrong": wrong})
    out, _ = run(capsys, *"bench short --tasks 1 --steps 2 --rounds 1 --core -2".split(), code=1)
    assert "The metagradients of wrong differ" in out


def test_an_unknown_workload_is_refused():
    with pytest.raises(BadArgument, match="sines, images; got 'x'"):
        short.measure("x")


def test_a_bad_number_is_a_difference():
    good = torch.ones(()), {"w": torch.ones(2)}, torch.ones(())
    assert short._difference(good, good) == 0
    assert not short._difference((torch.tensor(float("nan")), *good[1:]), good) <= short.AGREE
