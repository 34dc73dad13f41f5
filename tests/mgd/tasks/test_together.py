"""Tasks that run together have the numbers of each by itself, up to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import initial
from task_cases import (
    DOUBLE,
    MODELS,
    OPTIMIZERS,
    alone,
    cast,
    difference,
    hypers,
    mean,
    objective_on,
    of_the_loss,
    scaled,
    tasks,
    training,
)

import mgd
from mgd.errors import BadArgument, BadMetaparameter, NonFiniteState, UnstableTraining
from mgd.tasks import group, together
from mgd_kernels import SGD, Adam

pytestmark = pytest.mark.usefixtures("trace")

EXACT = 1e-12  # float64: of sums in another order


@pytest.mark.parametrize("model", MODELS)
def test_every_model(model, groups):
    case = training(model)
    fs, z = tasks(case, shape=MODELS[model][1]), hypers(case)
    assert difference(mean(fs, z), alone(fs, z)) < EXACT
    assert groups == [(3, True)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer, groups):
    case = training(optimizer=optimizer)
    fs, z = tasks(case), hypers(case)
    assert difference(mean(fs, z), alone(fs, z)) < EXACT
    assert groups == [(3, True)]


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("start", [True, False])
def test_metaparameters_of_the_loss(per_example, start, groups):
    """Also where no step before the first that reads them is reversed."""
    options = {"per_example": {"data_weights": lambda batch: batch[2]}} if per_example else {}

    def indexed(model, batch, z):
        return scaled(model, batch, {**z, "data_weights": z["data_weights"][batch[2]]})

    case = training(loss=scaled if per_example else indexed, **options)
    fs, z = tasks(case), of_the_loss()
    if start:
        z["init"] = initial(case.model)
    assert difference(mean(fs, z), alone(fs, z)) < EXACT
    assert groups == [(3, True)]


@pytest.mark.parametrize("model", MODELS)
def test_float32(model, groups):
    """Neither way is nearer to float64 than the other by more than rounding."""
    double = training(model)
    single, shape = double.to(torch.float32), MODELS[model][1]
    z = hypers(double)
    exact = alone(tasks(double, shape=shape), z)
    fs = tasks(single, shape=shape)
    z = cast(z, torch.float32)
    assert difference(mean(fs, z), exact) < 2 * difference(alone(fs, z), exact) + 2e-6
    assert groups == [(3, True)]


def test_finite_differences():
    case = training(loss=scaled, per_example={"data_weights": lambda batch: batch[2]})
    fs = tasks(case)
    z = hypers(case) | of_the_loss()
    _, grads = mean(fs, z)
    moved = {key: torch.randn(z[key].shape, dtype=DOUBLE) for key in ("lr", "bias", "data_weights")}
    moved["init"] = {name: torch.randn(x.shape, dtype=DOUBLE) for name, x in z["init"].items()}

    def at(h):
        there = {key: z[key] + h * d for key, d in moved.items() if key != "init"}
        there["init"] = {name: x + h * moved["init"][name] for name, x in z["init"].items()}
        return float(mgd.mean_over(fs, {**z, **there}))

    slope = sum(float((grads[key] * d).sum()) for key, d in moved.items() if key != "init")
    slope += sum(float((grads["init"][name] * d).sum()) for name, d in moved["init"].items())
    assert slope == pytest.approx((at(1e-6) - at(-1e-6)) / 2e-6, rel=1e-7)


def test_a_generator_and_functions_of_their_own(groups):
    case = training()
    fs, z = tasks(case), hypers(case)
    expected = alone(fs, z)
    assert difference(mean((f for f in fs), z), expected) < EXACT
    own = [
        mgd.TrainingFunction(
            case.model, case.loss, f.batches, optimizer=SGD(**momentum()), objective=f.objective, trace=f.trace
        )
        for f in fs
    ]
    assert difference(mean(own, z), expected) < EXACT
    assert groups == [(3, True)] * 2


def momentum():
    return {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}


def test_values_alone(groups, monkeypatch):
    case = training()
    fs, z = tasks(case), hypers(case)
    expected = sum(f.value(z) for f in fs) / 3
    monkeypatch.setattr(group.Group, "go_back", None)
    torch.testing.assert_close(mgd.mean_over(fs, z), expected, rtol=EXACT, atol=0)
    assert groups == [(3, None)]


def test_ragged_tasks(groups):
    """Those of one shape run together, in whatever order they come."""
    case = training()
    six, four = tasks(case), tasks(case, examples=4)
    fs, z = [x for pair in zip(six, four, strict=True) for x in pair], hypers(case)
    expected = alone(fs, z)
    assert difference(mean(fs, z), expected) < EXACT  # which captures a graph for one shape, then one for any
    groups.clear()
    assert difference(mean(fs, z), expected) < EXACT
    assert groups == [(3, True)] * 2


def test_one_task_and_many_sizes(groups):
    case = training()
    fs, z = tasks(case, count=4), hypers(case)
    for count in (1, 2, 4):
        assert difference(mean(fs[:count], z), alone(fs[:count], z)) < EXACT
    assert groups == [(1, False), (2, True), (4, True)]


def test_sizes_beyond_the_most(groups, monkeypatch):
    monkeypatch.setattr("mgd.autodiff.batched.MOST_SIZES", 0)
    case = training()
    fs, z = tasks(case), hypers(case)
    assert difference(mean(fs, z), alone(fs, z)) < EXACT
    assert groups == [(3, False)]


def test_other_settings_are_other_groups(groups):
    case = training()
    fs, z = tasks(case), hypers(case)
    z.pop("weight_decay")
    fs[1] = fs[1].replaced(fixed={"weight_decay": 0.3})
    fs[2] = fs[2].replaced(fixed={"weight_decay": 0.3})
    assert difference(mean(fs, z), alone(fs, z)) < EXACT
    assert groups == [(1, False), (2, True)]


def test_a_state_goes_on(groups):
    case = training(optimizer="adam")
    fs, z = tasks(case), {"lr": torch.tensor(0.02, dtype=DOUBLE)}
    state = fs[0].train(z).optimizer_state
    fs = [f.replaced(optimizer_state=state) for f in fs]
    assert difference(mean(fs, z), alone(fs, z)) < EXACT
    assert groups == [(3, True)]


def test_the_memory_of_the_budget_is_what_they_take(groups):
    case = training()
    fs, z = tasks(case, count=7), hypers(case)
    mean(fs[:1], z)  # captures
    (one,) = [size for size in sizes(fs[:1], z)]
    small = [f.replaced(budget=3 * one + 100) for f in fs]
    groups.clear()
    assert difference(mean(small, z), alone(small, z)) < EXACT
    assert [size for size, _ in groups] == [3, 3, 1]
    groups.clear()
    less = [f.replaced(budget=2 * one - 100) for f in fs]
    assert difference(mean(less, z), alone(fs, z)) < EXACT
    assert groups == []


def sizes(fs, z):
    """Bytes that tasks are counted as."""
    with together.Together(z, True, fs) as waiting:
        for f in fs:
            yield waiting._recorded(f)[1].bytes(True)


def test_groups_are_even(groups, monkeypatch):
    monkeypatch.setattr(together, "MOST", 3)
    case = training()
    fs, z = tasks(case, count=4), hypers(case)
    mean(fs, z)
    assert [size for size, _ in groups] == [2, 2]


def test_an_objective_by_itself(groups, trace):
    """One that has a graph of its own for each task is evaluated as it is written, where the tasks are a list. By
    default that is not risked: what it does beside shows too late."""
    case = training()
    fs, z = tasks(case, count=5), hypers(case)
    held = [(f.batches[0][0][:2] + 1, f.batches[0][1][:2]) for f in fs]

    def numbered(i):
        return lambda model: F.cross_entropy(model(held[i][0]), held[i][1])

    fs = [f.replaced(objective=numbered(i)) for i, f in enumerate(fs)]
    expected = alone(fs, z)
    mean(fs, z)
    groups.clear()
    assert difference(mean(fs, z), expected) < EXACT
    torch.testing.assert_close(mgd.mean_over(fs, z), expected[0], rtol=EXACT, atol=0)
    assert [size for size, _ in groups] == ([5, 5] if trace else [])


def test_an_objective_that_sets_modes(groups):
    case = training("convnet")
    x, y = torch.randn(4, 1, 6, 6, dtype=DOUBLE), torch.tensor([0, 1, 2, 0])

    def objective(model):
        model.eval()
        return F.cross_entropy(model(x), y)

    fs = [f.replaced(objective=objective) for f in tasks(case, shape=(1, 6, 6))]
    z = hypers(case)
    assert difference(mean(fs, z), alone(fs, z)) < EXACT
    assert groups == [(3, True)] and case.model.training


def test_a_metaparameter_that_nobody_reads():
    case = training()
    with pytest.raises(BadMetaparameter, match="never read z\\['scale'\\]"):
        mean(tasks(case), hypers(case) | {"scale": torch.tensor(1.0, dtype=DOUBLE)})


def test_several_objectives_are_refused():
    case = training()
    fs = [f.replaced(objective=lambda model: model(torch.zeros(2, 5).double())[:, 0]) for f in tasks(case)]
    with pytest.raises(BadArgument, match="one objective"):
        mean(fs, hypers(case))


def test_warnings_are_those_of_each():
    case = training(optimizer="sgd")
    fs = tasks(case, steps=6)
    z = {"init": initial(case.model), "lr": torch.tensor(60.0, dtype=DOUBLE)}
    with pytest.warns(UnstableTraining):
        alone(fs, z)
    with pytest.warns(UnstableTraining):
        mean(fs, z)
    still = case.but(optimizer=Adam(lr=0.01))
    still.model[0].bias.requires_grad_(True)
    fs = [f.replaced(batches=[(0 * x, y, i) for x, y, i in f.batches]) for f in tasks(still)]
    for way in (alone, mean):
        with pytest.warns(RuntimeWarning, match="gradients of exactly 0"):
            way(fs, {"init": initial(still.model)})


@pytest.mark.parametrize("made", [list, lambda fs: (f for f in fs)])
def test_lost_numbers_are_those_of_the_task_by_itself(made):
    case = training()
    fs, z = tasks(case), hypers(case)
    x, y, index = fs[2].batches[1]
    fs[2].batches[1] = (x.clone().fill_(float("nan")), y, index)
    with pytest.raises(NonFiniteState) as expected:
        fs[2].metagradient(z)
    with pytest.raises(NonFiniteState) as found:
        mean(made(fs), z)
    assert str(found.value) == str(expected.value)
    fs[2] = fs[2].replaced(
        batches=fs[0].batches, objective=objective_on(torch.full((4, 5), float("nan")).double(), y[:4])
    )
    with pytest.raises(NonFiniteState, match="objective"):
        mean(made(fs), z)
