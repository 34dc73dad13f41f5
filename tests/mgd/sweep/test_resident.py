"""Short trainings that stay in memory as a whole have the bits of any other sweep, or are left to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, adamw, convnet, cross_entropy, initial, mlp, seeded, supervised, weighted, weights
from same_bits import same
from torch import nn

import mgd
from mgd.errors import NonFiniteState, ReplayDivergence
from mgd.step.agreement import Agreement
from mgd.sweep import resident
from mgd.sweep.resident import ResidentSweep
from mgd_kernels import SGD


@pytest.fixture
def went_back(monkeypatch):
    """The kinds of the sweeps that went back."""
    found = []
    original = mgd.sweep.sweep.Sweep.reverse
    monkeypatch.setattr(mgd.sweep.sweep.Sweep, "reverse", lambda self: found.append(type(self)) or original(self))
    return found


def several(model):
    p = [x.square().mean() for x in model.parameters()]
    return torch.stack([p[0] + p[1], p[2].sin()])


def late(model, batch, z):
    """Only the batches from the fourth on, which are smaller, read the metaparameter."""
    loss = cross_entropy(model, batch, z)
    return loss * z["scale"] if len(batch[0]) == 4 else loss


def two_heads(model, batch, z):
    """The second layer has no gradient at some steps."""
    hidden = model[0](batch[0])
    return cross_entropy(lambda x: model[1](torch.tanh(hidden)) if len(batch[0]) == 4 else hidden, batch, z)


def later_ones_smaller(case):
    return [batch if t < 3 else tuple(x[:4] for x in batch) for t, batch in enumerate(case.batches)]


def plain(**options):
    return supervised(mlp(), (5,), **options)


@seeded
def heads():
    return nn.Sequential(nn.Linear(5, CLASSES), nn.Linear(CLASSES, CLASSES))


def trainings():
    frozen = mlp()
    frozen[-1].bias.requires_grad_(False)
    data = {"data_weights": weights()}
    momentum = SGD(lr=0.1, momentum=0.9, nesterov=True)
    scale = {"scale": torch.tensor(1.1, dtype=torch.float64)}
    pair = supervised(heads(), (5,))
    return {
        "rates": plain(),
        "weights, per example": plain(per_example={"data_weights": lambda batch: batch[2]}).but(
            z=data, loss=lambda m, b, z: (z["data_weights"] * F.cross_entropy(m(b[0]), b[1], reduction="none")).mean()
        ),
        "weights": plain().but(z=data, loss=weighted),
        "init": plain(optimizer=momentum).but(z={"init": initial(mlp())}),
        "dropout": supervised(mlp(0.3), (5,)),
        "clipped": plain(max_grad_norm=0.4),
        "several objectives": plain().but(objective=several),
        "since": plain(since=3).but(z={"lr": torch.tensor(1e-2, dtype=torch.float64)}),
        "frozen": supervised(frozen, (5,)),
        "read late": plain().but(z=scale, loss=late, batches=later_ones_smaller(plain())),
        "read late, alone": supervised(mlp(), (5,), optimizer=momentum).but(
            loss=late, batches=later_ones_smaller(plain())
        ),
        "skipped": pair.but(loss=two_heads, batches=later_ones_smaller(pair)),
        "a state goes on": plain(optimizer_state={}),
    }


KINDS = [*((name, torch.float32) for name in trainings()), ("weights", torch.float64), ("clipped", torch.bfloat16)]


@pytest.mark.filterwarnings("ignore:the model computes in")
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_its_bits_are_those_of_any_sweep(name, dtype, went_back):
    case = trainings()[name].to(dtype)
    if name == "read late, alone":
        case.z.clear()
        case.z["scale"] = torch.tensor(1.1, dtype=dtype)
    f = case.function(trace=True)
    first, second = f.metagradient(case.z), f.metagradient(case.z)
    assert went_back == [mgd.sweep.sweep.Sweep, ResidentSweep]
    assert same(first, second)
    assert torch.equal(first.report.adjoint_norms.isnan(), second.report.adjoint_norms.isnan())
    known = ~first.report.adjoint_norms.isnan()
    assert torch.equal(first.report.adjoint_norms[known], second.report.adjoint_norms[known])
    steps = ("model steps", "hvps")
    assert [first.report.counts[work] for work in steps] == [second.report.counts[work] for work in steps]
    assert second.report.kept_bytes > 0 and f.plan().T == len(case)
    if first.optimizer_state is not None:
        for slot in ("exp_avg", "exp_avg_sq"):
            state = second.optimizer_state[slot]
            assert all(torch.equal(x, state[key]) for key, x in first.optimizer_state[slot].items())
    assert "all in memory" in str(second.report) and not second.report.plan
    assert "all in memory" not in str(first.report)


class Mixed(nn.Module):
    """Its parameters have two dtypes, of which the flat buffer has one."""

    def __init__(self):
        super().__init__()
        self.body = mlp().float()
        self.body[0].bfloat16()

    def forward(self, x):
        return self.body[3](torch.tanh(self.body[0](x.bfloat16()).float()))


@pytest.mark.filterwarnings("ignore:the model computes in")
def test_a_model_of_two_dtypes_has_the_bits_of_any_sweep(went_back):
    case = plain().to(torch.float32).but(model=Mixed())
    f = case.function(trace=True)
    assert same(f.metagradient(case.z), f.metagradient(case.z)) and went_back[-1] is ResidentSweep


def test_by_autograd_of_the_value(went_back):
    case = plain().to(torch.float32)
    f, expected = case.function(trace=True), case.metagradient()
    f.metagradient(case.z)
    z = {key: value.requires_grad_() for key, value in case.z.items()}
    f(z).backward()
    assert went_back[-1] is ResidentSweep and torch.equal(z["lr"].grad, expected.grads["lr"])


OTHERS = {
    "microbatches": lambda: plain(microbatches=2),
    "a schedule": lambda: plain(schedule="revolve"),
    "little memory": lambda: plain(budget=mgd.Budget(host=4000)),
    "buffers that change": lambda: supervised(convnet(), (1, 6, 6)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_alone(name, went_back):
    case = OTHERS[name]().to(torch.float32)
    f = case.function(trace=True)
    assert same(f.metagradient(case.z), f.metagradient(case.z))
    assert ResidentSweep not in went_back


def test_a_disk_budget_is_used(tmp_path, went_back):
    case = plain(budget=mgd.Budget(disk=(str(tmp_path), "1GB"))).to(torch.float32)
    f = case.function(trace=True)
    f.metagradient(case.z)
    assert f.metagradient(case.z).report.store is not None and ResidentSweep not in went_back


class Counting(nn.Module):
    """Counts its calls in Python, and normalises by a buffer that it writes to."""

    def __init__(self):
        super().__init__()
        self.body, self.calls = mlp(), 0
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        if self.training:
            self.mean.lerp_(x.mean(0), 0.1)
        return self.body(x - self.mean)


def test_what_was_begun_in_vain_is_not_counted(monkeypatch, went_back):
    model = Counting()
    case = supervised(model, (5,))
    f = case.function(trace=True)
    before = f.metagradient(case.z)
    first = model.calls
    model.calls, bars = 0, {"train": 0, "reverse": 0}
    tick = lambda self, phase, steps=1: bars.update({phase: bars[phase] + steps})
    monkeypatch.setattr(mgd.util.progress.Progress, "tick", tick)
    again = f.metagradient(case.z)
    assert same(before, again) and ResidentSweep not in went_back
    assert bars == {"train": len(case), "reverse": len(case)}
    model.calls, twice = 0, model.calls
    f.metagradient(case.z)  # now it is known
    assert model.calls == twice <= first


@pytest.mark.parametrize("name", ["rates", "weights", "several objectives"])
def test_a_gradient_that_seems_to_be_another_one_is_looked_at(name, monkeypatch, went_back):
    case = trainings()[name].to(torch.float32)
    f = case.function(trace=True)
    first = f.metagradient(case.z)
    seen = []
    original = Agreement.discrepancy
    monkeypatch.setattr(
        Agreement, "discrepancy", lambda self, *given, **how: seen.append(1) or 1e-6 + original(self, *given, **how)
    )
    assert same(first, f.metagradient(case.z))
    assert went_back[-1] is ResidentSweep and len(seen) > len(case)


def test_another_gradient_is_an_error(monkeypatch):
    """The parameters are changed behind the sweep's back, so that no evaluation has the gradient that trained."""
    case = plain().to(torch.float32)
    f = case.function(trace=True)
    f.metagradient(case.z)
    monkeypatch.setattr(ResidentSweep, "_note_loss", lambda self, t, loss: self._losses.__setitem__((t, 0), loss))
    original = resident._Step.__init__

    def other(self, state, gradient, *rest):
        original(self, state, gradient + 1.0, *rest)

    monkeypatch.setattr(resident._Step, "__init__", other)
    with pytest.raises(ReplayDivergence, match="gradient"):
        f.metagradient(case.z)


def test_a_batch_that_changes_is_an_error():
    case = plain().to(torch.float32)

    def objective(model):
        case.batches[2][0].add_(1.0)
        return case.objective(model)

    f = case.but(objective=objective).function(trace=True)
    with pytest.raises(ReplayDivergence, match="step 2 to repeat itself"):
        f.metagradient(case.z)
        f.metagradient(case.z)


class OneIndex:
    """Batches whose index always has the same memory."""

    def __init__(self, batches):
        self.batches, self.index = batches, batches[0][2].clone()

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, t):
        x, y, index = self.batches[t]
        return x, y, self.index.copy_(index)


def test_an_index_in_memory_that_is_used_again(went_back):
    case = trainings()["weights, per example"].to(torch.float32)
    expected = case.metagradient(trace=True)
    f = case.but(batches=OneIndex(case.batches)).function(trace=True)
    assert same(f.metagradient(case.z), expected) and same(f.metagradient(case.z), expected)
    assert went_back[-1] is ResidentSweep


def test_lost_numbers_are_named():
    case = plain().to(torch.float32)
    f = case.function(trace=True)
    f.metagradient(case.z)
    bad = {"lr": case.z["lr"].clone()}
    bad["lr"][2] = 1e38
    with pytest.raises(NonFiniteState) as other:
        case.function(trace=False).metagradient(bad)
    with pytest.raises(NonFiniteState) as found:
        f.metagradient(bad)
    assert str(found.value) == str(other.value)
    f.objective = lambda model: case.objective(model) * float("nan")
    with pytest.raises(NonFiniteState, match="objective"):
        f.metagradient(case.z)


def test_it_takes_no_more_than_there_is(monkeypatch, went_back):
    case = plain().to(torch.float32)
    f = case.function(trace=True)
    f.metagradient(case.z)
    monkeypatch.setattr(resident, "UNSEEN", 0)
    monkeypatch.setattr(resident, "free_memory", lambda: 1000)
    f.metagradient(case.z)
    monkeypatch.setattr(resident, "free_memory", lambda: 1 << 30)
    f.metagradient(case.z)
    assert [kind is ResidentSweep for kind in went_back] == [False, False, True]


def test_larger_batches_stay_within_the_budget(went_back):
    """Of which no step was seen; and the error of a training that is begun again has nothing to do with that."""
    case = plain(budget=mgd.Budget(host="100KB")).to(torch.float32)
    f = case.function(trace=True)
    f.metagradient(case.z)
    f.batches = [tuple(x.repeat(100, *[1] * (x.ndim - 1)) for x in batch) for batch in case.batches]
    assert f.metagradient(case.z).report.kept_bytes < 100_000 and ResidentSweep not in went_back
    g = f.replaced(batches=f.batches)
    g._residuals = 0
    with pytest.raises(NonFiniteState) as found:
        g.metagradient({"lr": torch.tensor(1e38)})
    assert found.value.__context__ is None


class MadeAnew:
    """Batches of 60 kB, each its own memory."""

    def __len__(self):
        return 8

    def __getitem__(self, t):
        return torch.full((3, 5000), 0.01 * t), torch.arange(3)


def test_inputs_that_steps_hold_count(went_back):
    """The graph of a small model keeps less than what it is given."""
    with torch.random.fork_rng():
        model = nn.Linear(5000, CLASSES)
    case = plain().to(torch.float32).but(model=model, batches=MadeAnew(), objective=lambda m: m.weight.square().sum())
    f = case.but(optimizer=SGD(lr=0.1), budget=mgd.Budget(host="1200KB")).function(trace=True)
    kept = [f.metagradient({"lr": torch.tensor(0.1)}).report.kept_bytes for _ in range(2)]
    assert ResidentSweep not in went_back and max(kept) < 700_000
    roomy = f.replaced(budget=mgd.Budget(host="4MB"))
    kept = [roomy.metagradient({"lr": torch.tensor(0.1)}).report.kept_bytes for _ in range(2)]
    assert went_back[-1] is ResidentSweep and min(kept) > 8 * 60_000


def test_a_first_call_of_another_function_finds_the_graphs(went_back):
    case = plain(optimizer=adamw()).to(torch.float32)
    f = case.function(trace=True)
    expected = f.metagradient(case.z)
    assert same(expected, f.replaced().metagradient(case.z)) and went_back[-1] is ResidentSweep
