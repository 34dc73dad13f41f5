"""States of torch.optim and back: bit-equal round trips, and the same training whichever side continues."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mgd_kernels import SGD, Adam, AdamW, Arena
from mgd_kernels.errors import BadArgument
from mgd_kernels.integrations.torch_optim import export_state, import_state, matching_optimizer

CASES = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (torch.optim.AdamW, {"lr": torch.tensor(0.01, dtype=torch.float64), "eps": 1e-6}),
]


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def groups(model, settings):
    """Two parameter groups: the biases without weight decay and at twice the rate."""
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    return [{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 2 * float(settings["lr"])}]


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in model.parameters()]


def train(model, optimizer, steps):
    for step in steps:
        for p, g in zip(model.parameters(), gradients(model, step), strict=True):
            p.grad = g
        optimizer.step()


def same(x, y):
    """Equality bit for bit of nested state_dicts, dtypes and keys included."""
    if isinstance(x, torch.Tensor):
        return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y


@pytest.mark.parametrize(("kind", "settings"), CASES)
@pytest.mark.parametrize("made", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_round_trip_is_bit_equal(kind, settings, made, dtype):
    model = network(dtype)
    optimizer = kind(groups(model, settings), **settings)
    train(model, optimizer, range(made))
    state = import_state(optimizer, model)
    exported = export_state(state, optimizer, model)
    assert same(exported, optimizer.state_dict())
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    train(model, optimizer, [7])  # the state is a copy
    assert same(state.arena.views(state.params), parameters)
    assert state.step == made or kind is torch.optim.SGD


@pytest.mark.parametrize(("kind", "settings"), CASES)
@pytest.mark.parametrize("made", [0, 3])
def test_torch_and_this_package_continue_alike(kind, settings, made):
    model = network()
    optimizer = kind(groups(model, settings), **settings)
    train(model, optimizer, range(made))

    ours, state = matching_optimizer(optimizer, model), import_state(optimizer, model)
    for step in range(made, made + 3):
        ours.step_(state, state.arena.flatten(gradients(model, step)))

    twin = copy.deepcopy(model)
    back = kind(groups(twin, settings), **settings)
    twin.load_state_dict(state.arena.views(state.params), strict=False)
    back.load_state_dict(export_state(state, optimizer, model))

    train(model, optimizer, range(made, made + 3))
    torch.testing.assert_close(list(twin.parameters()), list(model.parameters()), rtol=1e-13, atol=1e-14)
    train(model, optimizer, range(6, 8))
    train(twin, back, range(6, 8))
    torch.testing.assert_close(list(twin.parameters()), list(model.parameters()), rtol=1e-13, atol=1e-14)


def test_groups_and_hyperparameters_come_along():
    model = network()
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}
    optimizer = matching_optimizer(torch.optim.AdamW(groups(model, settings), **settings), model, eps_root=1e-7)
    assert type(optimizer) is AdamW
    assert optimizer.defaults == {
        "lr": 0.01, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-5, "eps_root": 1e-7
    }  # fmt: skip
    names = Arena.of(model).names
    assert [optimizer.group_of(names)[names.index(n)] for n in ("0.weight", "0.bias", "2.weight", "2.bias")] == [
        0,
        1,
        0,
        1,
    ]
    table = optimizer.table()
    assert table[:, optimizer.column("lr")].tolist() == [0.01, 0.02]
    assert table[:, optimizer.column("weight_decay")].tolist() == [0.1, 0.0]
    assert type(matching_optimizer(torch.optim.Adam(model.parameters()), model)) is Adam
    assert type(matching_optimizer(torch.optim.SGD(model.parameters(), lr=1.0), model)) is SGD


def test_a_group_without_momentum_beside_one_with():
    model = network()
    weights, biases = (group["params"] for group in groups(model, {"lr": 0.1}))
    optimizer = torch.optim.SGD(
        [{"params": weights, "momentum": 0.9}, {"params": biases, "momentum": 0.0}], lr=0.1, dampening=0.5
    )
    train(model, optimizer, range(2))
    ours, state = matching_optimizer(optimizer, model), import_state(optimizer, model)
    assert same(export_state(state, optimizer, model), optimizer.state_dict())
    ours.step_(state, state.arena.flatten(gradients(model, 2)))
    train(model, optimizer, [2])
    torch.testing.assert_close(state.params, state.arena.flatten(model), rtol=1e-13, atol=1e-14)


def test_frozen_parameters_stay_out():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model[0].weight.requires_grad_(False)
    state = import_state(optimizer, model)
    assert "0.weight" not in state.arena.names and state.step == 0
    assert 0 not in export_state(state, optimizer, model)["state"]


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        (torch.optim.Adam, {"amsgrad": True}, "amsgrad=False"),
        (torch.optim.AdamW, {"maximize": True}, "maximize=False"),
        (torch.optim.AdamW, {"capturable": True}, "capturable=False"),
        (torch.optim.SGD, {"lr": 0.1, "maximize": True}, "negate the loss"),
        (torch.optim.RAdam, {}, "UpdateRule"),
    ],
)
def test_what_the_rules_do_not_cover_is_an_error(kind, settings, text):
    model = network()
    optimizer = kind(model.parameters(), **settings)
    for function in (matching_optimizer, import_state):
        with pytest.raises(BadArgument, match=text):
            function(optimizer, model)


def test_states_that_do_not_fit_are_errors():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model[0].weight] = {
        "step": torch.tensor(2.0),
        "exp_avg": torch.zeros(4, 5),
        "exp_avg_sq": torch.zeros(4, 5),
    }
    with pytest.raises(BadArgument, match="same number of steps"):
        import_state(optimizer, model)
    with pytest.raises(BadArgument, match=r"lacks \['2.bias', '2.weight'\]"):
        import_state(torch.optim.AdamW(model[0].parameters()), model)
    mixed = torch.optim.SGD(groups(model, {"lr": 1.0}), lr=1.0, momentum=0.9)
    mixed.param_groups[0]["nesterov"] = True
    with pytest.raises(BadArgument, match="Nesterov"):
        matching_optimizer(mixed, model)
    with pytest.raises(BadArgument, match="arena"):
        export_state(AdamW().init(torch.zeros(4)), torch.optim.AdamW(model.parameters()), model)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    arena = Arena.of(model)
    with pytest.raises(BadArgument, match="momentum_buffer"):
        export_state(AdamW().init(arena.flatten(model), arena), sgd, model)
