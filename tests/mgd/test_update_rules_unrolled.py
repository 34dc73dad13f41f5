"""Optimizers, clipping and microbatches, against the unrolled reference."""

import pytest
import torch
from cases import adamw, assert_exact, convnet, cross_entropy, initial, mlp, supervised, weighted, weights

from mgd_kernels import SGD, Adam, Muon, RMSprop, UpdateRule


def lion_like(param, slots, grad, hyper, step):
    """Lion (arXiv 2302.06675) with a smooth sign, so that it can be differentiated."""
    blend = hyper["beta1"] * slots["exp_avg"] + (1 - hyper["beta1"]) * grad
    direction = torch.tanh(blend / hyper["width"]) + hyper["weight_decay"] * param
    average = hyper["beta2"] * slots["exp_avg"] + (1 - hyper["beta2"]) * grad
    return param - hyper["lr"] / step**0.5 * direction, {"exp_avg": average}


def optimistic(param, slots, grad, hyper, step):
    """Optimistic gradient descent with heavy ball momentum: keeps the tensors that it is given in slots."""
    moved = param - hyper["lr"] * (2 * grad - slots["grad"]) + hyper["momentum"] * (param - slots["param"])
    return moved, {"param": param, "grad": grad, "before": slots["grad"]}


OPTIMISTIC = (("param", "grad", "before"), {"lr": 5e-2, "momentum": 0.3})
LION = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "width": 0.1}
BIAS = [{"params": "*.bias", "lr": 3e-2}]
OPTIMIZERS = {
    "adamw": lambda: adamw(param_groups=BIAS),
    "adam": lambda: Adam(lr=1e-2, betas=(0.9, 0.95), eps=1e-3, eps_root=1e-4, weight_decay=0.1),
    "sgd": lambda: SGD(lr=0.1, weight_decay=0.1),
    "sgd decoupled": lambda: SGD(lr=0.1, weight_decay=0.1, decoupled=True),
    "momentum": lambda: SGD(lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.1, param_groups=BIAS),
    "nesterov": lambda: SGD(lr=0.1, momentum=0.8, weight_decay=0.1, nesterov=True),
    "rmsprop": lambda: RMSprop(lr=1e-2, momentum=0.5, eps=1e-3, eps_root=1e-4, weight_decay=0.1, param_groups=BIAS),
    "muon": lambda: Muon(lr=1e-2, weight_decay=0.1, param_groups=BIAS),
    "user's": lambda: UpdateRule(lion_like, ("exp_avg",), LION),
    "user's, element-wise": lambda: UpdateRule(lion_like, ("exp_avg",), LION, elementwise=True, param_groups=BIAS),
    "user's, keeping tensors": lambda: UpdateRule(optimistic, *OPTIMISTIC),
    "user's, keeping tensors, element-wise": lambda: UpdateRule(optimistic, *OPTIMISTIC, elementwise=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    """Every hyperparameter, data weights and initial parameters, with clipping active on every step."""
    optimizer = OPTIMIZERS[name]()
    case = supervised(mlp(), (5,), optimizer=optimizer, max_grad_norm=0.2).but(loss=weighted)
    z = {key: torch.tensor(value, dtype=torch.float64) for key, value in optimizer.defaults.items()}
    z |= {"lr": case.z["lr"], "data_weights": weights(), "init": initial(case.model)}
    assert_exact(case.but(z))


@pytest.mark.parametrize("optimizer", [adamw, lambda: SGD(lr=0.2, momentum=0.9), lambda: Muon(lr=1e-2)])
def test_clipping_on_some_steps_and_not_on_others(optimizer):
    case = supervised(mlp(), (5,), 12, optimizer=optimizer()).but(loss=weighted, z={"data_weights": weights()})
    case = case.but({"init": initial(case.model)}, max_grad_norm=0.55)
    clipped = case.unrolled().clipped
    assert any(clipped) and not all(clipped), clipped
    assert_exact(case, (torch.float64,))


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_microbatches(count):
    """6 examples in 4 parts are 2, 2, 1 and 1. Without dropout their number does not change the result."""
    case = supervised(mlp(), (5,)).but(loss=weighted, z={"data_weights": weights()}, microbatches=count)
    whole = case.but(microbatches=1).unrolled()
    result = assert_exact(case, (torch.float64,))
    for key, expected in whole.grads.items():
        assert torch.allclose(result.grads[key], expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("options", [{"microbatches": 4}, {"microbatches": 3, "max_grad_norm": 0.4}])
def test_microbatches_with_dropout_and_groups(options):
    case = supervised(mlp(0.3), (5,), optimizer=adamw(param_groups=BIAS), **options)
    assert_exact(case.but({"init": initial(case.model)}))


def test_unequal_microbatches_with_running_statistics():
    case = supervised(convnet(), (1, 6, 6), batch=7, microbatches=3)
    assert_exact(case.but({"init": initial(case.model)}))


def test_batches_of_different_lengths():
    case = supervised(mlp(), (5,)).but(loss=weighted, z={"data_weights": weights()}, microbatches=2)
    batches = [tuple(part[: 6 - t % 3] for part in batch) for t, batch in enumerate(case.batches)]
    assert_exact(case.but(batches=batches))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_chooses_the_random_streams(seed):
    case = supervised(mlp(0.3), (5,), seed=seed)
    assert_exact(case, (torch.float64,))
    assert case.metagradient().value != case.but(seed=2).metagradient().value


def test_clipping_a_zero_gradient():
    """Its norm is 0, where the norm has no derivative; it is not clipped."""
    case = supervised(mlp(), (5,), max_grad_norm=0.3)
    case = case.but(loss=lambda m, b, z: cross_entropy(m, b, z) * (1 - b[2][0] % 2))
    assert min(abs(loss) for loss in case.unrolled().losses) == 0
    assert_exact(case)
