"""Metagradient descent on trainings whose descent is known in closed form."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import mgd
from mgd.errors import BadArgument, CorruptState, NonFiniteState, StaleRun
from mgd_kernels import SGD

AIM = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
START = torch.tensor([3.0, 1.0, -1.0], dtype=torch.float64)
RATE = 0.5
K = 1 - (1 - RATE) ** 2  # two steps of SGD from 0 on (x - a)²/2 end at K a


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def pulled_to(target=lambda z: z["a"], objective=lambda model: 0.5 * (model.at - AIM).square().sum()):
    """Two steps of SGD to a target that the metaparameters set: the objective is |K a - AIM|²/2 by default."""

    def loss(model, batch, z):
        return 0.5 * (model.at - target(z)).square().sum()

    return mgd.TrainingFunction(Point(), loss, [torch.zeros(1)] * 2, optimizer=SGD(lr=RATE), objective=objective)


def sgd(rate):
    return lambda variables: torch.optim.SGD(variables, lr=rate)


def adam(variables):
    return torch.optim.Adam(variables, lr=0.1)


# --- the descent ---------------------------------------------------------------------------------------------------


def test_every_meta_step_is_that_of_the_closed_form():
    """a_n - AIM/K shrinks by 1 - rate K² in every step."""
    rate, steps = 0.4, 7
    found = mgd.MetaDescent(pulled_to(), sgd(rate)).run({"a": START}, steps)
    error = START - AIM / K
    for n, step in enumerate(found.history):
        here = error * (1 - rate * K**2) ** n
        assert step.step == n and step.score == step.value and step.diverged == 0 and step.seconds > 0
        assert step.value == pytest.approx(float(0.5 * (K * here).square().sum()), rel=1e-12)
        assert step.gradient_norms["a"] == pytest.approx(float((K**2 * here).norm()), rel=1e-12)
    torch.testing.assert_close(found.variables["a"], AIM / K + error * (1 - rate * K**2) ** steps, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.best["a"], AIM / K + error * (1 - rate * K**2) ** 6, rtol=1e-12, atol=0)
    assert (found.best_step, found.stopped, found.notes) == (6, "steps", [])
    assert found.values == [step.value for step in found.history]
    assert json.loads(json.dumps(found.to_dict()))["history"][3]["value"] == found.values[3]


def test_the_gradient_goes_through_what_z_is_computed_from():
    """Of log-variables by two tensors of z, one of which is read twice; against autograd through `f(z)`."""
    f = pulled_to(lambda z: z["a"] * z["b"] + z["b"])

    def problem(variables, meta_step):
        seen.append(meta_step)
        return f, {"a": variables["log"].exp(), "b": variables["log"].flip(0), "lr": torch.tensor(RATE)}

    seen: list[int] = []
    start = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    with torch.no_grad():  # the caller's mode is not the problem's
        found = mgd.MetaDescent(problem, sgd(0.1)).run({"log": start, "idle": torch.ones(2)}, 2)
    leaf = start.clone().requires_grad_()
    f(problem({"log": leaf}, 9)[1]).backward()
    assert seen == [0, 1, 9]
    assert found.history[0].gradient_norms == {"log": pytest.approx(float(leaf.grad.norm()), rel=1e-12)}
    assert torch.equal(found.variables["idle"], torch.ones(2))


def test_the_variables_that_it_starts_from_stay_as_they_are():
    start = START.clone().requires_grad_()
    mgd.MetaDescent(pulled_to(), adam, constraints={"a": mgd.Box(0.0, 0.5)}).run({"a": start}, 3)
    assert torch.equal(start.detach(), START) and start.grad is None and start._version == 0


def test_the_start_and_every_step_are_projected_and_observed():
    seen = []
    descent = mgd.MetaDescent(pulled_to(), adam, constraints={"a": mgd.Simplex(2.0)})
    found = descent.run({"a": START}, 5, observe=lambda step, result, x: seen.append((step, result, x["a"])))
    for (step, result, x), kept in zip(seen, found.history, strict=True):
        assert step == kept and float(result.value) == step.value
        assert float(0.5 * (K * x - AIM).square().sum()) == pytest.approx(step.value, rel=1e-12)
        assert bool((x >= 0).all()) and float(x.sum()) == pytest.approx(2.0)
    # The nearest point of the simplex to AIM / K = (4/3, -8/3, 2/3) is (4/3, 0, 2/3), and there the descent goes.
    far, near = (float((x - torch.tensor([4 / 3, 0, 2 / 3])).norm()) for x in (seen[0][2], found.variables["a"]))
    assert near < 0.8 * far


def test_patience_ends_after_so_many_steps_without_a_lower_score():
    away = 2.5 / K**2  # every step goes to the other side, half as far again
    found = mgd.MetaDescent(pulled_to(), sgd(away)).run({"a": START}, 20, patience=3)
    assert (found.stopped, found.best_step, len(found.history)) == ("patience", 0, 4)
    assert found.values == sorted(found.values) and torch.equal(found.best["a"], START)
    assert len(mgd.MetaDescent(pulled_to(), sgd(away)).run({"a": START}, 4, patience=4).history) == 4


def test_validate_chooses_the_best_and_a_nan_is_never_it():
    scores = iter([math.nan, 5.0, 3.0, math.nan, 4.0])
    seen = []
    descent = mgd.MetaDescent(pulled_to(), adam, validate=lambda result: next(scores))
    found = descent.run({"a": START}, 5, observe=lambda step, result, x: seen.append(x["a"]))
    assert found.best_step == 2 and torch.equal(found.best["a"], seen[2])
    assert [step.score for step in found.history][1:3] == [5.0, 3.0]


# --- divergence ----------------------------------------------------------------------------------------------------


def cliff():
    """The trained point is K log(1 - a), and is not a number beyond a = 1, to which its descent leads."""
    return pulled_to(lambda z: torch.log(1 - z["a"]), lambda model: model.at.sum() / 3)


def at(x):
    return {"a": torch.tensor(x, dtype=torch.float64)}


def test_a_divergent_training_makes_the_step_smaller_and_is_reported():
    """From a = 0 the gradient is -K = -3/4: with rate 2 it leads to 3/2, with rate 1 to 3/4, where it is -3; rates of
    1, 1/2, 1/4 and 1/8 lead beyond 1 again, and 1/16 to 15/16."""
    found = mgd.MetaDescent(cliff(), sgd(2.0)).run(at(0.0), 3)
    assert [step.diverged for step in found.history] == [0, 1, 4]
    assert found.values == pytest.approx([0.0, K * math.log(0.25), K * math.log(0.0625)], rel=1e-12)
    assert float(found.best["a"]) == pytest.approx(0.9375, rel=1e-12)
    assert len(found.notes) == 5
    assert found.notes[0] == (
        "meta-step 1: the loss left the finite numbers at training step 0; taken again with an outer learning rate of 1"
    )
    assert found.notes[-1].startswith("meta-step 2") and found.notes[-1].endswith("0.0625")


def test_the_optimizers_memory_goes_back_with_the_variables():
    """Adam's second step is scaled by what its first one saw: taken again, that first one must be its first."""
    found = mgd.MetaDescent(cliff(), lambda x: torch.optim.Adam(x, lr=1.6)).run(at(0.0), 2)
    assert found.history[1].diverged == 1 and float(found.best["a"]) == pytest.approx(0.8, rel=1e-6)


def test_a_start_that_diverges_is_an_error_and_so_is_a_step_that_no_smaller_one_mends():
    with pytest.raises(NonFiniteState):
        mgd.MetaDescent(cliff(), sgd(1.0)).run(at(2.0), 3)
    with pytest.raises(NonFiniteState):
        mgd.MetaDescent(cliff(), sgd(1e6)).run(at(0.0), 3)


def test_a_gradient_that_is_lost_on_the_way_to_the_variables_is_a_divergence():
    f = pulled_to()
    problem = lambda variables, meta_step: (f, {"a": variables["x"].sqrt()})
    with pytest.raises(NonFiniteState, match="gradient of variable 'x'"):
        mgd.MetaDescent(problem, adam).run({"x": torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)}, 2)


# --- resume --------------------------------------------------------------------------------------------------------


class Ended(Exception):
    pass


def ending_at(number):
    def observe(step, result, variables):
        if step.step == number:
            raise Ended

    return observe


def record(found):
    steps = [{**vars(step), "seconds": None} for step in found.history]
    tensors = [found.variables["a"].tolist(), found.best["a"].tolist()]
    return [steps, tensors, found.best_step, found.notes, found.stopped]


OUTER = {
    "sgd": sgd(0.3),
    "adam": adam,
    "sign": lambda x: mgd.SignDescent(x, lr=0.1, share=0.4, seed=3),
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("ends", [(0,), (1, 4), (3, 3, 5)])
def test_an_ended_descent_continues_to_the_same_bits(outer, ends, tmp_path):
    descent = mgd.MetaDescent(pulled_to(), OUTER[outer], constraints={"a": mgd.Box(-2.5, 2.5)})
    whole = descent.run({"a": START}, 6)
    for end in ends:
        with pytest.raises(Ended):
            descent.run({"a": START}, 6, directory=tmp_path, observe=ending_at(end))
    again = descent.run({"a": START}, 6, directory=tmp_path)
    assert record(again) == record(whole)
    history = json.loads((tmp_path / "history.json").read_text())
    assert [step["value"] for step in history] == whole.values


def test_a_descent_that_ends_between_a_divergence_and_its_record_continues_to_the_same_bits(tmp_path):
    descent = mgd.MetaDescent(cliff(), sgd(2.0))
    whole = descent.run(at(0.0), 4)
    for end in (1, 2):
        with pytest.raises(Ended):
            descent.run(at(0.0), 4, directory=tmp_path, observe=ending_at(end))
    assert record(descent.run(at(0.0), 4, directory=tmp_path)) == record(whole)
    assert sum(step.diverged for step in whole.history) == len(whole.notes) > 4


def test_a_finished_descent_goes_on_where_more_steps_are_asked_for_and_trains_no_more_where_not(tmp_path):
    descent = mgd.MetaDescent(pulled_to(), adam)
    descent.run({"a": START}, 2, directory=tmp_path)
    observed = []
    five = descent.run({"a": START}, 5, directory=tmp_path, observe=lambda step, *_: observed.append(step.step))
    assert observed == [2, 3, 4] and record(five) == record(descent.run({"a": START}, 5))
    again = descent.run({"a": START}, 5, directory=tmp_path, observe=lambda step, *_: observed.append(step.step))
    assert observed == [2, 3, 4] and record(again) == record(five)


def test_a_directory_of_another_descent_is_refused_and_says_how_it_differs(tmp_path):
    box = {"a": mgd.Box(-9.0, 9.0)}
    mgd.MetaDescent(pulled_to(), adam, constraints=box).run({"a": START}, 1, directory=tmp_path)

    def again(start=START, outer=adam, constraints=box):
        return mgd.MetaDescent(pulled_to(), outer, constraints=constraints).run({"a": start}, 2, directory=tmp_path)

    with pytest.raises(StaleRun, match="the start of 'a'"):
        again(start=START + 1)
    with pytest.raises(StaleRun, match="the outer optimizer"):
        again(outer=lambda x: torch.optim.Adam(x, lr=0.2))
    with pytest.raises(StaleRun, match="the outer optimizer"):
        again(outer=lambda x: torch.optim.NAdam(x, lr=0.1))
    with pytest.raises(StaleRun, match="the constraint on 'a'"):
        again(constraints={"a": mgd.Box(-9.0, 8.0)})
    with pytest.raises(StaleRun, match="the constraint on 'a'"):
        again(constraints={})
    assert len(again().history) == 2  # and it is as it was


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 100])
def test_a_damaged_directory_is_an_error_that_names_the_file(damage, tmp_path):
    descent = mgd.MetaDescent(pulled_to(), adam)
    descent.run({"a": START}, 1, directory=tmp_path)
    file = tmp_path / "text-state.mgd"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CorruptState, match=r"'state'.*delete it to start again"):
        descent.run({"a": START}, 2, directory=tmp_path)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables, says",
    [
        ({}, "at least one variable"),
        ({"a": torch.arange(3)}, r"'a' to be a floating-point tensor; got torch\.int64"),
        ({"a": [1.0, 2.0, 3.0]}, "'a' to be a floating-point tensor; got list"),
        ({"a": torch.tensor([1.0, math.nan, 0.0])}, "'a' to be finite"),
    ],
)
def test_variables_that_do_not_fit(variables, says):
    with pytest.raises(BadArgument, match=says):
        mgd.MetaDescent(pulled_to(), adam).run(variables, 1)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 2, "patience": 0}])
def test_counts_below_one(bad):
    with pytest.raises(BadArgument, match="at least 1"):
        mgd.MetaDescent(pulled_to(), adam).run({"a": START}, **bad)


@pytest.mark.parametrize(
    "problem, says",
    [
        (lambda x, i: pulled_to(), "to return a TrainingFunction and its z"),
        (lambda x, i: (pulled_to(), {"a": x["a"].detach()}), "does not depend on the variables"),
        (lambda x, i: (pulled_to(objective=lambda model: model.at), x), "one objective to descend on; got 3"),
    ],
)
def test_problems_that_are_not_valid(problem, says):
    def tuple_or_not(x, i):
        found = problem(x, i)
        return found if isinstance(found, tuple) else (found, None)

    with pytest.raises(BadArgument, match=says):
        mgd.MetaDescent(tuple_or_not, adam).run({"a": START}, 1)


def test_other_arguments_of_the_wrong_kind():
    with pytest.raises(BadArgument, match="expected problem to be"):
        mgd.MetaDescent(3, adam)
    with pytest.raises(BadArgument, match=r"one of torch\.optim; got list"):
        mgd.MetaDescent(pulled_to(), lambda x: x).run({"a": START}, 1)
    with pytest.raises(BadArgument, match=r"constraints for some of \['a'\]; got \['b'\]"):
        mgd.MetaDescent(pulled_to(), adam, constraints={"b": mgd.Box(0.0)}).run({"a": START}, 1)


@pytest.mark.parametrize(
    "constraint, says",
    [
        (mgd.Box(1.0, 0.0), "a lower bound is above its upper bound"),
        (mgd.Box(torch.zeros(2), 1.0), r"broadcast to \[3\]; got \[2\]"),
        (mgd.Box(torch.zeros(4, 3)), r"broadcast to \[3\]; got \[4, 3\]"),
        (mgd.Box(math.nan, 1.0), "bounds of 'a' that are numbers"),
        (mgd.Simplex(0.0), "total > 0"),
        (mgd.Simplex(math.inf), "finite total > 0"),
    ],
)
def test_constraints_that_are_not_valid(constraint, says):
    with pytest.raises(BadArgument, match=says):
        mgd.MetaDescent(pulled_to(), adam, constraints={"a": constraint}).run({"a": START}, 1)
