"""Tasks that must not run together run one after another, to the same bits; and say so where nobody would expect it."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import cross_entropy, mlp, supervised
from task_cases import DOUBLE, alone, difference, hypers, mean, tasks, training
from torch import nn

import mgd
from mgd.autodiff.batched import BatchedSteps, StepsAtOnce
from mgd.errors import BadArgument, BadObjective, ReplayDivergence
from mgd.step.agreement import Agreement
from mgd.tasks.group import Group
from mgd.tasks.recorded import same_settings
from mgd_kernels import SGD

TOGETHER = "cannot run together|cannot capture"
pytestmark = pytest.mark.usefixtures("trace")
ROUNDING = 1e-14  # of the mean


@contextlib.contextmanager
def told(trace, why=TOGETHER):
    """By default nothing was asked for, and nothing is said, but that a capture fails, as by itself."""
    if trace:
        with pytest.warns(RuntimeWarning, match=why):
            yield
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "mgd evaluates steps by autograd")
            yield


class Counted:
    """Trains the first calls otherwise."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, batch, z):
        self.calls += 1
        return cross_entropy(model, batch, z) * (2.0 if self.calls < 5 else 1.0)


class Noting:
    """Notes its calls, and trains as if it did not."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, batch, z):
        self.calls += 1
        return cross_entropy(model, batch, z)


def marking(model, batch, z):
    model.trained = True
    return cross_entropy(model, batch, z)


def item(model, batch, z):
    return cross_entropy(model, batch, z) * batch[0].sum().item()


def branching(model, batch, z):
    loss = cross_entropy(model, batch, z)
    return loss * 2 if batch[0].sum() > 0 else loss


def selected(model, batch, z):
    chosen = batch[0][:, 0] > 0
    return F.cross_entropy(model(batch[0][chosen]), batch[1][chosen], reduction="sum")


def two_heads(model, batch, z):
    return F.cross_entropy(model[0](batch[0])[:, :3], batch[1])


LOSSES = {"noting": Noting, "marking": lambda: marking, "item": lambda: item, "selected": lambda: selected}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_not_for_several(name, groups, trace):
    loss = LOSSES[name]()
    case = training(loss=loss)
    fs, z = tasks(case), hypers(case)
    with told(trace):
        found = mean(fs, z)
    assert groups == [] and difference(found, alone(fs, z)) < ROUNDING
    mean(fs, z)  # it has been said


def test_a_branch_that_is_not_captured(groups):
    case = training(loss=branching)
    fs, z = tasks(case), hypers(case)
    with pytest.warns(RuntimeWarning, match="cannot capture"):
        found = mean(fs, z)
    assert groups == [] and difference(found, alone(fs, z)) < ROUNDING


def test_a_counter_counts_as_it_did(groups, trace):
    """At once, every task would see the calls of one."""
    counters, found = [Counted(), Counted()], []
    for counter, way in zip(counters, (trace, False), strict=True):
        case = training(loss=counter)
        fs, z = tasks(case, trace=way), hypers(case)
        with torch.no_grad(), told(way):
            found.append(mgd.mean_over(fs, z))
    assert groups == [] and torch.equal(*found)
    assert counters[0].calls == counters[1].calls == 9


class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("mean", torch.zeros(5, dtype=DOUBLE))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.mean(0), 0.1)
        return self.body(x - self.mean)


MODELS = {"dropout": lambda: mlp(0.3), "buffers": Running, "without a gradient": mlp}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_not_for_several(name, groups, trace):
    model = MODELS[name]()
    case = supervised(model, (5,), optimizer=SGD(lr=0.1))
    case.z.clear()
    if name == "without a gradient":
        case = case.but(loss=two_heads)
    fs, z = tasks(case), {"lr": torch.tensor(0.2, dtype=DOUBLE)}
    with told(trace):
        found = mean(fs, z)
    assert groups == [] and difference(found, alone(fs, z)) < ROUNDING


SETTINGS = {
    "by autograd": {"trace": False},
    "clipped": {"max_grad_norm": 0.4},
    "microbatches": {"microbatches": 2},
    "since": {"since": 2},
    "a schedule": {"schedule": "revolve"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_not_for_several(name, groups):
    case = training()
    fs, z = [f.replaced(**SETTINGS[name]) for f in tasks(case)], {"lr": torch.tensor(0.2, dtype=DOUBLE)}
    assert difference(mean(fs, z), alone(fs, z)) < ROUNDING and groups == []


class Own(mgd.TrainingFunction):
    """Another training function may be anything."""

    def metagradient(self, z, **options):
        result = super().metagradient(z, **options)
        result.value = result.value + 1
        return result


def test_subclasses_are_themselves(groups):
    case = training()
    fs = tasks(case)
    fs = [Own(f.model, f.loss, f.batches, optimizer=f.optimizer, objective=f.objective, trace=True) for f in fs]
    z = hypers(case)
    assert difference(mean(fs, z), alone(fs, z)) < ROUNDING and groups == []


# --- what a generator may do between its tasks ---


def late(case, fs):
    """Names that the objectives look up when they are called."""
    for f in fs:
        x, y, _ = f.batches[0]
        yield f.replaced(objective=lambda model: F.cross_entropy(model(x[:3]), y[:3]))  # noqa: B023


def reused(case, fs):
    """The memory of one batch and one target, filled anew for each."""
    x, y, index = (torch.empty_like(part) for part in fs[0].batches[0])
    f = fs[0].replaced(batches=[(x, y, index)] * 3, objective=lambda model: F.cross_entropy(model(x), y))
    for each in fs:
        for mine, theirs in zip((x, y, index), each.batches[0], strict=True):
            mine.copy_(theirs)
        yield f


def anew(case, fs):
    """One function, whose batches and objective are set anew."""
    for f in fs:
        fs[0].batches, fs[0].objective = f.batches, f.objective
        yield fs[0]


def other_weights(case, fs):
    for i, f in enumerate(fs):
        for p in case.model.parameters():
            p.data.fill_(0.1 * (1 + i)).view(-1)[::2] *= -1
        yield f


def other_rates(case, fs):
    for i, f in enumerate(fs):
        f.optimizer.defaults["weight_decay"] = 0.0
        f.fixed["weight_decay"] = 0.1 * i
        yield f


def other_modes(case, fs):
    for i, f in enumerate(fs):
        case.model.train(i % 2 == 0)
        yield f


@pytest.mark.parametrize("change", [late, reused, anew, other_weights, other_rates, other_modes])
def test_a_generator_may_change_anything_between_tasks(change, groups):
    def run(way):
        case = training(model="mlp" if change is not other_modes else "convnet")
        fs = tasks(case, shape=(5,) if change is not other_modes else (1, 6, 6))
        z = {"lr": torch.tensor(0.2, dtype=DOUBLE)}
        return way(change(case, fs), z)

    assert difference(run(mean), run(alone)) < 1e-12
    assert sum(size for size, _ in groups) == 3


def test_random_data_of_a_generator_is_what_it_draws():
    """Its draws are not undone with those of the trainings."""
    case = training()
    f, z, drawn = case.function(trace=True), {"lr": torch.tensor(0.2, dtype=DOUBLE)}, []

    def made():
        for _ in range(3):
            x = torch.randn(6, 5, dtype=DOUBLE)
            drawn.append(x)
            yield f.replaced(batches=[(x, torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6))] * 2)

    mgd.mean_over(made(), z)
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_a_task_that_changed_cannot_be_run_again():
    """Where tasks must be run by themselves after all, those that are not what they were are an error."""
    case = training()
    fs, z = tasks(case), hypers(case)
    x, y, index = fs[1].batches[0]
    fs[1].batches[:] = [(x.fill_(float("nan")), y, index)] * 3
    with pytest.raises(BadArgument, match="stay as they are"):
        mean(late(case, fs), z)


def test_a_task_that_changed_is_run_from_what_was_copied(monkeypatch, groups):
    """Where tasks cannot run at once after all, and have changed, their graphs run in turn."""
    case = training()
    fs, z = tasks(case), hypers(case)
    expected = alone(late(case, fs), z)
    mean(late(case, fs), z)
    second = StepsAtOnce.second
    monkeypatch.setattr(StepsAtOnce, "second", lambda self, p, *given: second(self, [x * 1.001 for x in p], *given))
    groups.clear()
    assert difference(mean(late(case, fs), z), expected) < 1e-12
    assert groups == [(3, True), *[(1, False)] * 2]  # the last one is as it was


def test_an_objective_without_a_graph_in_a_generator(groups, trace):
    case = training()
    fs, z = tasks(case), hypers(case)

    def objective(model):
        value = F.cross_entropy(model(fs[0].batches[0][0]), fs[0].batches[0][1])
        return value * 2 if value.item() > 0 else value

    fs = [f.replaced(objective=objective) for f in fs]
    with told(trace):
        found = mean((f for f in fs), z)
    assert groups == [] and difference(found, alone(fs, z)) < ROUNDING


def test_an_objective_that_changes_the_next_task(trace):
    """It was evaluated, so that the tasks cannot be run by themselves any more."""
    case = training()
    fs, z = tasks(case), hypers(case)
    x, y, _ = fs[0].batches[0]

    def value(model):
        with torch.no_grad():
            fs[1].batches[0][0].mul_(1.1)
        return F.cross_entropy(model(x), y)

    # By default it is one by one, where the second one notices.
    error, why = (BadObjective, "changes what the training of another one") if trace else (ReplayDivergence, "step 2")
    with pytest.raises(error, match=why):
        mean([f.replaced(objective=value) for f in fs], z)


def test_an_objective_that_sets_what_the_loss_reads(trace):
    scale = {"value": 1.0}
    case = training(loss=lambda model, batch, z: scale["value"] * cross_entropy(model, batch, z))
    fs, z = tasks(case), hypers(case)
    x, y, _ = fs[0].batches[0]

    def value(model):
        scale["value"] += 1.0
        return F.cross_entropy(model(x), y)

    fs = [f.replaced(objective=value) for f in fs]
    if trace:
        with pytest.raises(BadObjective, match="changes what the training of another one"):
            mean(fs, z)
        return
    found = mean(fs, z)
    scale["value"] = 1.0
    assert difference(found, alone(fs, z)) < ROUNDING


# --- what is wrong inside ---


def test_a_graph_at_once_that_is_wrong_is_not_used(monkeypatch, groups, trace):
    made = StepsAtOnce.forward

    def wrong(self, parameters, given, keep):
        losses, gradients, residuals = made(self, parameters, given, keep)
        gradients[0] = gradients[0] * torch.linspace(1, 1.001, len(losses)).view(-1, *[1] * (gradients[0].ndim - 1))
        return losses, gradients, residuals

    monkeypatch.setattr(StepsAtOnce, "forward", wrong)
    case = training()
    fs, z = tasks(case), hypers(case)
    with told(trace, "other derivatives than that of one"):
        found = mean(fs, z)
    assert difference(found, alone(fs, z)) < 1e-12 and groups == [(3, False)]


def test_a_second_derivative_of_another_gradient_is_noticed(monkeypatch, groups):
    """As where memory is overwritten between the sweeps."""
    case = training()
    fs, z = tasks(case), hypers(case)
    mean(fs, z)
    second = StepsAtOnce.second

    def wrong(self, parameters, given, residuals, directions):
        return second(self, [x * 1.001 for x in parameters], given, residuals, directions)

    monkeypatch.setattr(StepsAtOnce, "second", wrong)
    gone_back, go_back = [], Group.go_back
    monkeypatch.setattr(Group, "go_back", lambda self, *a: gone_back.append(go_back(self, *a)) or gone_back[-1])
    groups.clear()
    assert difference(mean(fs, z), alone(fs, z)) < 1e-12  # one by one
    assert len(groups) == 1 and not gone_back


def test_what_seems_to_be_another_gradient_is_looked_at(monkeypatch, groups):
    case = training()
    fs, z = tasks(case), hypers(case)
    expected, looked, original, confirm = alone(fs, z), [], Agreement.discrepancies, Group._confirm
    monkeypatch.setattr(Agreement, "discrepancies", lambda *given: [1e-9 + x for x in original(*given)])
    monkeypatch.setattr(Group, "_confirm", lambda *given: looked.append(confirm(*given)))
    assert difference(mean(fs, z), expected) < 1e-12
    assert groups == [(3, True)] and len(looked) == 1  # then it passes as rounding


def test_what_vmap_refuses_goes_in_turn(monkeypatch, groups, trace):
    def refused(self, *given):
        raise RuntimeError("vmap: no rule")

    monkeypatch.setattr(BatchedSteps, "_made", refused)
    case = training()
    fs, z = tasks(case), hypers(case)
    with told(trace, "no rule"):
        found = mean(fs, z)
    assert difference(found, alone(fs, z)) < 1e-12 and groups == [(3, False)]


def test_settings_of_optimizers_are_compared_by_value():
    case = training()
    f, g = (case.but(optimizer=SGD(lr=0.1)).function(trace=True) for _ in range(2))
    assert same_settings(f, g) and not same_settings(f, g.replaced(optimizer=SGD(lr=0.2)))
    tensors = [SGD(lr=torch.tensor([0.1] * 8)) for _ in range(2)]
    assert not same_settings(f.replaced(optimizer=tensors[0]), f.replaced(optimizer=tensors[1]))
