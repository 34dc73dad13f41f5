"""Parameters without a gradient at some steps are skipped there, as torch.optim skips them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cases import adamw, assert_exact, cross_entropy
from refusals import base
from torch import nn

import mgd
from mgd.sweep.updates import Updates
from mgd_kernels import SGD, Adam, AdamW, Arena, UpdateRule
from mgd_kernels.errors import BadArgument

NEITHER, FIRST, SECOND = 1, 2, 3  # as the width of a batch's last entry


class TwoHeads(nn.Module):
    """A model beside heads of which a step uses one or none, as its batch says."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.first = nn.Parameter(torch.linspace(0.5, 1.5, 3, dtype=torch.float64))
        self.body = body
        self.second = nn.Parameter(torch.linspace(-1.0, 1.0, 40, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(5, dtype=torch.float64))

    def forward(self, x):
        return self.body(x)


def loss(model, batch, z):
    total, head = cross_entropy(model, batch, z), batch[3].shape[1]
    if head == FIRST:
        return total + z["strength"] * model.first.square().sum()
    return total + 0.1 * (model.second - 1).square().sum() if head == SECOND else total


def training(optimizer, **options):
    case = base(optimizer=optimizer, trace=False)
    heads = [SECOND, FIRST, NEITHER, SECOND, SECOND, FIRST]
    batches = [(*batch, torch.ones(len(batch[0]), head)) for batch, head in zip(case.batches, heads, strict=True)]
    z = {"strength": torch.tensor(1.5, dtype=torch.float64)}
    return case.but(z=z, batches=batches, model=TwoHeads(case.model), loss=loss, objective=objective, **options)


def objective(model):
    return model.first.exp().sum() + model.second.square().sum() + sum(p.sin().sum() for p in model.body.parameters())


def by_torch(case, make):
    return goes_on_by_torch(case, make(case.model.parameters()), case.batches)


def goes_on_by_torch(case, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        case.loss(case.model, batch, case.z).backward()
        optimizer.step()
    return {name: p.detach() for name, p in case.model.named_parameters()}


of_torch = pytest.mark.parametrize(
    "optimizer, make",
    [
        (Adam(lr=0.05), lambda x: torch.optim.Adam(x, lr=0.05)),
        (AdamW(lr=0.05, weight_decay=0.1), lambda x: torch.optim.AdamW(x, lr=0.05, weight_decay=0.1)),
        (SGD(lr=0.1, momentum=0.9), lambda x: torch.optim.SGD(x, lr=0.1, momentum=0.9)),
    ],
)


@of_torch
@pytest.mark.parametrize("trace", [False, True])
def test_parameters_are_those_of_torch(optimizer, make, trace):
    case = training(optimizer)
    trained = case.but(trace=trace).function().train({"strength": case.z["strength"]})
    expected = by_torch(case, make)
    assert all(torch.allclose(trained.parameters[n], expected[n], rtol=1e-12, atol=0) for n in expected)
    assert torch.equal(trained.parameters["unused"], torch.ones(5, dtype=torch.float64))


@of_torch
@pytest.mark.parametrize("first", [1, 2, 4])
def test_an_optimizer_of_torch_goes_on_whose_parameters_have_made_different_numbers_of_steps(optimizer, make, first):
    case = training(optimizer)
    expected = by_torch(training(optimizer), make)
    there = make(case.model.parameters())
    goes_on_by_torch(case, there, case.batches[:first])
    f = case.but(batches=case.batches[first:], optimizer=there).function()
    trained = f.train({"strength": case.z["strength"]})
    assert all(torch.allclose(trained.parameters[n], expected[n], rtol=1e-12, atol=0) for n in expected)


def moving(params, slots, grad, hyper, step):
    """A rule of a user's, with a mean over a whole parameter."""
    speed = 0.9 * slots["speed"] + grad - 0.1 * grad.mean() / step
    return params - hyper["lr"] * speed, {"speed": speed}


OPTIMIZERS = {
    "AdamW": adamw(),
    "groups": SGD(0.1, 0.9, param_groups=[{"params": "*.bias", "lr": 0.05}, {"params": "second", "momentum": 0.5}]),
    "rule": UpdateRule(moving, slots=("speed",), defaults={"lr": 0.05}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.3},
        {"microbatches": 2},
        {"budget": mgd.Budget(device="7KB", host="0B")},
    ],
    ids=["plain", "clipped", "microbatches", "rebuilt"],
)
def test_metagradients_are_those_of_the_unrolled_training(name, options):
    case = training(OPTIMIZERS[name], **options)
    assert_exact(case, (torch.float64,))


def test_forward_mode_skips_them_too():
    case = training(OPTIMIZERS["AdamW"])
    result = case.function().metagradient(case.z)
    dz = {key: torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape) for key, x in case.z.items()}
    forward = case.function().jvp(case.z, dz)
    expected = sum((result.grads[key] * dz[key]).sum() for key in dz)
    torch.testing.assert_close(forward.tangent, expected.to(forward.tangent), rtol=1e-10, atol=0)


def test_a_training_goes_on_where_another_ended():
    case = training(OPTIMIZERS["AdamW"])
    z = {"strength": case.z["strength"]}
    whole = case.but(optimizer_state={}).function().train(z)
    first = case.but(batches=case.batches[:4], optimizer_state={}).function().train(z)
    assert first.optimizer_state["skipped"]["unused"] == 4
    model = case.model
    model.load_state_dict(first.model_state)
    rest = case.but(batches=case.batches[4:], model=model, optimizer_state=first.optimizer_state).function().train(z)
    assert all(torch.equal(rest.parameters[n], whole.parameters[n]) for n in whole.parameters)
    assert rest.optimizer_state["skipped"] == whole.optimizer_state["skipped"]


def test_counts_that_cannot_be_are_refused():
    case = training(OPTIMIZERS["AdamW"])
    slots = {slot: dict(case.model.named_parameters()) for slot in case.optimizer.slots}
    state = {"step": 2, "skipped": {"unused": 3}, **slots}
    with pytest.raises(BadArgument, match="to count up to 2 steps for trained parameters; got 3 for 'unused'"):
        case.but(optimizer_state=state).function().train({})


def test_a_process_whose_whole_part_is_skipped_replays_what_it_stepped():
    """The second of two processes, with an expert each."""
    arena = Arena({name: torch.ones(64, dtype=torch.float64) for name in "ab"})
    optimizer, ones = SGD(0.1, 0.9, weight_decay=0.1), torch.ones(64, dtype=torch.float64)
    shards = SimpleNamespace(arena=arena, ranks=SimpleNamespace(rank=1), ranges=[(0, 64), (64, 128)])
    updates, tables = Updates(optimizer, shards, {}), optimizer.tables(3)
    updates.skip(1, [1])
    gradients = [ones, torch.zeros_like(ones), ones]
    stepped, replayed = optimizer.init(ones.clone()), optimizer.init(ones.clone())
    for t in range(3):
        updates.step_(stepped, gradients[t], tables[t], 1.0)
    updates.replay_(replayed, gradients, tables, [1.0] * 3)
    assert stepped.step == replayed.step == 3
    assert all(map(torch.equal, stepped.tensors(), replayed.tensors()))


@pytest.mark.parametrize("trace", [False, True])
def test_a_step_that_uses_no_parameter_is_refused(trace):
    case = base(trace=trace)

    def loss(model, batch, z):
        return cross_entropy(model, batch, z) if batch[3].shape[1] == FIRST else z["strength"] ** 2

    batches = [(*batch, torch.ones(6, NEITHER if t == 2 else FIRST)) for t, batch in enumerate(case.batches)]
    z = {"strength": torch.tensor(1.5, dtype=torch.float64)}
    with pytest.raises(mgd.errors.BadLoss, match="step 2 does not depend on the parameters"):
        case.but(z=z, loss=loss, batches=batches).metagradient()
