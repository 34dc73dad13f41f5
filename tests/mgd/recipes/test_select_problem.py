"""The surrogate of data selection: its mathematics, its batches, and pools that are none."""

from __future__ import annotations

import pytest
import torch
from selection_cases import AT, STEPS, B, N, problem

import mgd
from mgd.errors import BadArgument, BadData, BadLoss
from mgd.recipes.select import SelectionProblem, draw
from mgd.recipes.select.problem import WEIGHTS


def test_the_metagradient_of_a_candidate_is_what_its_weight_at_that_step_does():
    """Against central differences of a training written out here, in which one candidate gets a weight."""
    p, counts, candidates = problem(), torch.tensor([1.0, 2, 0] * 4), torch.tensor([2, 4, 7, 8, 9, 11])
    found = p.metagradient(counts, candidates, seed=1).grads[WEIGHTS]
    order = draw(counts, STEPS, B, torch.Generator().manual_seed(1))
    x, y = p.pool

    class Batches:
        def __len__(self):
            return STEPS

        def __getitem__(self, t):
            return x[order[t]], y[order[t]], torch.tensor(t)

    def value(candidate: int, weight: float) -> float:
        def loss(model, batch, z):
            own = p.losses(model, batch).mean()
            if int(batch[2]) != AT:
                return own
            return own + weight * p.losses(model, (x[[candidate]], y[[candidate]])).sum() / B

        f = mgd.TrainingFunction(p.model, loss, Batches(), optimizer=p.optimizer, objective=p.objective)
        return float(f.value())

    h = 1e-5
    for i, candidate in enumerate(candidates.tolist()):
        difference = (value(candidate, h) - value(candidate, -h)) / (2 * h)
        assert float(found[i]) == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_candidates_leave_the_training_as_it_is_and_the_sweep_ends_at_their_step():
    p, counts = problem(), torch.ones(N)
    with_candidates = p.metagradient(counts, torch.arange(N), seed=2)
    trained = p.train(counts, seed=2)
    for name, value in trained.parameters.items():
        assert torch.allclose(with_candidates.model_state[name], value, rtol=1e-12, atol=0)
    assert with_candidates.report.counts["hvps"] == STEPS - AT


def test_a_schedule_that_is_fixed_trains_as_one_in_z_and_lets_the_sweep_end_early():
    rate = torch.linspace(0.1, 0.01, STEPS, dtype=torch.float64)
    p = problem(fixed={"lr": rate})
    p.prepare(torch.ones(N), 0, torch.arange(N))
    z = {WEIGHTS: torch.zeros(N)}
    fixed, free = p.function.metagradient(z), problem_free(p).metagradient(z | {"lr": rate})
    assert torch.equal(fixed.value, free.value)
    assert torch.equal(fixed.grads[WEIGHTS], free.grads[WEIGHTS])
    assert (fixed.report.counts["hvps"], free.report.counts["hvps"]) == (STEPS - AT, STEPS - 1)
    # What z says overrides what is fixed.
    assert torch.equal(p.function.value(z | {"lr": 0 * rate + 0.05}), problem_free(p).value(z))
    with pytest.raises(mgd.errors.BadMetaparameter, match="fixed hyperparameters of AdamW"):
        p.function.replaced(fixed={"learning_rate": rate}).value(z)
    with pytest.raises(mgd.errors.BadMetaparameter, match=r"fixed\['lr'\] of shape"):
        p.function.replaced(fixed={"lr": rate[:3]}).value(z)


def problem_free(p: SelectionProblem) -> mgd.TrainingFunction:
    return p.function.replaced(fixed=None)


def test_batches_hold_every_example_as_often_as_its_count_an_epoch():
    counts = torch.tensor([2.0, 0, 1, 3])
    order = draw(counts, 4, 3, torch.Generator().manual_seed(0)).reshape(2, 6)
    for epoch in order:
        assert torch.bincount(epoch, minlength=4).tolist() == [2, 0, 1, 3]
    assert not torch.equal(order[0], order[1])
    with pytest.raises(BadArgument, match="no example to train on"):
        draw(torch.zeros(4), 4, 3, torch.Generator())


def test_bad_problems_are_refused():
    with pytest.raises(BadData, match="the pool is empty"):
        problem(pool=torch.zeros(0, 3))
    with pytest.raises(BadData, match="one length"):
        problem(pool=(torch.zeros(4, 3), torch.zeros(5)))
    with pytest.raises(BadData, match="NaN"):
        problem(pool=torch.full((3,), float("nan")))
    with pytest.raises(BadData, match="hold tensors"):
        problem(pool=[])
    with pytest.raises(BadArgument, match=r"in 0\.\.8; got 9"):
        problem(at=STEPS)
    with pytest.raises(BadArgument, match="microbatches"):
        problem(options={"microbatches": 2})
    with pytest.raises(BadLoss, match="for each of 4 examples"):
        problem(losses=lambda model, e: model(e[0]).mean()).train(torch.ones(N))
