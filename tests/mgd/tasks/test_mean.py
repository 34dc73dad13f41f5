"""The mean over many trainings: its value, its gradient, and that one training at a time is held."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from cases import initial, mlp, relative_error, supervised

import mgd
from mgd.errors import BadArgument, BadMetaparameter, NotDifferentiable
from mgd_kernels import SGD


def parts(count=3):
    """Trainings with the same model and different data, and initial weights and one rate that they share."""
    whole = supervised(mlp(), (5,), steps=count * 3, optimizer=SGD(lr=0.1))
    whole.z.clear()
    z = {"init": initial(whole.model), "lr": torch.tensor(0.2, dtype=torch.float64)}
    return [whole.but(z, batches=whole.batches[3 * i : 3 * i + 3]) for i in range(count)], z


def test_value_and_gradient_are_the_means_of_unrolled_ones():
    cases, z = parts()
    leaves = {"init": {n: p.requires_grad_() for n, p in z["init"].items()}, "lr": z["lr"].requires_grad_()}
    value = mgd.mean_over((case.function() for case in cases), leaves)
    (3 * value).backward()
    expected = [case.unrolled() for case in cases]
    torch.testing.assert_close(value, sum(e.value for e in expected) / 3)
    for name, p in leaves["init"].items():
        assert relative_error(p.grad, sum(e.grads["init"][name] for e in expected)) < 1e-10
    assert relative_error(leaves["lr"].grad, sum(e.grads["lr"] for e in expected)) < 1e-10


def test_finite_differences_agree():
    cases, z = parts()
    functions = [case.function() for case in cases]
    rate = z["lr"].clone().requires_grad_()
    mgd.mean_over(functions, {**z, "lr": rate}).backward()
    ahead, behind = (float(mgd.mean_over(functions, {**z, "lr": z["lr"] + h})) for h in (1e-6, -1e-6))
    assert float(rate.grad) == pytest.approx((ahead - behind) / 2e-6, rel=1e-7)


def test_one_training_at_a_time_is_held():
    cases, z = parts()
    made, alive = [], []

    def tasks():
        for case in cases:
            gc.collect()
            alive.append(sum(reference() is not None for reference in made))
            f = case.function()
            made.append(weakref.ref(f))
            yield f

    z["lr"].requires_grad_()
    value = mgd.mean_over(tasks(), z)
    gc.collect()
    assert max(alive) <= 1 and sum(reference() is not None for reference in made) == 0
    value.backward()
    assert z["lr"].grad != 0


def test_without_a_gradient_none_is_taken(monkeypatch):
    cases, z = parts()
    monkeypatch.setattr(mgd.TrainingFunction, "metagradient", None)
    plain = mgd.mean_over([case.function() for case in cases], z)
    z["lr"].requires_grad_()
    with torch.no_grad():
        assert torch.equal(mgd.mean_over([case.function() for case in cases], z), plain)


def test_what_has_no_mean_is_refused():
    cases, z = parts(1)
    with pytest.raises(BadArgument, match="no tasks"):
        mgd.mean_over([], z)
    several = cases[0].but(objective=lambda model: model(torch.zeros(2, 5).double())[:, 0]).function()
    with pytest.raises(BadArgument, match="one objective"):
        mgd.mean_over([several], z)
    with pytest.raises(BadMetaparameter, match="map names"):
        mgd.mean_over([cases[0].function()], z["lr"])


def test_a_second_derivative_is_refused_and_not_left_out():
    """In silence it would be that of a gradient without a derivative."""
    cases, z = parts(1)
    f = cases[0].function()
    for call in (f, lambda z: mgd.mean_over([f], z)):
        rate = z["lr"].clone().requires_grad_()
        value = call({**z, "lr": rate})
        with pytest.raises(NotDifferentiable, match="create_graph"):
            torch.autograd.grad(value, rate, create_graph=True)
        assert torch.autograd.grad(value, rate)[0] != 0


@pytest.mark.parametrize("tasks", [None, 3, [3]])
def test_tasks_are_training_functions(tasks):
    with pytest.raises(BadArgument, match="training functions"):
        mgd.mean_over(tasks, {"s": torch.tensor(1.0)})
    with pytest.raises(BadArgument, match="several training functions; got TrainingFunction"):
        mgd.mean_over(parts(1)[0][0].function(), {"s": torch.tensor(1.0)})
