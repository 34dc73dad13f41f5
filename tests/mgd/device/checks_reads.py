"""What makes the host wait for a device, and what is found late because it does not."""

from __future__ import annotations

import cases
import device_cases
import pretended
import pytest
import torch
from device_cases import PRETENDED, on, same
from torch import nn

import mgd
from mgd.autodiff.kept_graph import KeptGraphs
from mgd.errors import NonFiniteState, ReplayDivergence
from mgd.step import reads
from mgd.step.agreement import Agreement
from mgd.step.reads import Reads
from mgd.sweep.history import VIEWED
from mgd_kernels import AdamW

STEPS = 32


@pytest.fixture
def no_rounding(monkeypatch):
    """Rounding, a matter of the processor, does not make a step look closer at its gradient, which reads numbers."""
    monkeypatch.setattr(Agreement, "_largest", lambda *arguments: 0.0)


def waits(case: cases.Case, **options) -> tuple[int, mgd.Metagradient]:
    f = case.function(**options)
    with pretended.counted() as found:
        result = f.metagradient(case.z)
    return sum(found.waited.values()), result


@pytest.mark.parametrize(("trace", "clip"), [(False, None), (False, 0.5), (True, 0.5)])
def test_a_step_waits_for_nothing(trace, clip, no_rounding):
    """Twice as many steps, between the same two reads, make no more waits."""
    counts = {}
    for steps in (STEPS // 2, STEPS):
        case = on(device_cases.mlp(steps=steps, max_grad_norm=clip), PRETENDED)
        counts[steps], result = waits(case, trace=trace, budget=mgd.Budget(device="100KB"))
        assert result.report.counts["rebuilt steps"] and result.report.counts["model steps"] >= steps
    assert counts[STEPS] <= counts[STEPS // 2] + 2  # one a step would make 16 more; the first does what is done once


def test_now_and_then_the_numbers_are_read(monkeypatch, no_rounding):
    assert reads.EVERY == 64
    monkeypatch.setattr(reads, "EVERY", 16)
    few, many = (waits(on(device_cases.mlp(steps=steps), PRETENDED), trace=False)[0] for steps in (14, 46))
    assert many - few == 2 * 2 * 2  # two times in each of the two sweeps: for numbers, and for the device's clock


def test_the_log_on_the_host_is_written_behind_and_replayed_several_steps_at_once(monkeypatch, no_rounding):
    """Copies that take as long as 20 launches make nobody wait. Those that take for ever give the same bits."""
    runs: list[int] = []
    replay = AdamW.replay_
    counted = lambda self, state, grads, *rest: (runs.append(len(grads)), replay(self, state, grads, *rest))[1]
    monkeypatch.setattr(AdamW, "replay_", counted)
    counts, found = {}, []
    for steps, lag in ((STEPS // 2, 20), (STEPS, 20), (STEPS, 1 << 60)):
        case = on(device_cases.mlp(steps=steps, max_grad_norm=0.5), PRETENDED)
        with pretended.lagging(lag):
            counts[steps, lag], result = waits(case, trace=False, budget=mgd.Budget(device="3KB", host="1MB"))
        found.append(result)
        assert result.report.counts["rebuilt steps"] == sum(runs) > 1.5 * len(runs) and max(runs) == VIEWED, runs
        assert result.report.store["put"] is not None and result.report.counts["model steps"] == steps
        runs.clear()
    assert counts[STEPS, 20] <= counts[STEPS // 2, 20] + 2 and found[1].report.store["waited"] == 0
    assert found[2].report.store["waited"] > STEPS // 2, "the test can fail"
    same(found[1], found[2], tolerance=0)


def test_a_step_of_forward_mode_waits_for_nothing():
    counts = []
    for steps in (8, 15):  # at the sixteenth it would look again whether backward passes are derivatives
        case = on(device_cases.mlp(steps=steps, max_grad_norm=0.5), PRETENDED)
        f, dz = case.function(), {"data_weights": torch.ones(20, device=PRETENDED)}
        with pretended.counted() as found:
            f.jvp(case.z, dz)
        counts.append(found.waits)
    assert counts[0] == counts[1]


def test_steps_upload_nothing():
    counts = []
    for steps in (10, 20):
        case = on(device_cases.mlp(steps=steps, max_grad_norm=0.5), PRETENDED)
        with pretended.counted() as found:
            case.metagradient(budget=mgd.Budget(device="20KB"))
        counts.append(found.uploads)
    assert counts[0] == counts[1]


def test_numbers_are_looked_at_in_the_order_in_which_they_came():
    late, seen = Reads(PRETENDED), []
    late.later(torch.tensor([1.0, 2.0], device=PRETENDED), seen.append)
    late.later(torch.tensor(3, device=PRETENDED), seen.append)
    with pytest.raises(KeyError), late.settled():
        late.later(torch.tensor(True, device=PRETENDED), lambda x: seen.append(x) or {}[x[0]])
        raise ValueError("an error that an earlier one brought about")
    assert seen == [[1.0, 2.0], [3.0], [1.0]]


# --- found late, and named as if at once ---------------------------------------------------------------------------


def test_the_step_whose_loss_is_lost_is_named():
    case = on(device_cases.mlp(steps=20), PRETENDED)
    loss = lambda model, batch, z: case.loss(model, batch[:3], z) / (batch[3] != 11)
    batches = [(*batch, torch.tensor(t, device=PRETENDED)) for t, batch in enumerate(case.batches)]
    with pytest.raises(NonFiniteState, match="the loss is not finite at step 11") as error:
        case.but(loss=loss, batches=batches, objective=case.objective).metagradient()
    assert error.value.step == 11


def test_the_step_that_does_not_repeat_itself_is_named():
    case, calls = on(device_cases.mlp(steps=20, dropout=0.0), PRETENDED), []

    def loss(model, batch, z):
        calls.append(int(batch[3]))
        return case.loss(model, batch[:3], z) * (1.5 if calls.count(7) > 1 and calls[-1] == 7 else 1.0)

    batches = [(*batch, torch.tensor(t)) for t, batch in enumerate(case.batches)]
    with pytest.raises(ReplayDivergence, match="expected step 7 "):
        case.but(loss=loss, batches=batches).metagradient(trace=False, budget=mgd.Budget(device="20KB"))


def test_a_gradient_that_does_not_repeat_itself_is_seen(monkeypatch):
    """Its loss is the same. Here the steps of the reverse sweep are compared late, and then closely."""
    monkeypatch.setattr(KeptGraphs, "pays", lambda self, held: False)
    case, calls = on(device_cases.mlp(steps=20, dropout=0.0), PRETENDED), []

    def loss(model, batch, z):
        calls.append(int(batch[3]))
        value = case.loss(model, batch[:3], z)
        again = calls[-1] == 3 and calls.count(3) % 2 == 0
        return value + (value - value.detach()) if again else value

    batches = [(*batch, torch.tensor(t)) for t, batch in enumerate(case.batches)]
    with pytest.raises(ReplayDivergence, match=r"step 3 to repeat.*the gradient of"):
        case.but(loss=loss, batches=batches).metagradient(trace=False)


class Sneaking(nn.Module):
    """It writes to a buffer past autograd, and past its version."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = cases.mlp()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        self.scale.data.mul_(1.1)
        return self.inner(x) * self.scale.to(x.dtype)


def test_a_buffer_that_is_written_unseen_is_seen():
    case = cases.supervised(Sneaking(), (5,), steps=10).to(torch.float32)
    found = on(case, PRETENDED).metagradient(trace=False)
    same(found, on(case, "cpu").metagradient(trace=False))
    assert abs(float(found.model_state["scale"]) - 1.1**10) < 1e-5
    assert not reads._closely


def test_adjoints_that_overflow_are_named():
    case = on(device_cases.mlp(steps=20, dropout=0.0), PRETENDED)
    objective = lambda model: 1e38 * (1e38 * case.objective(model).double()).float().clamp(max=1e38)
    with pytest.raises(NonFiniteState):
        case.but(objective=objective).metagradient()
