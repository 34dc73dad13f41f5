"""The examples run, and do what their first lines say."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch):
    """Runs an example, by name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name: importlib.import_module(name).main()


def test_augmentation(run):
    found = run("augmentation")
    assert 15 < found["degrees"] < 40  # 30 in the held-out digits
    assert found["after"] < 0.9 * found["before"]


def test_dataset_distillation(run):
    found = run("dataset_distillation")
    assert found["after"] > found["before"] + 0.1
    assert found["unseen"] > found["before"] + 0.05


def test_distributed(run):
    assert run("distributed")["found"] > 0.6


def test_distributed_under_torchrun():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, EXAMPLES / "distributed.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert "2 processes: held-out loss" in done.stdout, done.stderr


def test_few_shot(run):
    found = run("few_shot")
    assert found["after"] < 0.6 * found["before"]


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_hugging_face_lora(run):
    for package in ("transformers", "peft", "accelerate"):
        pytest.importorskip(package)
    found = run("hugging_face_lora")
    assert found["found"] > 0.8
    assert found["after"] < 0.8 * found["before"]


def test_learning_rate_knots(run):
    found = run("learning_rate_knots")
    assert found["best"] < 0.5 * found["first"]
    assert found["after"] < 0.5 * found["before"]


def test_loss_parameters(run):
    found = run("loss_parameters")
    assert found["passed"] and found["alike"] > 0.8
    assert found["after"] < 0.9 * found["before"]


def test_noisy_labels(run):
    found = run("noisy_labels")
    assert found["found"] > 0.6  # 0.1 by chance
    assert found["after"] > found["before"]


def test_own_optimizer(run):
    found = run("own_optimizer")
    assert found["passed"]
    assert found["after"] < 0.5 * found["before"]


def test_every_example_is_short_tested_and_introduced():
    tests = Path(__file__).read_text("utf-8")
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text("utf-8")
        assert len(text.splitlines()) < 100, path
        assert f'run("{path.stem}")' in tests, path
        assert f"Run: python examples/{path.name}" in text.split('"""')[1], path
