"""Results: what they print, and their way to a file and back."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from cases import mlp, supervised
from torch.utils._pytree import tree_leaves

import mgd
from mgd.errors import BadArgument, BadData
from mgd.results import MEANING
from mgd.util.tensor_file import write
from mgd_kernels import SGD, AdamW, Arena

CASE = supervised(mlp(), (5,)).but({"weight_decay": torch.tensor([0.02], dtype=torch.float64)})


@pytest.fixture(scope="module")
def function():
    return CASE.function()


@pytest.fixture(scope="module")
def result(function):
    z = CASE.z | {"init": {name: p.detach() for name, p in function.model.named_parameters()}}
    return function.metagradient(z)


def same(a, b):
    leaves, others = tree_leaves(a), tree_leaves(b)
    return len(leaves) == len(others) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(leaves, others, strict=True)
    )


def fields(x):
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}


def test_a_result_comes_back_from_its_file(result, function, tmp_path):
    result.save(tmp_path / "result")
    loaded = mgd.load(tmp_path / "result")
    assert same(
        fields(loaded) | {"report": loaded.report.to_dict()}, fields(result) | {"report": result.report.to_dict()}
    )
    assert str(loaded.report) == str(result.report)
    trained = function.train(CASE.z)
    trained.save(tmp_path / "trained")
    assert same(fields(mgd.load(tmp_path / "trained")), fields(trained))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result", "trained"]


def test_torch_loads_it_without_running_code(result, tmp_path):
    torch.save(result, tmp_path / "result.pt")
    assert same(torch.load(tmp_path / "result.pt", weights_only=True).grads, result.grads)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("no tensors")
    save_file({"x": torch.ones(1)}, tmp_path / "tensors")
    save_file({"x": torch.ones(1)}, tmp_path / "other", {"mgd": '{"dict": {"kind": {"value": "Cake"}}}'})
    save_file({"x": torch.ones(1)}, tmp_path / "list", {"mgd": '{"list": []}'})
    save_file({"x": torch.ones(1)}, tmp_path / "odd", {"mgd": "[1]"})
    for name in ("text", "tensors", "other", "list", "odd"):
        with pytest.raises(BadData):
            mgd.load(tmp_path / name)
    for other in (tmp_path / "nothing", tmp_path, "/dev/null"):
        with pytest.raises(BadData):
            mgd.load(other)
    for no_path in (5, None, "", "a\0b"):
        with pytest.raises(BadArgument):
            mgd.load(no_path)
        with pytest.raises(BadArgument):
            write(no_path, 1)


def test_a_file_that_says_it_is_another_kind(tmp_path):
    for kind in ("Trained", "Jvp", "Metagradient"):
        write(tmp_path / "kind", {"kind": kind, "losses": torch.ones(1)})
        with pytest.raises(BadData, match="this version"):
            mgd.load(tmp_path / "kind")


def test_a_damaged_file_is_refused(result, tmp_path):
    path = tmp_path / "result"
    result.save(path)
    whole = path.read_bytes()
    for at in (0, 7, 20, len(whole) // 3):
        path.write_bytes(whole[:at])
        with pytest.raises(BadData):
            mgd.load(path)
    generator = random.Random(0)
    for _ in range(300):
        at = generator.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << generator.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(BadData):
            mgd.load(path)


def test_everything_public_prints_in_a_line_or_a_table(result, function):
    table = str(result)
    assert max(map(len, table.splitlines())) < 160 and table.splitlines()[0] == repr(result)
    assert all(key in table for key in result.grads)
    state = AdamW().init(torch.ones(3))
    for thing in (result, function, function.optimizer, function.train(CASE.z), Arena.of(function.model), state):
        assert len(repr(thing)) < 250 and "tensor(" not in repr(thing) and "object at" not in repr(thing)
    plan = function.plan()
    assert len(repr(plan)) < 250 and str(plan) == plan.explain()
    for kind in result.report.seconds:  # every kind of work is explained beside its time
        (line,) = [line for line in str(result.report).splitlines() if line.startswith(f"{kind} ") and " s   " in line]
        assert line.endswith(MEANING[kind])
    assert repr(SGD(lr=0.1)) == "SGD(lr=0.1, weight_decay=0)"
    assert repr(SGD(lr=torch.ones(4))) == "SGD(lr=<4 values>, weight_decay=0)"
