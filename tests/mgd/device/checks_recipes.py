"""The recipes that take a device, on a pretended one."""

from __future__ import annotations

import device_cases  # noqa: F401  # makes the device known
import pytest
import torch

from mgd.errors import BadArgument
from mgd.recipes import data
from mgd.recipes.demo import recipe as demo
from mgd.recipes.demo import report as demo_report
from mgd.recipes.lr_schedule import recipe as lr_schedule
from mgd.recipes.small_images import Task
from mgd.recipes.smoothness import recipe as smoothness
from mgd.util.devices import checked_device

DIGITS = data.digits(), data.digits(train=False)


def test_the_demonstration():
    """What it finds is what it finds on the CPU."""
    found = demo.run(*DIGITS, steps=2, device="pretend")
    problem = demo.Problem.make(*DIGITS, 2, seed=0)
    expected = problem.function.metagradient(problem.z).grads["data_weights"]
    assert found.check.passed and found.result.value.device.type == "pretend"
    assert torch.allclose(found.harm, expected, rtol=1e-3, atol=1e-6)
    assert demo_report.page(found).sections


def test_a_search_for_a_schedule_trains_there():
    settings = lr_schedule.Settings(steps=4, batch=20, held_out=50, tested=50)
    for device in ("pretend", "cpu"):
        task = Task.make(*DIGITS, 80, 50, 50, seed=0, device=device)
        f = lr_schedule.training(task, settings, seed=0)
        loss, right = task.judge(f, {"lr": torch.full((4,), 1e-3)})
        assert loss.device == right.device == torch.device("cpu")
        gradient = f.metagradient({"lr": torch.full((4,), 1e-3)}).grads["lr"]
        assert gradient.device.type == "cpu" and bool(gradient.all())


def test_smoothness_is_measured_there():
    settings = smoothness.Settings(steps=2, directions=1, sizes=(0.1,), held_out=50, tested=50)
    found = {}
    for device in ("pretend", "cpu"):
        task = Task.make(*DIGITS, 400, 50, 50, seed=0, device=device)
        entry = found[device] = smoothness.Timings([], [])
        smoothness.measure(task, smoothness.CHOICES[settings.choices[0]], settings, 0, entry)
    there, here = (torch.tensor(found[device].trusts[0].smoothness) for device in ("pretend", "cpu"))
    assert torch.allclose(there, here, rtol=1e-2)


def test_devices_that_are_not_there_are_refused():
    assert checked_device("pretend:0").index == 0
    for name, words in (("pretend:7", "one of 1 devices"), ("cuda", "finds no cuda"), ("gpu", "such as")):
        if name != "cuda" or not torch.cuda.is_available():
            with pytest.raises(BadArgument, match=words):
                checked_device(name)
