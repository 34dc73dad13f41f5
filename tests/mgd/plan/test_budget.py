"""What a memory budget promises: the same bits, within its limits, or an error that names the least that works."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from cases import adamw, convnet, held_out, initial, mlp, supervised
from counting import counted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import mgd
from mgd.errors import BadArgument, BudgetTooSmall
from mgd.plan.plan import SCHEDULES
from mgd.plan.training import STAGING
from mgd_kernels import SGD, UpdateRule


def same(a, b) -> bool:
    values = [(r.value, r.losses, r.grads, r.model_state) for r in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*map(tree_leaves, values), strict=True))


def rmsprop() -> UpdateRule:
    def update(params, state, grad, hyper, step):
        square = 0.9 * state["square"] + 0.1 * grad * grad
        return params - hyper["lr"] * grad / (square + 1e-3).sqrt(), {"square": square}

    return UpdateRule(update, slots=("square",), defaults={"lr": 1e-2})


OPTIMIZERS = {
    "plain": lambda: SGD(lr=0.1),
    "nesterov": lambda: SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": adamw,
    "custom": rmsprop,
}
MODELS = {"dropout": lambda: (mlp(0.3), (5,)), "buffers": lambda: (convnet(), (1, 6, 6))}


def function(model: str, optimizer: str, T: int, microbatches: int, **options) -> tuple[mgd.TrainingFunction, dict]:
    network, shape = MODELS[model]()
    case = supervised(network, shape, T, optimizer=OPTIMIZERS[optimizer]()).to(torch.float32)
    case = case.but({"init": initial(case.model)})
    return case.function(microbatches=microbatches, trace=False, max_grad_norm=0.5, **options), case.z


@cache
def reference(*what) -> mgd.Metagradient:
    f, z = function(*what)
    return f.metagradient(z)


@settings(max_examples=settings.default.max_examples // 4, deadline=None)
@given(data=st.data())
def test_any_budget_gives_the_same_bits_or_names_the_least_that_works(tmp_path_factory, data):
    model, optimizer = data.draw(st.sampled_from(sorted(MODELS))), data.draw(st.sampled_from(sorted(OPTIMIZERS)))
    what = model, optimizer, data.draw(st.sampled_from([1, 2, 5, 8])), data.draw(st.sampled_from([1, 3]))
    schedule = data.draw(st.sampled_from(SCHEDULES))
    directory = tmp_path_factory.mktemp("log")
    size = function(*what)[0].plan().sizes
    room = st.builds(lambda s, g, odd: s * size.snapshot + g * size.gradient + odd, *[st.integers(0, 5)] * 3)
    # Where there is a disk, the first bytes of the host part are its buffers.
    host = st.one_of(room, room.map(lambda x: STAGING + x))
    parts = data.draw(
        st.fixed_dictionaries({}, optional={"host": host, "device": room, "disk": room.map(lambda x: 3 * x)})
    )
    if "disk" in parts:
        parts["disk"] = directory, parts["disk"]
    budget = mgd.Budget(**parts)
    f, z = function(*what, schedule=schedule, budget=budget)
    try:
        f.plan()
    except BudgetTooSmall as refused:
        assert refused.has == budget.limits() and set(refused.needs) == set(refused.has)
        tier = data.draw(st.sampled_from(sorted(refused.needs)))

        def with_room(room: int) -> mgd.TrainingFunction:
            return f.replaced(budget=mgd.Budget(**parts | {tier: (directory, room) if tier == "disk" else room}))

        assert refused.needs[tier] > refused.has[tier]
        with pytest.raises(BudgetTooSmall):
            with_room(refused.needs[tier] - 1).metagradient(z)
        f = with_room(refused.needs[tier])
    result = f.metagradient(z)
    assert same(result, reference(*what))
    report, limits = result.report, f.budget.limits()
    assert report.counts["model steps"] == report.plan["model_steps"]
    for tier, limit in limits.items():
        assert report.plan["peak"][tier] <= limit
    if report.store:
        assert report.plan["peak"]["disk"] >= report.store["disk"]["peak"] > 0
        buffers = max(0, limits.get("host", 0) - STAGING) // 2 + STAGING
        assert report.store["pool"]["peak"] <= buffers
    assert not list(directory.iterdir()), "the scratch directory is gone"


def test_entries_are_as_large_as_their_files(tmp_path):
    """The log is planned in bytes of files, since that is what they take; a disk with room for exactly it is enough."""
    f, z = function("buffers", "adamw", 6, 2, schedule="log", budget=mgd.Budget(disk=(tmp_path, "1GB")))
    planned = f.plan()
    full = mgd.Budget(disk=(tmp_path, planned.peak["disk"]))
    tight = f.replaced(budget=full).metagradient(z)
    assert same(tight, f.metagradient(z))
    assert tight.report.store["disk"]["peak"] == tight.report.plan["peak"]["disk"]


def test_the_refusal_speaks_of_the_users_budget(tmp_path):
    """Not of what is left of it when the buffers are taken off."""
    budget = mgd.Budget(host=STAGING + 1000, disk=(tmp_path / "x", 100))
    f, z = function("dropout", "adamw", 20, 1, budget=budget, schedule="log")
    with pytest.raises(BudgetTooSmall, match=re.escape("got host 33,555,432 bytes, disk 100 bytes")) as refused:
        f.metagradient(z)
    needs = refused.value.needs
    assert f"host {needs['host']:,} bytes or disk {needs['disk']:,} bytes" in str(refused.value)
    assert needs["host"] > STAGING > needs["disk"]
    assert not (tmp_path / "x").exists(), "nothing was begun"


def test_a_resumable_run_that_does_not_fit_is_refused_and_works_with_more(tmp_path):
    f, z = function("dropout", "adamw", 6, 1, budget=mgd.Budget(disk=(tmp_path, 1000)))
    with pytest.raises(BudgetTooSmall) as refused:
        f.metagradient(z, resume=tmp_path / "run")
    for room, works in ((refused.value.needs["disk"] - 1, False), (refused.value.needs["disk"], True)):
        g = f.replaced(budget=mgd.Budget(disk=(tmp_path, room)))
        if works:
            assert same(g.metagradient(z, resume=tmp_path / "run"), reference("dropout", "adamw", 6, 1))
        else:
            with pytest.raises(BudgetTooSmall):
                g.metagradient(z, resume=tmp_path / "run")


@pytest.mark.parametrize("schedule", ["auto", "all", "binary", "revolve"])
def test_a_resumable_run_keeps_its_disk_budget(tmp_path, schedule):
    """Whatever is deleted late: the checkpoints, the trained state and dropped snapshots are within it, too."""
    what = "dropout", "adamw", 60, 1
    f, z = function(*what, schedule=schedule, budget=mgd.Budget(disk=(tmp_path, 1)))
    with pytest.raises(BudgetTooSmall) as refused:
        f.metagradient(z, resume=tmp_path / "run")
    limit = refused.value.needs["disk"]
    result = f.replaced(budget=mgd.Budget(disk=(tmp_path, limit))).metagradient(z, resume=tmp_path / "run")
    assert same(result, reference(*what))
    assert result.report.store["disk"]["peak"] <= limit


@pytest.mark.filterwarnings("ignore:the model computes in")
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_the_log_keeps_the_models_own_dtype(tmp_path, tier, microbatches):
    """A bfloat16 model, whose master parameters are float32: half the bytes, and the same bits."""
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 3)).to(torch.bfloat16)
    x, y = torch.randn(8, 64), torch.randint(3, (8,))
    loss = lambda m, batch, z: nn.functional.cross_entropy(m(batch[0]).float(), batch[1])

    def training(dtype: torch.dtype, **options):
        network = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 3)).to(dtype)
        network.load_state_dict(model.state_dict())
        f = mgd.TrainingFunction(
            network,
            loss,
            [(x.to(dtype), y)] * 9,
            optimizer=adamw(),
            objective=held_out(x, y),
            microbatches=microbatches,
            **options,
        )
        return f, f.metagradient({"lr": torch.full((9,), 1e-2)})

    budget = {"host": mgd.Budget(host="100MB"), "disk": mgd.Budget(disk=(tmp_path, "100MB"))}[tier]
    _, half = training(torch.bfloat16, budget=budget, schedule="log")
    _, whole = training(torch.float32, budget=budget, schedule="log")
    parameters = 64 * 256 + 256 + 768 + 32  # three numbers of the last bias are padded to a segment
    overhead = 12288 if tier == "disk" else 0  # a page of header, the losses, and rounding to pages
    logged = {dtype: r.report.plan["sizes"]["gradient"] for dtype, r in ((2, half), (4, whole))}
    for itemsize, size in logged.items():
        assert itemsize * parameters <= size <= itemsize * parameters + overhead
    assert half.model_state["0.weight"].dtype == torch.bfloat16
    if tier == "disk":
        gradients = [r.report.store["put"]["bytes"] - saved(r, parameters) for r in (half, whole)]
        assert gradients == [8 * (2 * parameters + 8 * microbatches), 8 * (4 * parameters + 8 * microbatches)]
    assert same(half, training(torch.bfloat16, schedule="revolve")[1]), "as computed anew, without a log"


def saved(result, parameters: int) -> int:
    """Bytes of snapshots that went to disk: float32 parameters and two moments each."""
    saves = result.report.plan["bytes_moved"]["disk"]["written"] - 8 * result.report.plan["sizes"]["gradient"]
    return saves // result.report.plan["sizes"]["snapshot"] * 12 * parameters


@pytest.mark.parametrize("resume", [False, True])
def test_a_full_log_on_disk_replays_nothing(tmp_path, resume):
    """The model runs exactly T times forward and backward, and once per step for the second derivatives. To know whose
    the directory is takes one more look at the first step."""
    made, counter = counted()
    made = made.but({"init": initial(made.model)})
    f = made.function(schedule="log", budget=mgd.Budget(disk=(tmp_path / "log", "10MB")))
    report = f.metagradient(made.z, resume=tmp_path / "run" if resume else None).report
    T = len(made)
    assert report.counts["model steps"] == report.counts["hvps"] == T
    assert report.plan["logged_gradients"]["disk"] == T - 1
    assert counter.calls == [*([0] if resume else []), *range(T), *reversed(range(T))]


def test_prediction_and_measurement_side_by_side(tmp_path):
    f, z = function("dropout", "adamw", 20, 1, schedule="log", budget=mgd.Budget(disk=(tmp_path, "10MB")))
    assumed = f.plan().costs
    report = f.metagradient(z).report
    assert list(report.predicted_seconds) == ["first sweep", "replay", "reverse sweep"]
    assert (
        set(report.measured_seconds) >= {"first sweep", "reverse sweep"} and min(report.measured_seconds.values()) >= 0
    )
    inside = report.seconds["training"] + report.seconds["update"]
    assert report.measured_seconds["first sweep"] >= inside
    lines = str(report).splitlines()
    assert any(line.startswith("first sweep ") and line.endswith(" s") for line in lines)
    assert any("written at" in line and report.store["disk"]["io"] in line for line in lines)
    costs = f.plan().costs
    assert costs != assumed
    assert 0 < costs.step <= report.seconds["training"] + report.seconds["update"]
    assert costs.hvp > 0 and costs.update > 0
    again = f.metagradient(z).report
    assert again.plan["costs"]["step"] == costs.step and again.predicted_seconds["first sweep"] >= 20 * costs.step
    memory_only = f.replaced(budget=mgd.Budget(host="1MB")).metagradient(z).report
    assert memory_only.store is None and "written at" not in str(memory_only)


@pytest.mark.parametrize("size", [float("inf"), float("nan"), -1, 1.5, True, [], b"1GB", object(), "9" * 5000, "1GBB"])
@pytest.mark.parametrize("tier", ["host", "device", "disk"])
def test_sizes_that_are_none(tier, size):
    with pytest.raises(BadArgument):
        mgd.Budget(**{tier: ("runs", size) if tier == "disk" else size})


def test_sizes_beyond_all_memory():
    for size in (10**30, 1e30, "9999999999999 TB"):
        assert mgd.Budget(disk=("runs", size)).limits() == {"disk": 1 << 62}
