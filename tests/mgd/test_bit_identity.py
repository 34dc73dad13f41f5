"""The same bits from every run, plan, budget and thread count."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, TOLERANCE, convnet, errors, initial, mlp, seeded, supervised
from same_bits import STEPS, cases, same
from torch import nn

import mgd
from mgd.plan.actions import Advance, Drop, Load, Reverse, Save


@pytest.mark.parametrize("name", ["mlp", "convnet", "gpt"])
def test_repeated_runs(name):
    case = cases()[name].to(torch.float32).but({"init": initial(cases()[name].to(torch.float32).model)})
    f = case.function()
    first = f.metagradient(case.z)
    assert same(f.metagradient(case.z), first)
    torch.manual_seed(12345)
    assert same(case.metagradient(), first)


SCHEDULES = ["log", "revolve", "kary", "kary:3", "sqrt", "binary", "all", "auto"]


@pytest.mark.parametrize("name", ["mlp", "convnet", "gpt"])
def test_every_schedule(name):
    case = cases()[name].to(torch.float32)
    first, steps = case.metagradient(), set()
    for schedule in SCHEDULES:
        result = case.metagradient(schedule=schedule)
        assert same(result, first), schedule
        assert result.report.counts["model steps"] == result.report.plan["model_steps"]
        steps.add(result.report.counts["model steps"])
    assert len(steps) > 3  # the schedules did differ in what they recomputed


def test_every_budget_that_fits():
    case = cases()["mlp"].to(torch.float32)
    f = case.function()
    first, sizes = f.metagradient(case.z), f.plan().sizes
    steps = []
    for snapshots, gradients in [(1, 0), (1, 1), (2, 0), (2, 3), (3, 5), (1, STEPS), (STEPS, STEPS)]:
        host = snapshots * sizes.snapshot + gradients * sizes.gradient
        result = case.metagradient(budget=mgd.Budget(host=host))
        assert same(result, first), host
        assert sum(result.report.plan["peak"].values()) <= host
        steps.append(result.report.counts["model steps"])
    assert max(steps) > min(steps) == STEPS


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_log_and_snapshots_on_disk(name, tmp_path):
    """With running statistics in every entry; nothing is left behind."""
    case = cases()[name].to(torch.float32)
    first = case.metagradient()
    for schedule in ("log", "revolve", "auto"):
        result = case.metagradient(schedule=schedule, budget=mgd.Budget(disk=(tmp_path / "log", "100MB")))
        assert same(result, first), schedule
        assert result.report.plan["peak"]["disk"] > 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class Scripted:
    """A plan that no planner would make: it loads, replays and rebuilds the same stretches again and again."""

    T = STEPS
    peak: ClassVar = {}
    limits: ClassVar = {}

    def __init__(self, sizes, logged):
        self.sizes, self.logged = sizes, logged

    def actions(self):
        yield Save(0, "host")
        yield Advance(STEPS - 4, "host" if self.logged else None)
        yield Save(STEPS - 4, "host")
        yield Advance(STEPS - 1, "host")
        yield Reverse(STEPS - 1)
        for t in reversed(range(STEPS - 1)):
            yield Load(0)
            if t >= STEPS - 4:
                yield Load(STEPS - 4)
            elif t == STEPS - 5:
                yield Drop(STEPS - 4)
            yield Advance(t)
            yield Reverse(t)
        yield Drop(0)

    def to_dict(self):
        return {}


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("name", ["mlp", "convnet", "gpt"])
def test_wasteful_plans(name, logged, monkeypatch):
    case = cases()[name].to(torch.float32)
    first = case.metagradient()
    monkeypatch.setattr("mgd.plan.training.plan", lambda steps, sizes, *_, **__: Scripted(sizes, logged))
    result = case.metagradient()
    assert same(result, first)
    replayed = 0 if logged else sum(range(STEPS - 4)) + STEPS - 4
    assert result.report.counts["model steps"] == STEPS + replayed


def test_threads_of_the_kernels(monkeypatch):
    """Elementwise kernels and their reductions split their work by the number of threads, and agree to the bit."""
    wide = seeded(lambda: nn.Sequential(nn.Linear(5, 12000), nn.Tanh(), nn.Linear(12000, CLASSES)))()
    case = supervised(wide, (5,), 4, max_grad_norm=0.1).to(torch.float32)
    first = case.metagradient()
    assert first.report.backend == "cpu"
    for threads in (2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert same(case.metagradient(), first), threads


@pytest.mark.parametrize("name", ["mlp", "convnet", "gpt"])
def test_training_alone_ends_in_the_same_state(name):
    case = cases()[name].to(torch.float32)
    f = case.function()
    result, trained = f.metagradient(case.z), f.train(case.z)
    assert torch.equal(f.value(case.z), result.value)
    assert torch.equal(trained.losses, result.losses) and trained.losses.shape == (STEPS,)
    assert all(torch.equal(trained.model_state[n], result.model_state[n]) for n in result.model_state)


def test_the_trained_state_is_that_of_the_reference():
    case = supervised(convnet(), (1, 6, 6), STEPS, microbatches=2)
    trained, expected = case.function().train(case.z), case.unrolled()
    assert trained.optimizer_state["step"] == STEPS
    found = [
        trained.parameters,
        trained.optimizer_state["exp_avg"],
        trained.optimizer_state["exp_avg_sq"],
        trained.buffers,
    ]
    wanted = [expected.parameters, expected.slots["exp_avg"], expected.slots["exp_avg_sq"], expected.buffers]
    for mine, theirs in zip(found, wanted, strict=True):
        assert set(mine) == set(theirs)
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype
            assert torch.allclose(mine[name], tensor, rtol=1e-10, atol=1e-14), name
    # A loss is the sum of its microbatches' means, added in another order.
    assert torch.allclose(trained.losses, torch.tensor(expected.losses, dtype=torch.float64), rtol=1e-12)


def test_the_trained_model_loads_into_the_users():
    case = supervised(convnet(), (1, 6, 6), STEPS)
    f = case.function()
    value = f.value(case.z)
    case.model.load_state_dict(f.train(case.z).model_state)
    # torch's own BatchNorm in eval mode rounds differently from the differentiable one.
    assert torch.allclose(case.objective(case.model), value, rtol=1e-12)


def test_new_traces_give_the_same_bits():
    first, again = (cases()["mlp"].to(torch.float32).metagradient(trace=True) for _ in range(2))  # of two models
    assert "capture" in again.report.seconds and same(first, again)


def test_a_trace_is_not_replayed_for_other_names():
    """At the value 1 both losses agree to the bit, and have opposite derivatives."""

    def loss(model, batch, z):
        return F.cross_entropy(model(batch[0]) * (z["scale"] if "scale" in z else 1 / z["temperature"]), batch[1])

    case = supervised(mlp(), (5,)).but(loss=loss)
    f, one = case.function(trace=True), torch.ones((), dtype=torch.float64)
    scale = f.metagradient({"scale": one}).grads["scale"]
    temperature = f.metagradient({"temperature": one}).grads["temperature"]
    assert scale.item() == pytest.approx(-temperature.item(), rel=1e-10)


def test_a_trace_is_not_replayed_for_other_modes_or_parameters():
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.3), nn.Linear(5, 5), nn.Linear(5, CLASSES)))()
    case = supervised(model, (5,))
    f = case.function(trace=True)
    for mode, frozen in ((True, 0), (False, 0), (False, 2)):
        model.train(mode).requires_grad_(True)[frozen].requires_grad_(False)
        result = f.metagradient(case.z)
        assert result.report.execution == "captured"
        assert max(errors(result, case.unrolled()).values()) < TOLERANCE[torch.float64]
