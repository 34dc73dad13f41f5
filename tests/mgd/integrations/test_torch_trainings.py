"""Optimizers of torch, as they are: the same training and its metagradient. Modes of the objective, budgets by size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mgd
from mgd.errors import BadArgument
from mgd_kernels import AdamW

X, Y = torch.randn(4, 8, 3, dtype=torch.float64), torch.randint(3, (4, 8))


def network(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), *middle, nn.Linear(5, 3)).double()


def loss(model, batch, z):
    return F.cross_entropy(model(batch[0]), batch[1])


def objective(model):
    return F.cross_entropy(model(X[0]), Y[0])


def function(model, optimizer, **options):
    return mgd.TrainingFunction(
        model, loss, list(zip(X, Y, strict=True)), optimizer=optimizer, objective=objective, **options
    )


def no_decay(model):
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    return [{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 0.02}]


MAKERS = [
    lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    lambda model: torch.optim.Adam(no_decay(model), lr=0.01, weight_decay=0.1),
    lambda model: torch.optim.AdamW(no_decay(model), lr=0.01, weight_decay=0.1),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("before", [0, 3])
def test_a_training_goes_on_as_the_optimizer_of_torch_would(make, before):
    theirs = network()
    optimizer = make(theirs)

    def train(steps):
        for t in range(steps):
            optimizer.zero_grad()
            loss(theirs, (X[t], Y[t]), None).backward()
            optimizer.step()

    train(before)
    f = function(theirs, optimizer)
    trained = f.train()
    train(4)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(trained.parameters[name], p.detach(), rtol=1e-12, atol=1e-13)


def test_its_metagradient_is_that_of_the_optimizer_written_out():
    model = network()
    groups = [{"params": "*.bias", "weight_decay": 0.0, "lr": 0.02}]
    z = {"weight_decay": torch.tensor([0.1, 0.0], dtype=torch.float64)}
    ours = function(model, AdamW(lr=0.01, weight_decay=0.1, param_groups=groups)).metagradient(z)
    theirs = function(model, MAKERS[2](model)).metagradient(z)
    assert torch.equal(ours.grads["weight_decay"], theirs.grads["weight_decay"])


def test_what_the_rules_do_not_cover_is_named():
    for make, part in [
        (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize"),
        (lambda p: torch.optim.Adam(p, differentiable=True), "differentiable"),
        (lambda p: torch.optim.RMSprop(p), "RMSprop"),
    ]:
        model = network()
        with pytest.raises(BadArgument, match=part):
            function(model, make(model.parameters()))


def test_the_objective_finds_the_model_in_eval_mode():
    seen = []

    def watching(model):
        seen.append(model.training)
        return objective(model)

    model = network(nn.Dropout(0.5))
    options = {"optimizer": AdamW(), "objective": watching}
    batches = list(zip(X, Y, strict=True))
    for mode in ("eval", "train"):
        mgd.TrainingFunction(model, loss, batches, objective_mode=mode, **options).value({})
    assert seen == [False, True] and model.training
    by_default = mgd.TrainingFunction(model, loss, batches, **options)
    assert by_default.value({}) == function(model, AdamW(), objective_mode="eval").value({})


def test_a_size_is_a_budget_and_a_name_a_dtype():
    f = function(network(), AdamW(), budget="1MB", autocast="bfloat16")
    assert f.budget == mgd.Budget(host="1MB") and f.autocast is torch.bfloat16


@pytest.mark.parametrize(
    "model, optimizer, part",
    [
        (network().bfloat16(), AdamW(eps_root=1e-8), "torch.bfloat16"),
        (nn.Sequential(network(), nn.ReLU(), nn.Linear(3, 3).double()), AdamW(), "eps_root"),
    ],
)
def test_what_makes_noise_is_said(model, optimizer, part):
    if part == "eps_root":
        with torch.no_grad():
            model[0][2].bias.fill_(-100.0)  # no unit of the ReLU ever fires
    dtype = next(model.parameters()).dtype
    f = mgd.TrainingFunction(
        model,
        lambda model, batch, z: loss(model, (batch[0].to(dtype), batch[1]), z).float() * z["scale"],
        list(zip(X, Y, strict=True)),
        optimizer=optimizer,
        objective=lambda model: F.cross_entropy(model(X[0].to(dtype)).float(), Y[0]),
    )
    with pytest.warns(RuntimeWarning, match=part):
        f.metagradient({"scale": torch.tensor(1.0)})
