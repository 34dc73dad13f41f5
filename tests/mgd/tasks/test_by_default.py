"""When tasks run together by themselves, and what it costs where they cannot."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
import torch.nn.functional as F
from cases import cross_entropy
from task_cases import DOUBLE, alone, difference, hypers, mean, tasks, training

import mgd
from mgd.autodiff.captured import CapturedEvaluator
from mgd.tasks import account, together
from mgd.tasks.account import Account, Graphs

EXACT = 1e-12
BITS = 1e-15


def accounts(f):
    """Those that were asked for a decision."""
    return [each for pair in account._accounts[f._evaluator].values() for each in pair if each.measured]


def the_account(f):
    (found,) = accounts(f)
    return found


@pytest.fixture
def cheap(monkeypatch):
    """Graphs seem to cost next to nothing, so that few tasks pay for them."""
    rates = account._Rates()
    for each in (rates.recorded, rates.mapped):
        monkeypatch.setattr(each, "measured", lambda seconds, nodes: None)
    monkeypatch.setattr(account, "_rates", rates)
    costing(1e-5)


def costing(seconds):
    """For each node."""
    account._rates.recorded.seconds = account._rates.mapped.seconds = seconds


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(account, "_rates", account._Rates())


def test_a_list_that_is_long_enough_is_worth_the_graphs(groups):
    """The decision by itself, at the true cost: two tasks are measured, and what the others would save exceeds it."""
    case = training()
    fs, z = tasks(case, count=2, trace=None) * 700, {"lr": torch.tensor(0.2, dtype=DOUBLE)}
    found = mean(fs, z)
    assert groups == [(45, True)] * 31 + [(3, False)]  # as even as 1398 can be
    assert difference(found, alone(fs[:2], z)) < EXACT
    assert not the_account(fs[0]).refused


def test_calls_add_up(groups, cheap):
    """Of few tasks each, as in MAML: none pays by itself, and some do together."""
    case = training()
    fs, z = tasks(case, trace=None), hypers(case)
    costing(2e-3)
    expected, calls = alone(fs, z), 0
    while not groups and calls < 200:
        assert difference(mean(fs, z), expected) < EXACT
        calls += 1
    assert 2 < calls < 200 and groups == [(3, True)]
    mean([f.replaced() for f in fs], z)  # new functions of the same model and loss
    assert groups == [(3, True)] * 2


def test_other_calls_have_accounts_of_their_own(groups, cheap):
    """Without a gradient less is saved; but graphs that are there serve both."""
    case = training()
    fs, z = tasks(case, trace=None), hypers(case)
    for _ in range(3):
        mean(fs, z)
    groups.clear()
    with torch.no_grad():
        for _ in range(3):
            mgd.mean_over(fs, z)
    assert groups and len(accounts(fs[0])) == 2


def test_few_tasks_are_those_of_single_trainings(groups):
    case = training()
    fs, z = tasks(case, trace=None), hypers(case)
    assert difference(mean(fs, z), alone(fs, z)) < BITS and groups == []


def test_a_generator_does_not_begin_in_the_middle(groups, cheap):
    """Its groups would have another size than in the next call, and graphs for each size cost."""
    case = training()
    fs, z = tasks(case, count=4, trace=None), hypers(case)
    mean(iter(fs[:2]), z)
    costing(1e3)
    mean(iter(fs), z)
    costing(1e-5)
    groups.clear()
    mean(iter(fs), z)
    assert groups == [(4, True)]


def test_a_loss_that_is_refused_is_not_tried_for_each_task(groups, cheap, monkeypatch):
    class Marking:
        def __call__(self, model, batch, z):
            model.trained = True
            return cross_entropy(model, batch, z)

    tried, recorded = [], together.recorded_task
    monkeypatch.setattr(together, "recorded_task", lambda *given: tried.append(0) or recorded(*given))
    case = training(loss=Marking())
    fs, z = tasks(case, count=20, trace=None), hypers(case)
    for _ in range(3):
        found = mean(fs, z)
    assert 0 < len(tried) <= account.MOST_FAILURES and groups == [] and the_account(fs[0]).refused
    assert difference(found, alone(fs, z)) < BITS


def test_a_capture_that_fails_is_not_tried_again(groups, cheap, monkeypatch):
    def branching(model, batch, z):
        loss = cross_entropy(model, batch, z)
        return loss * 2 if batch[0].sum() > 0 else loss

    tried, called = [], CapturedEvaluator.call
    monkeypatch.setattr(CapturedEvaluator, "call", lambda *given: tried.append(0) or called(*given))
    case = training(loss=branching)
    fs, z = tasks(case, count=8, trace=None), hypers(case)
    with pytest.warns(RuntimeWarning, match="cannot capture"):  # as where it would have paid by itself
        mean(fs, z)
    assert len(tried) == 1 and groups == []
    assert difference(mean(fs, z), alone(fs, z)) < BITS


def test_a_graph_with_other_bits_than_autograd_is_not_used(groups, cheap, monkeypatch):
    """A new graph is compared with the loss as it is written, as in a single training."""
    monkeypatch.setattr("mgd.autodiff.captured.same_evaluation", lambda *given: False)
    case = training()
    fs, z = tasks(case, count=8, trace=None), hypers(case)
    with pytest.warns(RuntimeWarning, match="rounds differently"):
        found = mean(fs, z)
    assert groups == [] and difference(found, alone(fs, z)) < BITS


def test_an_objective_whose_graph_is_another_function_is_not_used(groups, cheap):
    """Dynamo looks through a cache, and so captures what Python does not do."""
    scale = {"value": 2.0}

    @functools.lru_cache
    def factor():
        return scale["value"]

    factor()
    scale["value"] = 3.0
    case = training()
    fs, z = tasks(case, count=8, trace=None), hypers(case)
    x, y, _ = fs[0].batches[0]
    fs = [f.replaced(objective=lambda model: factor() * F.cross_entropy(model(x), y)) for f in fs]
    assert difference(mean(fs, z), alone(fs, z)) < BITS and groups == []


def test_losses_made_for_each_task_share_nothing(groups, cheap):
    case = training()
    z = {"lr": torch.tensor(0.2, dtype=DOUBLE)}
    held = tasks(case, count=6, trace=None)

    def own(f):
        return f.replaced(loss=lambda model, batch, z: cross_entropy(model, batch, z))

    found = mean((own(f) for f in held), z)
    assert groups == [] and difference(found, alone(held, z)) < BITS
    gc.collect()


def test_state_that_changes_between_calls(groups, cheap):
    """The loss reads it by a guard, so that there is another graph for it."""
    scale = {"value": 1.0}
    case = training(loss=lambda model, batch, z: scale["value"] * cross_entropy(model, batch, z))
    fs, z = tasks(case, trace=None), hypers(case)
    for value in (1.0, 1.0, 1.0, 1.5, 1.5):
        scale["value"] = value
        found = mean(fs, z)
        assert difference(found, alone(fs, z)) < EXACT
    assert len(groups) >= 2


def test_kinds_that_alternate(groups, cheap):
    case = training()
    fs, others = tasks(case, count=4, trace=None), tasks(case, count=4, steps=2, trace=None)
    z = {"lr": torch.tensor(0.2, dtype=DOUBLE)}
    mixed = [x for pair in zip(fs, others, strict=True) for x in pair]
    plain = [f.replaced(trace=False) for f in fs]
    expected = alone([*mixed, *plain], z)
    for _ in range(6):
        assert difference(mean([*mixed, *plain], z), expected) < EXACT
    assert (4, True) in groups and len(accounts(fs[0])) == 2


def test_where_one_by_one_is_as_fast_it_goes_on():
    kind = Account(5, True, Graphs())
    for _ in range(2):
        kind.ran_alone(1.0, 16, 10)
    kind.bought = True
    kind.ran(16, True, True, 30.0)
    for _ in range(account.COMPARED):
        assert kind.pays(16, 0)
        kind.ran(16, True, False, 16 * 0.7)  # more than half
    assert not kind.pays(16, 0) and not kind.refused  # what one by one takes now is measured again
    kind.ran_alone(0.9, 16, 0)
    kind.ran_alone(0.6, 16, 0)
    assert kind.refused
    kind = Account(5, True, Graphs())
    kind.ran_alone(1.0, 16, 10)
    kind.bought = True
    for _ in range(account.COMPARED):
        kind.ran(16, True, False, 16 * 0.3)
    assert kind.pays(16, 0)


def test_the_bound_of_rent_or_buy():
    """At any number of tasks: at most 2 - g/r times the better of both, and the caution."""
    for share in (0.1, 0.4, 0.7):
        kind, count, alone = Account(5, True, Graphs()), 0, 5e-3
        while not kind.pays(16, 0):
            kind.ran_alone(alone, 16, 10)
            count += 1
        cost, spent = kind.cost(16), count * alone
        better = min(spent, cost + share * spent)
        assert count > 2 and spent + cost < 2.6 * better


def test_sizes_pay_for_themselves():
    kind = Account(5, True, Graphs(sizes={4, 16}), nodes=10, alone=5e-3, together=1e-3)
    assert kind.part(16, 16) == (16, True) and kind.part(17, 17) == (16, True) and kind.part(3, 3) == (3, False)
    assert kind.part(7, 7000) == (7, True)  # of a list, whose rest is worth it
    parts = [kind.part(9, 9) for _ in range(40)]
    assert parts[0] == (4, True) and parts[-1] == (9, True)
    assert kind.part(1, 10**9) == (1, False)


def test_failures_in_a_row_are_the_end():
    kind = Account(5, True, Graphs(), nodes=10)
    for _ in range(account.MOST_FAILURES - 1):
        kind.failed(0.0)
    kind.ran(4, False, False, 1.0)
    kind.failed(0.0)
    assert not kind.refused
    kind.failed(1e3)
    assert kind.refused
