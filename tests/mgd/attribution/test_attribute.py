"""mgd.attribute: exact scores in chunks, streamed to disk, resumed to the same bits; bad trainings are refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mgd
from mgd.errors import (
    BadArgument,
    BadBatch,
    BadData,
    BadMetaparameter,
    BadObjective,
    CorruptScores,
    ReplayDivergence,
    StaleRun,
    UnknownFormat,
)
from mgd.plan import training
from mgd_kernels import AdamW

N, K, STEPS = 12, 5, 14
UNREAD = 11  # an example that no batch holds


def problem(dtype=torch.float64, batches=None, loss=None, per_example=True, **options):
    """A small training whose batches hold some examples twice, and K queries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 3)).to(dtype)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 4, generator=g, dtype=dtype), torch.randint(3, (N,), generator=g)
    index = [torch.randint(N - 1, (6,), generator=g) for _ in range(STEPS)]
    index[0] = torch.tensor([3, 3, 3, 0, 1, 2])
    held = [(x[i], y[i], i) for i in index]

    def weighted(model, batch, z):
        inputs, targets, i = batch
        w = z["data_weights"] if per_example else z["data_weights"][i]
        return (w * F.cross_entropy(model(inputs), targets, reduction="none")).mean()

    qx, qy = torch.randn(K, 4, generator=g, dtype=dtype), torch.randint(3, (K,), generator=g)
    f = mgd.TrainingFunction(
        model,
        loss or weighted,
        held if batches is None else batches(held),
        optimizer=AdamW(lr=2e-2, eps_root=1e-6),
        objective=lambda model: F.cross_entropy(model.eval()(qx), qy),
        per_example={"data_weights": lambda batch: batch[2]} if per_example else None,
        **options,
    )
    z = {"lr": torch.full((STEPS,), 2e-2), "data_weights": torch.ones(N, dtype=dtype)}
    return f, z, lambda model, q: F.cross_entropy(model.eval()(qx[q]), qy[q], reduction="none")


@pytest.fixture
def case():
    return problem()


class Interrupted(Exception):
    pass


# --- the scores ------------------------------------------------------------------------------------------------------


def test_a_score_is_the_derivative_of_a_querys_loss_with_respect_to_a_weight(case):
    """Against central differences of whole trainings in float64, example 3 standing three times in one batch."""
    f, z, objectives = case
    found = mgd.attribute(f, z, K, objectives)

    def losses(i, weight):
        w = z["data_weights"].clone()
        w[i] = weight
        g = f.replaced(objective=lambda model: objectives(model, torch.arange(K)))
        return g.value({**z, "data_weights": w})

    h = 1e-5
    for i in range(N):
        expected = (losses(i, 1 + h) - losses(i, 1 - h)) / (2 * h)
        # The remainder is of order h² = 1e-10, the rounding of a loss over 2h of order 1e-11.
        torch.testing.assert_close(torch.from_numpy(found.scores[:, i].copy()), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.values, losses(0, 1.0))


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_do_not_change_the_scores(trace, chunk):
    f, z, objectives = problem(trace=trace)
    whole = mgd.attribute(f, z, K, objectives)
    parts = mgd.attribute(f, z, K, objectives, chunk=chunk)
    assert parts.report.chunks_done == -(-K // chunk) and whole.report.chunks_done == 1
    assert parts.report.counts["model steps"] == parts.report.chunks_done * STEPS  # each chunk trains once
    np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-9, atol=1e-13)


def test_queries_may_be_named_by_their_numbers(case):
    f, z, objectives = case
    whole, some = mgd.attribute(f, z, K, objectives), mgd.attribute(f, z, [4, 1], objectives, names=["four", "one"])
    assert some.queries == [4, 1] and some.names == ["four", "one"]
    np.testing.assert_allclose(some.scores, whole.scores[[4, 1]], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("per_example", [True, False])
def test_an_example_that_no_step_reads_has_score_zero_and_is_told(per_example):
    f, z, objectives = problem(per_example=per_example)
    found = mgd.attribute(f, z, K, objectives)
    assert found.unvisited.tolist() == [UNREAD]
    assert (found.scores[:, UNREAD] == 0).all()
    assert found.report.unvisited == (1 if per_example else 0)  # without per_example, only the zeros tell
    assert UNREAD not in torch.cat(found.top(0, N)).tolist()
    if per_example:
        assert found.visits.sum() == 6 * STEPS and found.visits[3] >= 3


def test_predicted_changes_and_the_strongest_examples(case):
    f, z, objectives = case
    z["data_weights"][2] = 0.5
    found = mgd.attribute(f, z, K, objectives)
    expected = -(found.scores[:, 2] * 0.5 + found.scores[:, 7])
    np.testing.assert_allclose(found.predicted_changes([2, 7]).numpy(), expected)
    mask = torch.zeros(N, dtype=torch.bool)
    mask[[2, 7]] = True
    np.testing.assert_allclose(found.predicted_changes(mask).numpy(), expected)
    assert found.predicted_changes([]).tolist() == [0.0] * K
    helpful, harmful = found.top(1, 2)
    row = found.scores[1] * z["data_weights"].numpy()
    assert helpful.tolist() == np.argsort(row)[:2].tolist() and harmful.tolist() == np.argsort(-row)[:2].tolist()


def test_nothing_of_the_users_is_changed(case):
    f, z, objectives = case
    before = {name: p.clone() for name, p in f.model.state_dict().items()}, f.objective, torch.get_rng_state()
    mgd.attribute(f, z, K, objectives, chunk=2)
    assert all(torch.equal(p, before[0][name]) for name, p in f.model.state_dict().items())
    assert f.objective is before[1] and torch.equal(torch.get_rng_state(), before[2])


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_scores_on_disk_are_those_in_memory(case, tmp_path):
    f, z, objectives = case
    inside = mgd.attribute(f, z, K, objectives, chunk=2)
    found = mgd.attribute(f, z, K, objectives, chunk=2, out=tmp_path, names=list("abcde"))
    assert isinstance(found.scores, np.memmap) and np.array_equal(found.scores, inside.scores)
    assert np.array_equal(np.load(tmp_path / "scores.npy"), inside.scores)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["shape"] == [K, N] and index["dtype"] == "float64" and index["names"] == list("abcde")
    assert index["unvisited"] == 1 and index["values"] == inside.values.tolist()
    loaded = mgd.Attribution.load(tmp_path)
    assert np.array_equal(loaded.scores, inside.scores) and torch.equal(loaded.values, inside.values)
    assert loaded.unvisited.tolist() == [UNREAD] and loaded.report.to_dict() == found.report.to_dict()


def test_finished_chunks_are_not_redone(tmp_path):
    f, z, objectives = problem(torch.float32)
    reference = mgd.attribute(f, z, K, objectives, chunk=2)
    asked = []

    def counting(model, q):
        asked.append(q.tolist())
        return objectives(model, q)

    def failing(model, q):
        if q.tolist() == [4] and [4] in asked:  # for the second time: the first was the identity's
            raise Interrupted
        return counting(model, q)

    with pytest.raises(Interrupted):
        mgd.attribute(f, z, K, failing, chunk=2, out=tmp_path)
    with pytest.raises(BadData, match="4 are done"):
        mgd.Attribution.load(tmp_path)
    asked.clear()
    found = mgd.attribute(f, z, K, counting, chunk=2, out=tmp_path)
    assert (
        asked == [[0, 1], [2, 3], [4], [4]]
        and found.report.chunks_kept == 2
        and found.report.trainings_per_query is None
    )
    assert np.array_equal(found.scores, reference.scores) and torch.equal(found.values, reference.values)


@pytest.mark.parametrize("evaluations", [STEPS + 9, 2 * STEPS + 8])
def test_an_interrupted_chunk_continues_to_the_same_bits(tmp_path, monkeypatch, evaluations):
    """In the second chunk's training, and in a reverse sweep."""
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 4)
    calls, armed = [0], [True]

    def build():
        f, z, objectives = problem(torch.float32)
        inner = f.loss

        def loss(model, batch, z):
            calls[0] += 1
            if armed[0] and calls[0] > evaluations:
                raise Interrupted
            return inner(model, batch, z)

        return f.replaced(loss=loss), z, objectives

    armed[0] = False
    f, z, objectives = build()
    reference = mgd.attribute(f, z, K, objectives, chunk=3, resume=tmp_path / "whole")
    armed[0], calls[0] = True, 0
    with pytest.raises(Interrupted):
        _attribute(build, tmp_path)
    assert list((tmp_path / "parts").glob("queries-*"))
    armed[0], calls[0] = False, 0
    found = _attribute(build, tmp_path)
    whole = 2 + STEPS + 2 * 2 * STEPS  # two looks at the first step, the rehearsal, and two sweeps a chunk
    assert calls[0] < whole
    assert np.array_equal(found.scores, reference.scores) and torch.equal(found.values, reference.values)
    assert not list((tmp_path / "parts").glob("queries-*"))


def _attribute(build, tmp_path):
    f, z, objectives = build()
    return mgd.attribute(f, z, K, objectives, chunk=3, resume=tmp_path / "parts")


def test_a_directory_of_other_scores_is_refused(case, tmp_path):
    f, z, objectives = case
    mgd.attribute(f, z, K, objectives, chunk=2, out=tmp_path)
    with pytest.raises(StaleRun, match="data_weights"):
        mgd.attribute(f, {**z, "data_weights": z["data_weights"] * 2}, K, objectives, chunk=2, out=tmp_path)
    with pytest.raises(StaleRun, match="the queries"):
        mgd.attribute(f, z, [4, 3, 2, 1, 0], objectives, chunk=2, out=tmp_path)
    with pytest.raises(StaleRun, match="the chunk"):
        mgd.attribute(f, z, K, objectives, chunk=3, out=tmp_path)
    changed = f.replaced(batches=[*f.batches[:5], f.batches[0], *f.batches[6:]])  # which no digest of the first shows
    with pytest.raises(StaleRun, match="the batches"):
        mgd.attribute(changed, z, K, objectives, chunk=2, out=tmp_path)


def test_damaged_rows_are_an_error(case, tmp_path):
    f, z, objectives = case
    mgd.attribute(f, z, K, objectives, chunk=2, out=tmp_path)
    with open(tmp_path / "scores.npy", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"x")
    with pytest.raises(CorruptScores, match="rows 4 to 5"):
        mgd.attribute(f, z, K, objectives, chunk=2, out=tmp_path)


def test_a_directory_without_an_attribution_is_refused(case, tmp_path):
    with pytest.raises(UnknownFormat, match="no directory of a run"):
        mgd.Attribution.load(tmp_path)
    assert list(tmp_path.iterdir()) == []
    f, z, objectives = case
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UnknownFormat, match="not empty"):
        mgd.attribute(f, z, K, objectives, out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["index.json"]


PROBE = """
import sys, torch, mgd
from memory_probe import rise
from mgd_kernels import SGD
torch.set_num_threads(1)
n, k, chunk = map(int, sys.argv[1:4])
model = torch.nn.Linear(8, 1)
g = torch.Generator().manual_seed(0)
batches = [(torch.randn(4, 8, generator=g), torch.randint(n, (4,), generator=g)) for _ in range(5)]
loss = lambda m, b, z: (z["data_weights"] * m(b[0])[:, 0] ** 2).mean()
f = mgd.TrainingFunction(model, loss, batches, optimizer=SGD(lr=0.1), objective=lambda m: m.bias.sum(),
                         per_example={"data_weights": lambda b: b[1]})
x = torch.randn(k, 8, generator=g)
z = {"data_weights": torch.ones(n)}
run = lambda q, out: mgd.attribute(f, z, q, lambda m, i: m(x[i])[:, 0] ** 2, chunk=chunk, out=out)
run(1, sys.argv[4] + "/warm")
print(rise(lambda: run(k, sys.argv[4] + "/scores")))
"""


def test_the_scores_never_lie_in_memory_as_a_whole(tmp_path):
    """A million examples, 40 queries: 160 MB of scores on disk, in chunks of 2 (8 MB of them)."""
    n, k = 1_000_000, 40
    command = [sys.executable, "-c", PROBE, str(n), str(k), "2", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    found = mgd.Attribution.load(tmp_path / "scores")
    assert found.scores.nbytes == 4 * n * k and len(found.unvisited) >= n - 20
    assert (found.scores[:, found.visits > 0] != 0).any()
    # A chunk's scores and their check (28 MB), the weights' indices and digests; measured: 40 MB. All would be 160.
    assert int(done.stdout) < 80e6


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_random_loss_is_refused_with_the_first_step_that_differs():
    stream = random.Random(0)
    f, z, objectives = problem()
    steady = f.loss

    def loss(model, batch, z):
        noisy = any(torch.equal(batch[2], later[2]) for later in f.batches[9:])
        return steady(model, batch, z) * (1 + stream.random() if noisy else 1)

    with pytest.raises(ReplayDivergence, match="repeats itself") as error:
        mgd.attribute(f.replaced(loss=loss), z, K, objectives)
    assert error.value.step == 9


def test_a_loader_that_shuffles_anew_is_refused_with_the_first_step_that_differs():
    class Reshuffled(list):
        """From step 3 on, other batches in every training; the same within one."""

        trainings = -1

        def __getitem__(self, t):
            if t == 0:
                Reshuffled.trainings += 1
            return list.__getitem__(self, (t + Reshuffled.trainings) % STEPS if t >= 3 else t)

    f, z, objectives = problem(batches=Reshuffled)
    f.per_example.clear()
    f.loss = lambda model, batch, z: (
        z["data_weights"][batch[2]] * F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    ).mean()
    with pytest.raises(ReplayDivergence, match="step 3") as error:
        mgd.attribute(f, z, K, objectives)
    assert error.value.step == 3


def test_a_directory_keeps_nothing_of_a_training_that_does_not_repeat(tmp_path):
    stream = random.Random(0)
    f, z, objectives = problem()
    steady = f.loss
    f = f.replaced(loss=lambda model, batch, z: steady(model, batch, z) * (1 + stream.random()))
    with pytest.raises(ReplayDivergence, match="step 0"):
        mgd.attribute(f, z, K, objectives, out=tmp_path)
    with pytest.raises(BadData, match="0 are done"):
        mgd.Attribution.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"queries": [0, 1, 1]}, BadArgument, "query 1 is there 2 times"),
        ({"queries": 0}, BadArgument, "at least one query"),
        ({"queries": torch.tensor([0.5])}, BadArgument, "float32"),
        ({"names": ["a"]}, BadArgument, "a name for each"),
        ({"chunk": 0}, BadArgument, "chunk >= 1"),
        ({"chunk": 2, "memory": "1GB"}, BadArgument, "in its place"),
        ({"memory": 10}, BadArgument, "one query at least"),
        ({"weights": "weights"}, BadMetaparameter, r"z\['weights'\]"),
        ({"objectives": lambda model, q: model[0].weight.sum()}, BadObjective, "one loss for each of 5"),
        ({"objectives": lambda model, q: 1.0}, BadObjective, "a float"),
    ],
)
def test_bad_arguments_are_told(case, options, error, words):
    f, z, objectives = case
    given = {"queries": K, "objectives": objectives} | options
    with pytest.raises(error, match=words):
        mgd.attribute(f, z, **given)


def test_indices_that_no_weight_stands_for_are_told(case):
    f, z, objectives = case
    with pytest.raises(BadBatch, match=r"in 0\.\.5.*batch 1 has 0\.\.8"):
        mgd.attribute(f, {**z, "data_weights": torch.ones(6, dtype=torch.float64)}, K, objectives)
    with pytest.raises(BadMetaparameter, match="one weight per example"):
        mgd.attribute(f, {**z, "data_weights": torch.ones(N, 2, dtype=torch.float64)}, K, objectives)


@pytest.mark.parametrize("dropped", [[1, 1], [N], [-1], torch.ones(3, dtype=torch.bool), torch.tensor([0.5])])
def test_bad_subsets_are_told(case, dropped):
    f, z, objectives = case
    found = mgd.attribute(f, z, 1, objectives)
    with pytest.raises(BadArgument):
        found.predicted_changes(dropped)


def test_memory_chooses_the_chunk(case):
    from mgd.attribution.attribute import query_bytes

    f, z, objectives = case
    each = query_bytes(f, z)
    assert mgd.attribute(f, z, K, objectives, memory=2 * each).report.chunk == 2
    assert mgd.attribute(f, z, K, objectives, memory=4 * each).report.chunk == 3  # 3 + 2 rather than 4 + 1
    assert mgd.attribute(f, z, K, objectives, memory="1GB").report.chunk == K
