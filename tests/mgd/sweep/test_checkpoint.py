"""An interrupted metagradient continues where it stopped, and comes to the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from mgd import Budget, TrainingFunction
from mgd.errors import CorruptState, StaleRun, StoreBusy
from mgd.plan import training as planning
from mgd.step.step import StepFunction
from mgd_kernels import AdamW, Store

T = 30
CHECKPOINT_EVERY = 4


def training(steps: int = T, **options) -> tuple[TrainingFunction, dict]:
    """A small network with running statistics and dropout, whose steps all differ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator)
    batches = [(x[i], y[i], i) for i in (torch.randint(40, (8,), generator=generator) for _ in range(steps))]

    def loss(model, batch, z):
        inputs, targets, index = batch
        return (z["weights"][index] * F.cross_entropy(model(inputs), targets, reduction="none")).mean()

    def objective(model):
        return F.cross_entropy(model.eval()(x), y)

    options = {"optimizer": AdamW(lr=1e-2, eps_root=1e-6), "objective": objective} | options
    z = {"lr": torch.full((steps,), 1e-2), "weights": torch.ones(40)}
    return TrainingFunction(model, loss, batches, **options), z


def outcome(result) -> list[torch.Tensor]:
    return tree_leaves((result.value, result.grads, result.losses, result.model_state))


def same(result, reference) -> bool:
    return all(map(torch.equal, outcome(result), outcome(reference)))


@pytest.fixture
def often(monkeypatch):
    """Checkpoints every few steps."""
    monkeypatch.setattr(planning, "CHECKPOINT_EVERY", CHECKPOINT_EVERY)


@pytest.fixture
def interrupt(monkeypatch):
    """Calls a function whose n-th evaluation of a step (in either sweep) raises KeyboardInterrupt; counts them."""

    def run(function, n: int | None):
        count = 0

        def counted(original):
            def method(self, *args, **kwargs):
                nonlocal count
                count += 1
                if count == n:
                    raise KeyboardInterrupt
                return original(self, *args, **kwargs)

            return method

        with monkeypatch.context() as patch:
            for name in ("gradient", "second_derivatives"):
                patch.setattr(StepFunction, name, counted(getattr(StepFunction, name)))
            try:
                return function(), count
            except KeyboardInterrupt:
                return None, count

    return run


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("schedule", ["auto", "revolve"])
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


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/sweep"]
from test_checkpoint import CHECKPOINT_EVERY, planning, training
from mgd.step.step import StepFunction
planning.CHECKPOINT_EVERY = CHECKPOINT_EVERY
left = int(sys.argv[3])
def counted(original):
    def method(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return method
for name in ("gradient", "second_derivatives"):
    setattr(StepFunction, name, counted(getattr(StepFunction, name)))
f, z = training()
f.metagradient(z, resume=sys.argv[2])
"""


def killed(directory: Path, n: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(Path(__file__).parents[1]), str(directory), str(n)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == -9, process.stderr


@pytest.mark.parametrize("n", [T - 2, T + 9])
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
