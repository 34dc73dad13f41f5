"""The recipes that take a device, on a pretended one."""

from __future__ import annotations

from dataclasses import replace

import device_cases  # noqa: F401  # makes the device known
import pytest
import torch

from mgd.errors import BadArgument
from mgd.recipes import data
from mgd.recipes.attribute import recipe as attribute
from mgd.recipes.attribute.images import images_task
from mgd.recipes.attribute.task import Training
from mgd.recipes.demo import recipe as demo
from mgd.recipes.demo import report as demo_report
from mgd.recipes.lr_schedule import recipe as lr_schedule
from mgd.recipes.poison import recipe as poison
from mgd.recipes.small_images import Task
from mgd.recipes.smoothness import recipe as smoothness
from mgd.ui.console import Reporter
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


def test_poison_is_made_and_looked_for_there():
    small = {"training": 60, "held_out": 40, "defender": 40, "test": 50, "steps": 2, "meta_steps": 2, "seeds": 1}
    few = {"fresh": 2, "others": (), "radii": (0.1,), "cancelling_steps": 1, "check_seeds": 1, "watch": 2, "batch": 20}
    settings = poison.Settings(share=0.05, **small, **few)
    found, expected = (poison.run(*DIGITS, settings, device=device) for device in ("pretend", "cpu"))
    assert torch.equal(found.poisoned, expected.poisoned) and found.images[poison.MGD].device.type == "cpu"
    torch.testing.assert_close(found.images[poison.MGD], expected.images[poison.MGD], rtol=0, atol=1e-5)
    (check, *_), (same, *_) = found.checks[poison.MGD], expected.checks[poison.MGD]
    torch.testing.assert_close(check.suspicion, same.suspicion, rtol=1e-3, atol=1e-6)


def test_examples_are_attributed_there():
    """By ours; what it is compared with runs on the CPU."""
    training = Training(examples=40, batch=20, epochs=1, rate=2e-3, eps_root=1e-3)
    how = replace(attribute.Evaluation().quick(), baselines=("gradient products",))
    task = images_task(*DIGITS, training, 3, seed=0)
    for_both = replace(task, device="pretend"), task
    found, expected = (attribute.judge(each, how, 3, how.baselines, Reporter()) for each in for_both)
    assert next(found.task.model.parameters()).device.type == "pretend"
    for method, by_share in expected.predicted.items():
        for share, predicted in by_share.items():
            torch.testing.assert_close(found.predicted[method][share], predicted, rtol=1e-3, atol=1e-5)


def test_devices_that_are_not_there_are_refused():
    assert checked_device("pretend:0").index == 0
    for name, words in (("pretend:7", "one of 1 devices"), ("cuda", "finds no cuda"), ("gpu", "such as")):
        if name != "cuda" or not torch.cuda.is_available():
            with pytest.raises(BadArgument, match=words):
                checked_device(name)
