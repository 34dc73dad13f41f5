"""A training that is interrupted, or whose process is killed, at a chosen evaluation of a step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from mgd import TrainingFunction
from mgd.plan import training as planning
from mgd.step.step import StepFunction
from mgd_kernels import AdamW

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
    norms = result.report.adjoint_norms.nan_to_num(-1.0)  # NaN, of steps that are not differentiated, equals nothing
    return tree_leaves((result.value, result.grads, result.losses, result.model_state, norms))


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


def die_at(left: int) -> None:
    """Kill this process before its `left`-th evaluation of a step; 0: never."""

    def counted(original):
        def method(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return method

    for name in ("gradient", "second_derivatives"):
        setattr(StepFunction, name, counted(getattr(StepFunction, name)))


KILLED = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from interruptions import CHECKPOINT_EVERY, die_at, planning, training
planning.CHECKPOINT_EVERY = CHECKPOINT_EVERY
die_at(int(sys.argv[3]))
f, z = training()
f.metagradient(z, resume=sys.argv[2])
"""


def killed(directory: Path, n: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(Path(__file__).parent), str(directory), str(n)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == -9, process.stderr
