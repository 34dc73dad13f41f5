"""mgd.attribute(combine=): scores of many queries from few sweeps; exact where it must be, else told how far off."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import mgd
from mgd.attribution import combined
from mgd.errors import (
    BadArgument,
    BadData,
    BadObjective,
    NonFiniteState,
    RoughEstimate,
    StaleRun,
    UnknownFormat,
)
from mgd.plan import training as planning
from mgd.util.run_directory import RunDirectory
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


# --- in a directory --------------------------------------------------------------------------------------------------


def facts(found):
    return [found.scores.tolist(), found.values.tolist(), found.estimate.to_dict(), found.queries, found.names]


@pytest.mark.parametrize("where", ["out", "resume"])
def test_a_directory_holds_the_bits_that_memory_does(where, tmp_path):
    f, z, objectives = problem(deep, torch.float32, trace=False)
    inside = mgd.attribute(f, z, K, objectives, combine=10, chunk=4)
    found = mgd.attribute(f, z, K, objectives, combine=10, chunk=4, **{where: tmp_path})
    assert isinstance(found.scores, np.memmap) and facts(found) == facts(inside) == facts(
        mgd.Attribution.load(tmp_path)
    )
    assert found.report.chunks_done == 3 and found.estimate.combinations == 10
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["combine"] == 10 and index["estimated error"] == found.estimate.error
    kept = {path.name for path in tmp_path.iterdir() if path.name.endswith(".mgd") and "chunk" not in path.name}
    assert kept == {f"text-{name}.mgd" for name in ("run", "index", "training", "estimate", "report")}
    again = mgd.attribute(f, z, K, objectives, combine=10, **{where: tmp_path})  # the chunk is what it began with
    assert facts(again) == facts(inside)
    assert (again.report.chunks_done, again.report.chunks_kept, again.report.trainings_per_query) == (0, 3, None)


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def counted():
    """A function that attributes, and raises Interrupted at the n-th evaluation of a loss or of a query's objective.
    Beside it what comes of it otherwise, and how many evaluations that takes."""
    calls, last = [0], [10**9]

    def count():
        calls[0] += 1
        if calls[0] > last[0]:
            raise Interrupted

    def attribute(end, **options):
        f, z, objectives = problem(deep, torch.float32, trace=False)
        inner = f.loss

        def loss(model, batch, z):
            count()
            return inner(model, batch, z)

        def asked(model, q):
            count()
            return objectives(model, q)

        calls[0], last[0] = 0, end
        return mgd.attribute(f.replaced(loss=loss), z, K, asked, combine=9, chunk=5, **options), calls[0]

    return attribute, *attribute(10**9)


@pytest.mark.filterwarnings("ignore::mgd.errors.RoughEstimate")
def test_an_interrupted_estimate_continues_to_the_same_bits(counted, tmp_path, monkeypatch):
    """Wherever it is interrupted: before the directions, in both sweeps, between them, in the forward passes."""
    monkeypatch.setattr(planning, "CHECKPOINT_EVERY", 3)
    attribute, whole, _ = counted
    _, evaluations = attribute(10**9, resume=tmp_path / "whole")
    saved = []
    for number, end in enumerate([*range(STEPS, evaluations, evaluations // 5), evaluations - 2]):
        place = tmp_path / str(number)
        with pytest.raises(Interrupted):
            attribute(end, resume=place)
        with pytest.raises((BadData, UnknownFormat)):
            mgd.Attribution.load(place)
        found, again = attribute(10**9, resume=place)
        assert facts(found) == facts(whole)
        saved.append((found.report.chunks_kept, evaluations - again))
        assert not list(place.glob("combinations-*"))
    assert {kept for kept, _ in saved} == {0, 1, 2}
    assert max(fewer for _, fewer in saved) > STEPS * 4  # two sweeps, a way there and back each


@pytest.mark.filterwarnings("ignore::mgd.errors.RoughEstimate")
def test_an_estimate_that_ends_between_two_writes_continues_to_the_same_bits(tmp_path, monkeypatch):
    """Of entries of the directory: two for what it is of, directions, two sweeps, passes, five rows, the error, the
    report; then four are removed."""
    f, z, objectives = problem(linear, torch.float32, trace=False)
    run = lambda directory: mgd.attribute(f, z, 5, objectives, combine=2, chunk=1, probes=2, out=directory)
    whole, written, last = facts(run(tmp_path / "whole")), [0], [10**9]

    def counting(before):
        def after(self, *entry):
            written[0] += 1
            if written[0] > last[0]:
                raise Interrupted
            return before(self, *entry)

        return after

    for name in ("write", "remove"):
        monkeypatch.setattr(RunDirectory, name, counting(getattr(RunDirectory, name)))
    run(tmp_path / "counted")
    total = written[0]
    assert total == 2 + 1 + 2 + 1 + 5 + 2 + 4
    for end in (1, 3, 4, 6, 8, total - 5, total - 4, total - 2):
        written[0], last[0] = 0, end
        with pytest.raises(Interrupted):
            run(tmp_path / str(end))
        last[0] = 10**9
        assert facts(run(tmp_path / str(end))) == whole
        assert facts(mgd.Attribution.load(tmp_path / str(end))) == whole


@pytest.mark.filterwarnings("ignore::mgd.errors.RoughEstimate")
def test_a_directory_of_another_estimate_is_refused(tmp_path):
    f, z, objectives = problem(linear)
    run = lambda **options: mgd.attribute(f, z, K, objectives, out=tmp_path, **options)
    run(combine=2)
    for says, options in {
        "the combine": {"combine": 1},
        "the probes": {"combine": 2, "probes": 3},
        "the chunk": {"combine": 2, "chunk": 1},
        "the combine, the probes": {},
    }.items():
        with pytest.raises(StaleRun, match=says):
            run(**options)
    assert run(combine=2).report.chunks_kept == 1


def test_the_directions_that_were_begun_with_are_kept(tmp_path, monkeypatch):
    """On another machine they could come out otherwise, and what was swept would be of others."""
    f, z, objectives = problem(deep, trace=False)
    whole = mgd.attribute(f, z, K, objectives, combine=10, chunk=5)
    sweeps = []

    before = combined.Gradients.combined

    def once(gradients, mix):
        sweeps.append(len(mix))
        if len(sweeps) == 2:
            raise Interrupted
        return before(gradients, mix)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(combined.Gradients, "combined", once)
        mgd.attribute(f, z, K, objectives, combine=10, chunk=5, out=tmp_path)
    right = combined.directions
    monkeypatch.setattr(combined, "directions", lambda sketches, count: [-x for x in right(sketches, count)])
    found = mgd.attribute(f, z, K, objectives, combine=10, chunk=5, out=tmp_path)
    assert facts(found) == facts(whole)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"combine": 0}, "from 1 to 13"),
        ({"combine": K}, "fewer than the 14 queries"),
        ({"combine": True}, "got True"),
        ({"combine": 2.0}, "got 2.0"),
        ({"combine": 3, "probes": 1}, "probes >= 2"),
        ({"combine": 0, "out": "somewhere"}, "from 1 to 13"),
        ({"combine": 3, "query_groups": 2}, "groups that divide 1 processes"),
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
