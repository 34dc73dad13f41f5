"""The benchmarks: what they compare with is right, they notice what is wrong, and they measure what they say."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mgd.bench import baselines, kernel_cases, memory, methods, peak, throughput, timing, workloads, workloads_lora
from mgd.bench.cases import Case, load
from mgd.bench.kernels import PRECISE, static_rows
from mgd.cli import main as cli
from mgd.errors import BadArgument
from mgd.recipes.models import encoder, wordpiece
from mgd_kernels import SGD, Adam, AdamW, RMSprop

# Float32 rounding of sums over a batch, carried through a few steps of Adam: measured up to 2e-5.
CLOSE = 2e-4


def run(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    assert (end.value.code or 0) == code, out.err
    return " ".join(out.out.split()), out.err


def tiny(name: str) -> workloads.Workload:
    return {
        "small": lambda: workloads.small(6),
        "convnet-batch": lambda: workloads.convnet("batch", 2, width=8),
        "gpt": lambda: workloads.gpt(2),
        "lora": lambda: workloads_lora.lora(2, size=2, length=8, count=2),
    }[name]()


# --- the comparison in plain torch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "convnet-batch", "gpt", "lora"])
def test_plain_torch_finds_the_metagradient(name):
    workload = tiny(name)
    if name == "lora":  # on two examples a step, float32 leaves three digits of their weights' gradient
        workload.model.double()
    dtype = next(workload.model.parameters()).dtype
    function, z = workload.function(trace=False), {key: value.to(dtype) for key, value in workload.z().items()}
    wanted = function.metagradient(z)
    assert all(float(g.norm()) > 0 for g in wanted.grads.values())
    for method in (baselines.unrolled, baselines.states, baselines.sqrt):
        value, grads = method(function, z)
        torch.testing.assert_close(value, wanted.value, rtol=1e-5, atol=0)
        assert max(methods.differences(grads, wanted.grads).values()) < CLOSE, method.__name__


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(lr=0.1, weight_decay=1e-2),
        SGD(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=1e-2),
        SGD(lr=0.1, momentum=0.9, nesterov=True, decoupled=True, weight_decay=1e-2),
        Adam(lr=1e-3, eps_root=1e-6, weight_decay=1e-2),
        AdamW(lr=1e-3, eps_root=1e-6),
        RMSprop(lr=1e-3, eps_root=1e-6),
    ],
    ids=lambda o: type(o).__name__ + "-".join(getattr(getattr(o, "rule", None), "slots", ())),
)
def test_plain_torch_knows_the_update_rules_clipping_and_microbatches(optimizer):
    workload = workloads.small(5)
    function = workload.function(trace=False).replaced(optimizer=optimizer, max_grad_norm=0.5, microbatches=2)
    z = {"lr": torch.full((5,), 1e-2), "data_weights": torch.ones(workload.examples)}
    wanted = function.metagradient(z)
    for method in (baselines.unrolled, baselines.sqrt):
        assert max(methods.differences(method(function, z)[1], wanted.grads).values()) < CLOSE


def test_plain_training_takes_the_same_steps():
    workload = workloads.small(5)
    function = workload.function().replaced(optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=1e-2), max_grad_norm=0.5)
    z = {"lr": torch.linspace(0.1, 0.02, 5), "data_weights": torch.ones(workload.examples)}
    training = baselines.Training(function, z)
    wanted = function.train(z).parameters
    for _ in range(2):
        training.reset()
        training()
        for name, parameter in training.model.named_parameters():
            torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-5, atol=1e-6)


def test_what_plain_torch_cannot_do_is_said():
    workload = workloads.small(2)
    groups = AdamW(param_groups=[{"params": "0.*", "lr": 0.1}])
    with pytest.raises(baselines.Unsupported, match="parameter groups"):
        baselines.unrolled(workload.function().replaced(optimizer=groups), workload.z())
    with pytest.raises(baselines.Unsupported, match="one objective"):
        baselines.states(workload.function().replaced(objective=workload.objectives(2)), workload.z())


def test_many_objectives_have_the_mean_of_one():
    case = load("small", 4)
    one, many = (methods.METHODS[name].prepare(case)() for name in ("eager", "objectives"))
    torch.testing.assert_close(one.value, many.value, rtol=1e-5, atol=0)
    assert max(methods.differences(many.grads, one.grads).values()) < CLOSE


# --- cases and timing ----------------------------------------------------------------------------------------------


def test_a_shortened_case_is_the_head_of_the_training():
    case = load("small", 6)
    case.z["lr"] = torch.arange(6.0)
    short = case.shortened(4)
    assert len(short) == 4 and short.z["lr"].tolist() == [0, 1, 2, 3]
    assert short.z["data_weights"] is case.z["data_weights"]
    assert all(torch.equal(short.function.batches[t][0], case.function.batches[t][0]) for t in range(4))


def test_ratios_are_to_the_trainings_just_before_and_after(monkeypatch):
    clock = iter([1.0, 6.0, 2.0, 9.0, 1.0, 8.0, 3.0, 2.0, 1.0])  # training, a, training, b, training; b, ...
    called = []
    monkeypatch.setattr(timing, "seconds_of", lambda work, device: called.append(work()) or next(clock))
    trainings, found = timing.alternate(2, lambda: "train", {"a": lambda: "a", "b": lambda: "b"})
    assert called == ["train", "a", "train", "b", "train", "b", "train", "a", "train"]
    assert found["a"].ratios == [4.0, 1.0] and found["b"].ratios == [6.0, 4.0]
    assert trainings == [1.0, 2.0, 1.0, 3.0, 1.0]
    assert timing.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx({"median": 3.5, "q20": 2.0, "q80": 5.0})


def test_pinning_ends_with_the_block():
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with timing.pinned(-1) as done:
        assert os.sched_getaffinity(0) == {max(before)} and done == {"threads": 1, "core": max(before)}
    assert os.sched_getaffinity(0) == before and torch.get_num_threads() == threads
    with pytest.raises(BadArgument, match="a core among"), timing.pinned(9999):
        pass
    assert os.sched_getaffinity(0) == before


# --- memory --------------------------------------------------------------------------------------------------------


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


def in_this_process(source, method, steps=None, device="cpu", options=None, rounds=0, core=None):
    request = {"source": source, "method": method, "steps": steps, "device": device, "rounds": rounds, "core": core}
    return peak._answer(request | {"options": options or {}})


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


# --- the commands --------------------------------------------------------------------------------------------------


def test_throughput_writes_table_json_and_page(capsys, tmp_path):
    out, _ = run(
        capsys, *"bench throughput --workload small --steps 8 --methods sqrt,traced --rounds 1 --no-memory".split(),
        "--json", tmp_path / "t.json", "--out", tmp_path / "page",
    )  # fmt: skip
    found = json.loads((tmp_path / "t.json").read_text())
    (result,) = found["results"]
    assert found["command"] == "bench throughput" and found["machine"]["versions"]["torch"] == torch.__version__
    assert result["steps"] == 8 and result["parameters"] == 26_122 and result["threads"] == 1
    assert set(result["methods"]) == {"sqrt", "traced"}
    for entry in result["methods"].values():
        assert entry["agrees"] and entry["ratio"]["median"] > 1 and max(entry["difference"].values()) < CLOSE
    assert result["methods"]["traced"]["phases"]["hvp"] > 0 and result["methods"]["traced"]["execution"] == "traced"
    assert "small: 8 steps, 26,122 trained parameters" in out and "traced" in out
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
    assert line[0] == "unrolled (4 steps)" and line[4].startswith("~")


def test_kernels_compares_with_float64(capsys, tmp_path, monkeypatch):
    arguments = "bench kernels --parameters 70k --rounds 1 --json".split()
    run(capsys, *arguments, tmp_path / "k.json")
    rows = json.loads((tmp_path / "k.json").read_text())["rows"]
    assert [row["bytes_per_parameter"] for row in rows] == [28, 44, 56, 20, 32, 48]
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


# --- the LoRA workload ---------------------------------------------------------------------------------------------


def test_word_pieces_are_the_longest_there_are():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##able", "##a", "unable", "play", "##ing", "!"]
    tokenize = wordpiece.WordPiece({word: i for i, word in enumerate(words)})
    assert tokenize("Unable playing!", 8) == [2, 7, 8, 9, 10, 3, 0, 0]
    assert tokenize("una xyz", 8) == [2, 4, 6, 1, 3, 0, 0, 0]
    assert tokenize("play play play play", 4) == [2, 8, 8, 3]


def test_the_encoder_ignores_padding_and_lora_begins_as_the_frozen_model():
    torch.manual_seed(0)
    model = encoder.Encoder(3).eval()
    tokens = torch.randint(1, 1000, (2, 6))
    with torch.no_grad():
        plain = model(tokens)
        torch.testing.assert_close(model(F.pad(tokens, (0, 3))), plain, rtol=1e-4, atol=1e-5)
        model.freeze()
        torch.testing.assert_close(model(tokens), plain)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * encoder.LAYERS + 2 and isinstance(model.layers[0].query.base, nn.Linear)
    assert sum(label == 2 for _, label in workloads_lora.snippets(3)) == 3
