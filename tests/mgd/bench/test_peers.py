"""Every peer has the metagradient of float64; what a peer cannot do, and what it gets wrong, is shown."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from command_cases import CLOSE, run
from torch import nn

from mgd.bench import methods
from mgd.bench.baselines import Unsupported
from mgd.bench.cases import load
from mgd.bench.peers import alone, command, jax_models, jax_optax, libraries, recipe, table
from mgd.bench.peers.methods import PEERS
from mgd.errors import BadArgument
from mgd.recipes.models.gpt import GPT
from mgd.recipes.models.resnet import resnet9

STEPS = 4


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "float64.pt"
    alone._answer({"source": "small", "peer": alone.REFERENCE, "steps": STEPS, "rounds": 1, "reference": str(path)})
    return path


def worst(prepare, reference):
    found, wanted = prepare(load("small", STEPS))(), torch.load(reference, weights_only=True)["grads"]
    assert set(found.grads) <= set(wanted) and all(g.dtype == torch.float64 for g in wanted.values())
    return max(methods.differences(found.grads, wanted).values())


@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_the_recipe(reference):
    assert worst(lambda case: recipe.prepare(case, backend="aot_eager"), reference) < CLOSE


@pytest.mark.parametrize("name", ["torchopt", "higher"])
def test_the_libraries(name, reference):
    pytest.importorskip(name)
    assert worst(getattr(libraries, name), reference) < CLOSE


def test_jax(reference):
    pytest.importorskip("optax")
    assert worst(jax_optax.prepare, reference) < CLOSE


@pytest.mark.parametrize("norm", ["group", "batch", "gpt"])
def test_models_in_jax_are_those_of_torch(norm):
    jax = pytest.importorskip("jax")
    torch.manual_seed(0)
    model = GPT(11, 6, 1, 8, 2) if norm == "gpt" else resnet9(norm, 8)
    x = torch.randint(11, (2, 6)) if norm == "gpt" else torch.randn(2, 3, 8, 8)
    params = {name: jax.numpy.asarray(p.detach().numpy()) for name, p in model.named_parameters()}
    found = torch.tensor(jax.jit(lambda p, x: jax_models.apply(model, p, "", x))(params, x.numpy()).tolist())
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_every_peer_has_a_home(peer):
    module, _, function = peer.home.partition(":")
    home = importlib.import_module(f"mgd.bench.peers.{module}") if function else methods.METHODS[module]
    assert callable(getattr(home, function or "prepare"))


def test_what_jax_has_not_is_said(monkeypatch):
    with pytest.raises(Unsupported, match="no Dropout"):
        jax_models.apply(nn.Sequential(nn.Flatten(), nn.Dropout()), {}, "", torch.ones(2, 3))
    monkeypatch.setitem(sys.modules, "jax", None)  # as where it is not installed
    with pytest.raises(Unsupported, match="jax cannot be imported"):
        jax_optax.prepare(load("small", STEPS))


def test_a_measurement_has_time_memory_and_difference(reference):
    request = {"source": "small", "peer": "unrolled", "steps": STEPS, "rounds": 1, "reference": str(reference)}
    found = alone._answer(request)
    assert set(found["bytes"]) == {"2", "4"} and found["seconds"]["median"] > 0 and found["missing"] == []
    assert max(found["difference"].values()) < CLOSE


def test_the_command_keeps_what_failed_and_exits_for_what_is_wrong(capsys, monkeypatch, tmp_path):
    def measured(source, what, *_):
        good = {"seconds": {"median": 2.0}, "first_seconds": 9.0, "bytes": {"2": 0, "4": 4_000_000}, "missing": []}
        return {
            alone.REFERENCE: {"value": 1.0},
            alone.TRAINING: {"seconds": {"median": 1.0}, "parameters": 5},
            "higher": {"error": "ImportError: no | such thing"},
            "mgd": good | {"difference": {"lr": 1e-6}},
        }.get(what, good | {"difference": {"lr": float("nan")}, "missing": ["weight_decay"]})

    monkeypatch.setattr(alone, "measure", measured)
    page = tmp_path / "peers.md"
    page.write_text(f"# Peers\n\n{table.BEGIN}\nold\n{table.END}\n\nWords.\n")
    arguments = ["bench", "peers", "--workload", "small", "--peers", "torchopt,higher,mgd", "--steps", STEPS]
    out, _ = run(capsys, *arguments, "--page", page, "--json", tmp_path / "a.json", code=1)
    assert "More than 0.01 from float64: torchopt on small." in out and "no | such thing" in out
    (found,) = json.loads((tmp_path / "a.json").read_text())["results"]
    assert found["peers"]["mgd"]["difference"]["lr"] == 1e-6 and "error" in found["peers"]["higher"]
    text = page.read_text()
    assert "old" not in text and text.endswith("Words.\n") and (tmp_path / "peers.png").stat().st_size > 1000
    assert "| | **mgd** | 2.00 | 9.0 s | 4 MB | 2 MB | 1e-06 |" in text
    assert "WRONG" in text and "no \\| such thing" in text

    again = tmp_path / "again.md"  # the page from what was recorded, without measuring
    again.write_text(f"{table.BEGIN}\n{table.END}\n")
    monkeypatch.setattr(alone, "measure", None)
    run(capsys, "bench", "peers", "--recorded", tmp_path / "a.json", "--page", again, code=1)
    assert "1e-06" in again.read_text()


def test_a_page_without_the_marks_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(BadArgument, match="to have the line"):
        command.command(page=page)


def test_the_error_of_a_process_is_named():
    lines = ["Traceback (most recent call last):", '  File "x.py", line 1', "torch.Unsupported: no", "", "  hint"]
    assert alone._last_error(lines) == "torch.Unsupported: no"
