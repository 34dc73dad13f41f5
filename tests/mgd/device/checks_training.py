"""Trainings on a pretended device. `test_device.py` runs them in a process of its own, as torch keeps a device."""

from __future__ import annotations

import warnings

import cases
import device_cases
import interruptions
import pretended
import pytest
import torch
from device_cases import PRETENDED, moved, on, pretended_only, same
from torch import nn

import mgd
from mgd.autodiff import payoff
from mgd.errors import NotDeterministic
from mgd.step import class_weights
from mgd_kernels import Arena, Muon

CASES = {
    "mlp": device_cases.mlp,
    "convnet": device_cases.convnet,
    "gpt": device_cases.gpt,
    "clipped": lambda: device_cases.mlp(max_grad_norm=0.5),
    "microbatches": lambda: device_cases.mlp(microbatches=3, max_grad_norm=0.5),
    "matrices": lambda: device_cases.mlp(optimizer=Muon()),
}


RUNS = [*((name, False) for name in CASES), ("mlp", True), ("convnet", True)]  # the gpt: `make bench-gpu`


@pytest.mark.parametrize(("name", "trace"), RUNS)
def test_a_metagradient_is_that_of_the_cpu(name, trace):
    case = CASES[name]()
    found = on(case, PRETENDED).metagradient(trace=trace)
    assert all(x.device == PRETENDED for x in found.model_state.values())
    same(found, on(case, "cpu").metagradient(trace=trace))


def test_the_last_steps_and_their_anchor_are_those_of_the_cpu():
    """The steps before them train with another z, whose tables lie on the device."""
    found = []
    for device in (PRETENDED, "cpu"):
        case = on(device_cases.mlp(since=3), device)
        f, z = case.function(), case.z
        result = f.metagradient(z)
        lr = torch.full((len(case),), 0.05, device=device)
        found.append([f.anchored(z | {"lr": lr}).value(z), result.value, *result.grads.values()])
        found[-1].append(result.report.adjoint_norms[-3:])
    for ours, theirs in zip(*found, strict=True):
        assert cases.relative_error(moved(ours, "cpu"), theirs) < 1e-5
    assert not torch.equal(found[1][0], found[1][1])


@pytest.mark.parametrize(
    ("tiers", "trace"), [("device", False), ("host", False), ("disk", False), ("all", False), ("all", True)]
)
def test_every_tier_gives_the_same_bits(tiers, trace, tmp_path):
    case = on(device_cases.convnet(), PRETENDED)
    expected = case.metagradient(trace=trace)
    parts = {"device": "24KB", "host": "24KB", "disk": (tmp_path, "1MB")}
    found = case.metagradient(trace=trace, budget=mgd.Budget(**{k: v for k, v in parts.items() if tiers in (k, "all")}))
    for key, gradient in expected.grads.items():
        assert torch.equal(found.grads[key], gradient), key
    assert (found.report.store is not None) == (tiers != "device")


def test_two_calls_give_the_same_bits():
    """A device's own thread counts the nodes of a gradient's graph apart from those of the loss's, and so would add in
    another order from call to call."""
    found = [on(device_cases.convnet(), PRETENDED).metagradient(trace=False) for _ in range(3)]
    for key, gradient in found[0].grads.items():
        assert all(torch.equal(each.grads[key], gradient) for each in found[1:]), key


def training(**options):
    """The training of `interruptions`, on the device."""
    f, z = interruptions.training(steps=14, **options)
    case = cases.Case(f.model, f.loss, f.batches, f.optimizer, f.objective, z)
    there = on(case, PRETENDED)
    return there.function(), there.z


@pytest.mark.parametrize("n", [9, 20], ids=["forward", "backward"])
def test_an_interrupted_run_continues_there(n, tmp_path, often, interrupt):
    f, z = training()
    expected = f.metagradient(z)
    stopped, _ = interrupt(lambda: f.metagradient(z, resume=tmp_path / "run"), n)
    assert stopped is None
    assert interruptions.same(training()[0].metagradient(z, resume=tmp_path / "run"), expected)


@pretended_only
def test_of_two_devices_the_models_own_one_is_used():
    second = torch.device("pretend:1")
    case = device_cases.mlp(max_grad_norm=0.5)
    found = on(case, second).metagradient(budget=mgd.Budget(device="2KB", host="1MB"))
    same(found, on(case, PRETENDED).metagradient(), tolerance=0)
    assert found.grads["data_weights"].device == second


def test_defaults_of_torch_change_nothing(tmp_path):
    case = on(device_cases.convnet(), PRETENDED)
    budget = mgd.Budget(device="4KB", host="16KB", disk=(tmp_path, "1MB"))
    expected = case.metagradient()
    try:
        torch.set_default_device(PRETENDED)
        torch.set_default_dtype(torch.float64)
        found = case.metagradient(budget=budget)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    same(found, expected, tolerance=0)


def test_numbers_of_z_join_the_model():
    case = on(device_cases.mlp(), PRETENDED)
    loss = lambda model, batch, z: z["scale"] * cases.weighted(model, batch, z)
    objective = lambda model: cases.weighted(model, case.batches[0], case.z)
    case = case.but({"scale": 1.5, "weight_decay": 0.1}, loss=loss, objective=objective)
    found = case.metagradient()
    assert found.grads["scale"].device == PRETENDED and found.grads["scale"] != 0


def test_a_check_in_double_precision_warns_of_nothing():
    case = on(device_cases.mlp(steps=4, dropout=0.0), PRETENDED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mgd.check(case.function(), case.z).passed


def test_forward_mode():
    case = on(device_cases.mlp(max_grad_norm=0.5), PRETENDED)
    f, dz = case.function(), {"lr": torch.full((8,), 1e-2, device=PRETENDED)}
    along = f.jvp(case.z, dz).tangent
    assert torch.allclose(along, (f.metagradient(case.z).grads["lr"] * dz["lr"]).sum(), rtol=1e-4)


# --- deterministic operators -------------------------------------------------------------------------------------


def pooled() -> cases.Case:
    """Its pooling has no deterministic backward pass on the device."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    return on(cases.supervised(model, (1, 6, 6), steps=3).to(torch.float32), PRETENDED)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", [class_weights.cross_entropy, class_weights.nll_loss])
def test_losses_of_more_dimensions_are_taken_over_rows(loss, reduction):
    x, y = torch.randn(6, 3, 2, 5), torch.randint(3, (6, 2, 5))
    y.view(-1)[1] = -100
    for options in ({}, {"weight": torch.rand(3)}):
        expected = loss(x, y, reduction=reduction, **options)
        found = loss(*moved((x, y), PRETENDED), reduction=reduction, **moved(options, PRETENDED))
        torch.testing.assert_close(found.cpu(), expected)


@pretended_only
def test_an_operator_that_varies_is_named():
    with pytest.raises(NotDeterministic, match="adaptive_avg_pool2d_backward") as error:
        pooled().metagradient(trace=False)
    assert error.value.op == "_adaptive_avg_pool2d_backward_pretend"


@pretended_only
@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_the_callers_settings_come_back(before):
    f = on(device_cases.mlp(), PRETENDED).function()
    inside = []
    f.batches = [*f.batches[:-1], f.batches[-1]]
    loss = f.loss
    f = f.replaced(loss=lambda *args: (inside.append(torch.are_deterministic_algorithms_enabled()), loss(*args))[1])
    z = on(device_cases.mlp(), PRETENDED).z
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        f.train(z)
        with pytest.raises(NotDeterministic):
            pooled().metagradient(trace=False)
        found = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(inside) and found == before


# --- budgets -----------------------------------------------------------------------------------------------------


@pretended_only
def test_the_default_budget_counts_what_the_allocator_holds(monkeypatch):
    f = on(device_cases.mlp(), PRETENDED).function()
    before = f.plan().limits["device"]
    monkeypatch.setattr(torch.pretend, "cached", pretended.MEMORY // 2)
    assert abs(f.plan().limits["device"] - before) < 1 << 16  # some tensors may have gone meanwhile


@pretended_only
def test_the_default_budget_leaves_room_for_second_derivatives():
    f = on(device_cases.mlp(), PRETENDED).function()
    assert f.plan().limits["device"] > 0.4 * pretended.MEMORY
    f._residuals = pretended.MEMORY // 8  # as a captured step may have measured
    assert f.plan().limits["device"] <= pretended.MEMORY // 2
    f._residuals = pretended.MEMORY // 5
    assert f.plan().limits["device"] < 0.2 * pretended.MEMORY


# --- when a capture pays -----------------------------------------------------------------------------------------


@pretended_only
@pytest.mark.parametrize("per_node", [1e-12, 1e3])
def test_a_capture_is_decided_by_the_time_of_the_device(per_node, monkeypatch):
    """It takes 10 µs for a launch, whatever the host does; nobody waits for it."""
    monkeypatch.setattr(payoff, "_rate", payoff.Rate(per_node))
    monkeypatch.setattr(payoff, "IMPORT", 0.0)
    f = on(device_cases.mlp(steps=6), PRETENDED).function()
    result = f.metagradient(on(device_cases.mlp(steps=6), PRETENDED).z)
    assert (result.report.execution == "captured") == (per_node < 1)
    (kind,) = f._evaluator.payoff._kinds.values()
    launches = kind.gradient / 1e-5
    assert 20 < launches < 1000 and abs(launches - round(launches)) < 1e-3
    assert kind.measured == (2 if per_node < 1 else 5)


# --- copies and casts --------------------------------------------------------------------------------------------


@pretended_only
def test_a_16_bit_model_is_cast_at_once():
    """One launch for all of its parameters, and none where nothing was written since."""
    model = cases.mlp().to(PRETENDED, torch.bfloat16)
    arena = Arena.of(model)
    flat = arena.flatten(model)
    for written, launches in ((True, 1), (False, 0), (True, 1)):
        flat.add_(1.0) if written else None
        with pretended.counted() as found:
            tensors = arena.tensors(flat)
        assert found.launches == launches
        assert all(torch.equal(x, y.bfloat16()) for x, y in zip(tensors, arena.slices(flat), strict=True))


@pytest.mark.filterwarnings("ignore:the model computes in")
@pytest.mark.parametrize("device", [PRETENDED, "cpu"])
def test_the_copy_of_a_16_bit_model_is_never_an_old_one(device, monkeypatch, tmp_path):
    """Whoever wrote the parameters: a step, several at once, a snapshot that was loaded."""
    case = on(device_cases.mlp(dropout=0.0).to(torch.bfloat16), device)
    budget = mgd.Budget(device="1KB", host="4KB", disk=(tmp_path, "1MB"))
    found = case.metagradient(trace=False, budget=budget)
    monkeypatch.setattr(Arena, "rounded", lambda arena, flat: flat.to(arena.dtypes[0]))
    same(found, case.metagradient(trace=False), tolerance=0)
