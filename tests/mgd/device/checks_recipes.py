"""The recipes that take a device, on a pretended one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import device_cases  # noqa: F401  # makes the device known
import pytest
import torch

from mgd.errors import BadArgument
from mgd.rater.data_rater import DataRater
from mgd.recipes import data
from mgd.recipes.attribute.images import images_task
from mgd.recipes.attribute.judging import Evaluation, judge
from mgd.recipes.attribute.task import Training
from mgd.recipes.demo import recipe as demo
from mgd.recipes.demo import report as demo_report
from mgd.recipes.lr_schedule.trainings import Trainings
from mgd.recipes.poison import recipe as poison
from mgd.recipes.rate import recipe as rate
from mgd.recipes.select import images as select_images
from mgd.recipes.select import run as select
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
    for device in ("pretend", "cpu"):
        task = Task.make(*DIGITS, 80, 50, 50, seed=0, device=device)
        f, z = Trainings(task, steps=4, batch=20, width=8, wrong=0.5, start=0.05, seed=0)(1)
        z["lr"] = torch.full((4,), 0.05)
        loss, right = task.judge(f, z)
        assert loss.device == right.device == torch.device("cpu")
        gradient = f.metagradient(z).grads["lr"]
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
    how = replace(Evaluation().quick(), baselines=("gradient products",))
    task = images_task(*DIGITS, training, 3, seed=0)
    for_both = replace(task, device="pretend"), task
    found, expected = (judge(each, how, Reporter()) for each in for_both)
    assert next(found.task.model.parameters()).device.type == "pretend"
    for method, by_share in expected.predicted.items():
        for share, predicted in by_share.items():
            torch.testing.assert_close(found.predicted[method][share], predicted, rtol=1e-3, atol=1e-5)


def test_examples_are_selected_there():
    small = {"pool": 200, "held_out": 200, "steps": 6, "batch_size": 20, "meta_steps": 2, "width": 16, "repeats": 1}
    settings = select_images.Settings(**small)
    found, expected = (
        select.run(select_images.ImageSetting(*DIGITS, settings, device=device)) for device in ("pretend", "cpu")
    )
    assert next(found.setting.problem.model.parameters()).device.type == "pretend"
    assert found.selection.counts.device.type == "cpu" and found.to_dict()["choices"].keys() == expected.choices.keys()
    for ours, theirs in zip(found.trace, expected.trace, strict=True):
        assert abs(ours["held_out_loss"] - theirs["held_out_loss"]) < 1e-3
    assert float((found.selection.counts == expected.selection.counts).float().mean()) > 0.98


def test_passages_are_rated_there(tmp_path, monkeypatch):
    """By autograd, to spare captures. Adam's first steps are signs of gradients, which rounding may change."""
    monkeypatch.setattr(rate, "DataRater", partial(DataRater, options={"trace": False}))
    small = {"each": 60, "judged": 20, "meta_steps": 2, "lifetime": 3, "transfer_steps": 2, "steps": 2, "every": 1}
    settings = replace(rate.Settings().quick(), **small, domains=("pydoc", "c++"), context=16, width=16, batch=8)
    found, expected = (rate.run(settings, device=device) for device in ("pretend", "cpu"))
    assert found.ratings.device.type == "cpu" and bool(found.ratings.any())
    torch.testing.assert_close(found.ratings, expected.ratings, rtol=0.1, atol=2e-3)
    assert all(abs(loss - expected.transfer[name]) < 1e-3 for name, loss in found.transfer.items())
    pool, held_out = torch.randint(128, (2, 40, 17)).unbind()
    ratings = []
    for directory, goals in ((None, (2,)), (tmp_path / "run", (1, 2))):  # continued, and at once
        for goal in goals:
            rater = rate.make_rater(settings, pool, held_out, "pretend").fit(goal, directory=directory)
        ratings.append(rater.rate(pool.to("pretend")))
    assert torch.equal(*ratings)


def test_devices_that_are_not_there_are_refused():
    assert checked_device("pretend:0").index == 0
    for name, words in (("pretend:7", "one of 1 devices"), ("cuda", "finds no cuda"), ("gpu", "such as")):
        if name != "cuda" or not torch.cuda.is_available():
            with pytest.raises(BadArgument, match=words):
                checked_device(name)
