"""Schedules: the shapes against transformers' and torch's, and schedules as they reach the steps."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

import mgd
from mgd import schedules
from mgd.errors import BadArgument
from mgd_kernels import SGD, AdamW


@pytest.mark.parametrize("steps, warmup", [(1, 0), (10, 0), (10, 3), (10, 10)])
def test_shapes_are_those_of_transformers(steps, warmup):
    transformers = pytest.importorskip("transformers")

    def theirs(name, **options):
        make = getattr(transformers, f"get_{name}_schedule_with_warmup")
        return schedules.from_torch(lambda optimizer: make(optimizer, warmup, **options), steps, lr=0.3).float()

    shapes = {
        "linear": schedules.warmup_linear(steps, 0.3, warmup),
        "cosine": schedules.warmup_cosine(steps, 0.3, warmup),
        "constant": schedules.constant(steps, 0.3, warmup),
    }
    for name, ours in shapes.items():
        options = {} if name == "constant" else {"num_training_steps": steps}
        torch.testing.assert_close(ours, theirs(name, **options), rtol=1e-6, atol=1e-8)


def test_warmup_stable_decay():
    rates = schedules.wsd(10, 1.0, warmup=2, decay=4, end=0.2)
    torch.testing.assert_close(rates, torch.tensor([0, 0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]))
    assert schedules.wsd(3, 1.0, 0, 0).tolist() == [1, 1, 1] and len(schedules.wsd(3, 1.0, 0, 3)) == 3
    for wrong in ((3, 1.0, 2, 2), (3, 1.0, -1, 0), (0, 1.0, 0, 0)):
        with pytest.raises(BadArgument):
            schedules.wsd(*wrong)


def test_schedulers_of_torch():
    cosine = schedules.from_torch(lambda o: lr_scheduler.CosineAnnealingLR(o, 10), 10, lr=0.5)
    torch.testing.assert_close(cosine, 0.25 * (1 + torch.cos(torch.pi * torch.arange(10) / 10)).double())
    one_cycle = schedules.from_torch(lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=10), 10)
    assert one_cycle.shape == (10,) and float(one_cycle.max()) == 0.5
    groups = schedules.from_torch(lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5), 4, lr=[1.0, 2.0])
    assert groups.tolist() == [[1, 2], [1, 2], [0.5, 1], [0.5, 1]]
    with pytest.raises(BadArgument, match="metric"):
        schedules.from_torch(lr_scheduler.ReduceLROnPlateau, 3)


X, Y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)


def function(optimizer, steps=4):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1).double()
    loss = lambda model, batch, z: (model(batch[0])[:, 0] - batch[1]).square().mean()
    objective = lambda model: loss(model, (X, Y), None)
    return mgd.TrainingFunction(model, loss, [(X, Y)] * steps, optimizer=optimizer, objective=objective)


def test_an_optimizer_takes_a_schedule_or_a_function_of_the_step():
    rates = torch.tensor([0.1, 0.05, 0.2, 0.0], dtype=torch.float64)
    expected = function(SGD(lr=0.1)).train({"lr": rates})
    for lr in (rates, lambda step: float(rates[step]), lambda step: rates[step]):
        trained = function(SGD(lr=lr)).train()
        assert all(torch.equal(p, expected.parameters[name]) for name, p in trained.parameters.items())
    groups = [{"params": "bias", "lr": lambda step: 0.0}]
    frozen, start = function(SGD(lr=rates, param_groups=groups)), function(SGD(lr=0.0))
    assert torch.equal(frozen.train().parameters["bias"], start.train().parameters["bias"])
    varying = function(AdamW(betas=(lambda step: 0.9, torch.full((4,), 0.75)))).train()
    assert torch.equal(varying.losses, function(AdamW(betas=(0.9, 0.75))).train().losses)


def test_a_loop_of_ones_own_follows_the_schedule():
    rates = torch.tensor([0.5, 0.25])
    optimizer, plain = SGD(lr=rates), SGD(lr=0.0)
    state, expected = (o.init(torch.ones(3)) for o in (optimizer, plain))
    for rate in rates:
        optimizer.step_(state, torch.ones(3))
        plain.step_(expected, torch.ones(3), {"lr": rate})
    assert torch.equal(state.params, expected.params)
    with pytest.raises(BadArgument, match="step 2"):
        optimizer.step_(state, torch.ones(3))


@pytest.mark.parametrize(
    "lr, part",
    [
        (torch.ones(2, 2), "\\[T\\]"),
        (torch.tensor([0.1, float("nan")]), "lr"),
        (lambda step: float("inf"), "lr\\(0\\)"),
        (lambda step: "fast", "a number from lr\\(0\\)"),
        ("fast", "a function of the step"),
        (torch.ones(0), "\\[T\\]"),
    ],
)
def test_schedules_that_are_none(lr, part):
    with pytest.raises(BadArgument, match=part):
        SGD(lr=lr)


def test_schedules_of_another_length():
    with pytest.raises(BadArgument, match="one per step"):
        function(SGD(lr=torch.ones(3))).train()
    with pytest.raises(BadArgument, match="lr\\(2\\)"):
        function(SGD(lr=lambda step: 0.1 if step < 2 else float("nan"))).train()
