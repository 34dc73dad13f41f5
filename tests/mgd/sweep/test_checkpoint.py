"""An interrupted metagradient continues where it stopped, and comes to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from interruptions import CHECKPOINT_EVERY, T, killed, same, training

from mgd import Budget
from mgd.errors import BadArgument, CorruptState, StaleRun, StoreBusy
from mgd_kernels import Store


@pytest.mark.parametrize(("schedule", "microbatches"), [("auto", 1), ("revolve", 2)])
def test_interrupted_at_every_kind_of_moment(tmp_path, often, interrupt, schedule, microbatches):
    budget = Budget(disk=(tmp_path, "1MB")) if schedule == "revolve" else None
    f, z = training(schedule=schedule, microbatches=microbatches, budget=budget)
    reference = f.replaced(schedule="auto", budget=None).metagradient(z)
    _, whole = interrupt(lambda: f.metagradient(z, resume=tmp_path / "whole"), None)
    for n in (
        1,
        CHECKPOINT_EVERY,
        CHECKPOINT_EVERY + 1,
        T - 1,
        T,
        T + 1,
        T + CHECKPOINT_EVERY,
        T + CHECKPOINT_EVERY + 2,
        whole - 1,
        whole,
    ):
        directory = tmp_path / str(n)
        assert interrupt(lambda d=directory: f.metagradient(z, resume=d), n)[0] is None
        result, rest = interrupt(lambda d=directory: f.metagradient(z, resume=d), None)
        assert same(result, reference)
        assert n - 1 + rest <= whole + 2 * CHECKPOINT_EVERY, "more was done again than the last checkpoint's distance"


@pytest.mark.parametrize("n", [3, 24, 34])
def test_a_run_of_which_the_last_steps_are_differentiated(tmp_path, often, interrupt, n):
    f, z = training(since=12)
    assert interrupt(lambda: f.metagradient(z, resume=tmp_path), n)[0] is None
    result, _ = interrupt(lambda: f.metagradient(z, resume=tmp_path), None)
    assert same(result, f.metagradient(z))


def test_interrupted_again_and_again(tmp_path, often, interrupt):
    f, z = training()
    result, calls = None, 0
    while result is None:
        result, _ = interrupt(lambda: f.metagradient(z, resume=tmp_path), CHECKPOINT_EVERY + 3)
        calls += 1
    assert calls > 10
    assert same(result, f.metagradient(z))
    with Store.open(tmp_path) as store:
        assert store.keys() == [], "what is finished leaves nothing behind"


@pytest.mark.parametrize("n", [pytest.param(T - 2, marks=pytest.mark.slow), T + 9])
def test_killed(tmp_path, often, n):
    killed(tmp_path, n)
    f, z = training()
    assert same(f.metagradient(z, resume=tmp_path), f.metagradient(z))


def files(directory: Path, text: str) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and text in path.name)


def test_torn_checkpoint_begins_again(tmp_path, often, interrupt):
    f, z = training()
    interrupt(lambda: f.metagradient(z, resume=tmp_path), T + 9)
    (path,) = files(tmp_path, "checkpoint")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert same(f.metagradient(z, resume=tmp_path), f.metagradient(z))


def test_damaged_log_is_never_a_wrong_number(tmp_path, often, interrupt):
    f, z = training()
    interrupt(lambda: f.metagradient(z, resume=tmp_path), T + 9)
    path = files(tmp_path, "gradient")[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptState, match="gradient"):
        f.metagradient(z, resume=tmp_path)


def test_another_run_is_refused(tmp_path, often, interrupt):
    f, z = training()
    interrupt(lambda: f.metagradient(z, resume=tmp_path), T + 3)
    with pytest.raises(StaleRun, match=r"z\['lr'\]"):
        f.metagradient({**z, "lr": 2 * z["lr"]}, resume=tmp_path)
    with pytest.raises(StaleRun, match="seed"):
        f.replaced(seed=1).metagradient(z, resume=tmp_path)
    assert same(f.metagradient(z, resume=tmp_path), f.metagradient(z)), "the refusals changed nothing"


def test_two_at_once_are_refused(tmp_path):
    f, z = training(steps=3)
    with Store.open(tmp_path), pytest.raises(StoreBusy):
        f.metagradient(z, resume=tmp_path)


def test_another_objective_with_the_same_start(tmp_path, often, interrupt):
    """Its value and gradient at the initial parameters are the same; at the trained ones they are not."""
    f, z = training(trace=False)
    start = f.model[0].weight.detach().clone()
    other = f.replaced(objective=lambda model: f.objective(model) + (model[0].weight - start).pow(4).sum())
    assert interrupt(lambda: f.metagradient(z, resume=tmp_path), T + CHECKPOINT_EVERY + 2)[0] is None
    with pytest.raises(StaleRun, match="the objective at the trained parameters"):
        other.metagradient(z, resume=tmp_path)
    assert same(f.metagradient(z, resume=tmp_path), f.metagradient(z))


@pytest.mark.parametrize("no_path", [5, "", "a\0b"])
def test_what_is_no_path(no_path):
    f, z = training(2)
    with pytest.raises(BadArgument, match="path"):
        f.metagradient(z, resume=no_path)
    with pytest.raises(BadArgument, match="path"):
        Budget(disk=(no_path, "1GB"))
