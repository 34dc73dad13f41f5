"""mgd.attribute(combine=): scores of many queries from few sweeps; exact where it must be, else told how far off."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import mgd
from mgd.attribution import combined
from mgd.errors import BadArgument, BadObjective, NonFiniteState, RoughEstimate
from mgd_kernels import AdamW

N, STEPS, K = 16, 8, 14


def problem(model, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = model().to(dtype)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 2, generator=g, dtype=dtype), torch.randn(N, generator=g, dtype=dtype)
    qx, qy = torch.randn(K, 2, generator=g, dtype=dtype), torch.randn(K, generator=g, dtype=dtype)
    index = [torch.randperm(N, generator=g)[:6] for _ in range(STEPS)]
    f = mgd.TrainingFunction(
        model,
        lambda model, batch, z: (z["data_weights"] * (model(batch[0])[:, 0] - batch[1]) ** 2).mean(),
        [(x[i], y[i], i) for i in index],
        optimizer=AdamW(lr=3e-2, eps_root=1e-6),
        objective=lambda model: model(qx).square().mean(),
        per_example={"data_weights": lambda batch: batch[2]},
        **options,
    )
    z = {"data_weights": torch.ones(N, dtype=dtype)}
    return f, z, lambda model, q: (model(qx[q])[:, 0] - qy[q]) ** 2


def linear():
    return nn.Linear(2, 1)


def normalised():
    return nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))


def deep():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))


# Both models are affine functions of two numbers: gradients of K queries have rank 3, also where most of what they
# refer to are parameters and moving averages of BatchNorm.
@pytest.mark.parametrize("model", [linear, normalised])
@pytest.mark.parametrize("chunk", [None, 2])
def test_scores_are_exact_where_so_many_directions_span_the_gradients(model, chunk):
    f, z, objectives = problem(model)
    exact = mgd.attribute(f, z, K, objectives)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = mgd.attribute(f, z, K, objectives, combine=12, chunk=chunk)
    assert found.estimate.combinations == 3 and found.report.chunks_done == (1 if chunk is None else 2)
    np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.values, exact.values)
    assert found.estimate.error < 1e-8 and float(found.estimate.errors.max()) < 1e-6


def test_a_gradient_longer_than_its_sketch_gives_the_same_scores(monkeypatch):
    f, z, objectives = problem(normalised)
    monkeypatch.setattr(combined, "SKETCH", 10)  # of 11 numbers
    found = mgd.attribute(f, z, K, objectives, combine=12)
    np.testing.assert_allclose(found.scores, mgd.attribute(f, z, K, objectives).scores, rtol=1e-8, atol=1e-12)


def test_the_error_is_the_true_one_and_a_large_one_is_told():
    f, z, objectives = problem(deep)
    exact = torch.from_numpy(mgd.attribute(f, z, K, objectives).scores)
    errors = []
    for combine in (1, 10):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = mgd.attribute(f, z, K, objectives, combine=combine, probes=24)
        off = torch.from_numpy(found.scores) - exact
        true = off.norm(dim=1) / exact.norm(dim=1)
        # From 24 probes a root mean square is known to 1/sqrt(48) = 14%, one standard deviation.
        torch.testing.assert_close(found.estimate.errors, true, rtol=0.5, atol=1e-9)
        assert found.estimate.error == pytest.approx(float(off.norm() / exact.norm()), rel=0.25)
        rough = int((found.estimate.errors > combined.ROUGH).sum())
        texts = [str(w.message) for w in told if issubclass(w.category, RoughEstimate)]
        assert len(texts) == (rough > 0) and (not rough or f"the scores of {rough} of 14 queries" in texts[0])
        errors.append(found.estimate.error)
    assert errors[0] > 0.3 and errors[1] < 0.05


def test_the_estimate_is_the_projection_on_the_principal_directions():
    f, z, objectives = problem(deep)
    state, model = f.train(z).parameters, copy.deepcopy(f.model).eval()
    rows = []
    for q in range(K):
        p = {name: x.clone().requires_grad_() for name, x in state.items()}
        loss = objectives(lambda x, p=p: torch.func.functional_call(model, p, (x,)), torch.tensor([q]))[0]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(p.values()))]))
    g = torch.stack(rows)
    size = g.norm(dim=1, keepdim=True)
    u = torch.linalg.svd(g / size)[0][:, :3]
    exact = torch.from_numpy(mgd.attribute(f, z, K, objectives).scores)
    expected = size * (u @ (u.T @ (exact / size)))
    found = mgd.attribute(f, z, K, objectives, combine=3)
    np.testing.assert_allclose(found.scores, expected.numpy(), rtol=1e-7, atol=1e-11)


def test_nothing_of_the_users_is_changed_and_the_call_repeats_itself():
    f, z, objectives = problem(deep, torch.float32)
    f.model.train()
    before = {n: x.clone() for n, x in f.model.state_dict().items()}, f.objective, torch.get_rng_state()
    first, second = (mgd.attribute(f, z, K, objectives, combine=9) for _ in range(2))
    assert np.array_equal(first.scores, second.scores) and first.scores.dtype == np.float32
    assert all(torch.equal(x, before[0][n]) for n, x in f.model.state_dict().items()) and f.model.training
    assert f.objective is before[1] and torch.equal(torch.get_rng_state(), before[2])
    assert {"directions", "probes", "rehearsal"} <= set(first.report.seconds) and first.report.trainings_per_query > 0
    assert first.estimate.to_dict()["errors"] == first.estimate.errors.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"combine": 0}, "from 1 to 13"),
        ({"combine": K}, "fewer than the 14 queries"),
        ({"combine": True}, "got True"),
        ({"combine": 2.0}, "got 2.0"),
        ({"combine": 3, "probes": 1}, "probes >= 2"),
        ({"combine": 3, "out": "somewhere"}, "without out="),
        ({"combine": 3, "resume": "somewhere"}, "without resume="),
        ({"combine": 3, "query_groups": 2}, "without query_groups="),
    ],
)
def test_bad_arguments_are_told(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    f, z, objectives = problem(linear)
    with pytest.raises(BadArgument, match=words):
        mgd.attribute(f, z, K, objectives, **options)
    assert not list(tmp_path.iterdir())


def test_bad_queries_are_told():
    f, z, objectives = problem(linear)
    with pytest.raises(BadObjective, match="one loss for each of 1 queries"):
        mgd.attribute(f, z, K, lambda model, q: model.weight.sum(), combine=3)

    def infinite(model, q):
        return objectives(model, q) + (model.weight.sum() * 0).sqrt() if 5 in q else objectives(model, q)

    with pytest.raises(NonFiniteState, match="query 5"):
        mgd.attribute(f, z, K, infinite, combine=3)
