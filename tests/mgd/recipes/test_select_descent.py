"""From a selection problem to counts: both updates, resumed runs, and what goes wrong."""

from __future__ import annotations

import itertools

import pytest
import torch
from selection_cases import N, problem
from torch import nn

from mgd.errors import BadArgument, NonFiniteState
from mgd.recipes.select import Exchange, SelectionProblem, select
from mgd.recipes.select.problem import WEIGHTS
from mgd_kernels import SGD


def test_without_a_budget_counts_move_by_one_against_the_sign_of_the_metagradient():
    p, seen = problem(), []
    found = select(p, 4, share=0.5, highest=2, seed=1, observe=lambda *told: seen.append(told))
    moved = 0
    for (_, result, before), after in zip(seen, [c for *_, c in seen[1:]] + [found.last], strict=True):
        change, gradient = after - before, result.grads[WEIGHTS]
        assert bool((change * gradient.sign() <= 0).all()) and float(change.abs().max()) <= 1
        assert 0 <= float(after.min()) and float(after.max()) <= 2
        moved += int((change != 0).sum())
    assert 0 < moved < 4 * N  # some, and not all
    assert torch.equal(found.counts, found.counts.round())
    again = select(problem(), 4, share=0.5, highest=2, seed=1)
    assert torch.equal(again.last, found.last)


def test_exchange_swaps_the_worst_kept_for_the_best_left_out_and_keeps_the_sum():
    x = torch.tensor([1.0, 1, 1, 0, 0, 0], requires_grad=True)
    x.grad = torch.tensor([3.0, -2, 1, -4, 2, 0])  # the last was no candidate
    Exchange([x], share=1.0).step()
    # 0 goes for 3; the next pair would be 2 (1.0) for 4 (2.0), which is worse.
    assert x.tolist() == [0, 1, 1, 1, 0, 0]
    x.grad = torch.tensor([-1.0, -2, 1, -4, 2, 0])
    Exchange([x], share=1.0).step()
    assert x.tolist() == [1, 1, 0, 1, 0, 0]


def test_exchange_averages_over_steps_where_it_has_a_memory():
    x = torch.tensor([1.0, 0], requires_grad=True)
    outer = Exchange([x], share=1.0, memory=0.9)
    x.grad = torch.tensor([-1.0, 1])  # for what is kept, strongly
    outer.step()
    x.grad = torch.tensor([0.5, -0.5])  # scaled, as strongly against it, and it is newer
    outer.step()
    assert x.tolist() == [0, 1]
    x.grad = torch.tensor([-0.5, 0.5])
    outer.step()
    assert x.tolist() == [1, 0]


def test_a_budget_is_kept_and_only_candidates_of_the_shard_move():
    p, seen = problem(), []
    found = select(p, 6, budget=7, shard=5, share=1.0, seed=0, observe=lambda *told: seen.append(told))
    counts = [c for *_, c in seen] + [found.last]
    changes = [(b - a).abs() for a, b in itertools.pairwise(counts)]
    assert all(int(c.sum()) == 7 for c in counts)
    assert all(float(change.sum()) <= 5 for change in changes) and sum(float(c.sum()) for c in changes) > 0
    assert {len(result.grads[WEIGHTS]) for _, result, _ in seen} == {5}


def test_selection_lowers_its_objective():
    """The pool's targets are 5 for half of the examples and 0 for the others; the objective wants 0."""
    x = torch.ones(20, 1)
    y = torch.tensor([0.0, 5.0] * 10)
    p = SelectionProblem(
        nn.Linear(1, 1),
        (x, y),
        lambda model, e: (model(e[0])[:, 0] - e[1]).square(),
        lambda model: model(torch.ones(1, 1)).square().mean(),
        SGD(lr=0.1),
        40,
        10,
    )
    for options in ({}, {"budget": 10}):
        found = select(p, 12, share=0.5, highest=1, **options)
        assert bool((found.counts[y == 5] == 0).all())
        assert min(found.descent.values) < 0.05 * found.descent.values[0]


def test_a_descent_is_resumed_from_its_directory(tmp_path):
    for options in ({}, {"budget": 7, "memory": 0.5}):
        whole = select(problem(), 5, share=0.5, highest=1, **options)
        folder = tmp_path / str(len(options))
        select(problem(), 2, share=0.5, highest=1, directory=folder, **options)
        resumed = select(problem(), 5, share=0.5, highest=1, directory=folder, **options)
        assert torch.equal(resumed.last, whole.last)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def divergent() -> SelectionProblem:
    """Quadratic losses a_i (w - 1)²/2 under SGD with lr 0.5: steep ones (a = 40) make a training diverge once there
    are enough of them in a batch; the objective wants w = 1, so that every one of them is asked for."""
    a = torch.tensor([0.01] * 8 + [40.0] * 8)
    return SelectionProblem(
        nn.Linear(1, 1, bias=False),
        a,
        lambda model, a: a * (model.weight[0, 0] - 1).square() / 2,
        lambda model: (model.weight[0, 0] - 1).square(),
        SGD(lr=0.5),
        300,
        64,
        at=290,
    )


def test_a_divergent_training_is_said_with_its_step_and_fewer_counts_are_changed():
    start = torch.tensor([1.0] * 8 + [0.0] * 8)
    found = select(divergent(), 4, counts=start, share=1.0, highest=1)
    assert len(found.descent.history) == 4  # it went on
    assert found.descent.notes
    note = found.descent.notes[0]
    assert note.startswith("meta-step 1: ") and "at training step" in note and "with a share of 0.5" in note
    assert sum(step.diverged for step in found.descent.history) == len(found.descent.notes)
    assert torch.equal(found.last, found.last.round())  # counts stay whole
    with pytest.raises(NonFiniteState, match="at step"):
        select(divergent(), 2)  # the start itself


def test_dropping_everything_is_said():
    with pytest.raises(BadArgument, match="every example of the pool has been dropped"):
        select(problem(), 9, counts=torch.zeros(N))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"budget": 13}, "budget of 1..12: the pool has 12 examples"),
        ({"budget": 0}, "budget of 1..12"),
        ({"budget": 25, "highest": 2}, "budget of 1..24"),
        ({"highest": 0}, "no counts but 0 are in 0..0"),
        ({"shard": 13}, "shard of 1..12 candidates"),
        ({"shard": 0}, "shard of 1..12 candidates"),
        ({"share": 0.0}, "share of the"),
        ({"share": 1.5, "budget": 4}, "share of the"),
        ({"memory": 1.0, "budget": 4}, "memory in"),
        ({"counts": torch.ones(3)}, "a count for each of the 12 examples"),
        ({"counts": torch.full((N,), 0.5)}, "whole numbers"),
        ({"counts": torch.full((N,), 3.0), "highest": 2}, "at most 2; got 3"),
        ({"counts": torch.ones(N), "budget": 4}, "at most the budget of 4; got 12"),
    ],
)
def test_options_without_a_solution_are_refused(options, words):
    with pytest.raises(BadArgument, match=words):
        select(problem(), 1, **options)
