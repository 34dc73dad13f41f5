"""Tasks of one kind: small trainings that differ in their batches and objectives."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from cases import CLASSES, generator, initial, mlp, relative_error, seeded, supervised, weights
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import mgd
from mgd_kernels import SGD, Adam, AdamW

DOUBLE = torch.float64
TRACE: list[Any] = [True]  # of tasks, where the test does not say


def objective_on(x, y):
    """Made for each task: a function of one code, whose cells hold the task's tensors."""
    return lambda model: F.cross_entropy(model(x), y)


def tasks(case, count=3, steps=3, examples=6, shape=(5,), **options):
    """Training functions that `replaced` makes of one. Each trains on one batch again and again, as in MAML, the last
    of them on several."""
    f, g = case.function(**{"trace": TRACE[0]} | options), generator(7)
    dtype = next(case.model.parameters()).dtype

    def data(size):
        x = torch.randn(size, *shape, generator=g, dtype=DOUBLE)
        return x.to(dtype), torch.randint(0, CLASSES, (size,), generator=g), torch.randint(0, 20, (size,), generator=g)

    found = []
    for i in range(count):
        batch = data(examples)
        batches = [data(examples) for _ in range(steps)] if i == count - 1 else [batch] * steps
        found.append(f.replaced(batches=batches, objective=objective_on(*data(4)[:2])))
    return found


class Indices(nn.Module):
    """An embedding of what the sign of the first columns says."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.embedding((x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long())))


@seeded
def normalised():
    """With BatchNorm that keeps no statistics."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


@seeded
def embedded():
    return Indices()


@seeded
def frozen_front():
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, CLASSES))
    model[0].weight.requires_grad_(False)
    return model


MODELS = {
    "mlp": (mlp, (5,)),
    "convnet": (normalised, (1, 6, 6)),
    "embedding": (embedded, (5,)),
    "frozen": (frozen_front, (5,)),
}
OPTIMIZERS = {
    "sgd": SGD(lr=0.1),
    "momentum": SGD(lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": SGD(lr=0.05, momentum=0.9, nesterov=True, decoupled=True, weight_decay=0.01),
    "adam": Adam(lr=1e-2, eps=1e-3, eps_root=1e-4, betas=(0.9, 0.95), weight_decay=0.02),
    "adamw": AdamW(
        lr=1e-2,
        eps=1e-3,
        eps_root=1e-4,
        betas=(0.9, 0.95),
        weight_decay=0.02,
        param_groups=[{"params": "*bias", "weight_decay": 0.0}],
    ),
}


def training(model="mlp", optimizer="momentum", **changes):
    make, shape = MODELS[model]
    case = supervised(make(), shape, optimizer=OPTIMIZERS[optimizer])
    case.z.clear()
    return case.but(**changes)


def hypers(case, steps=3):
    """Initial weights, rates for each step and group, and weight decay."""
    groups = case.optimizer.groups
    rates = torch.linspace(2e-2, 1e-2, steps * groups, dtype=DOUBLE).reshape(steps, groups)
    return {
        "init": initial(case.model),
        "lr": rates if groups > 1 else rates[:, 0],
        "weight_decay": torch.tensor(0.03, dtype=DOUBLE),
    }


def scaled(model, batch, z):
    """Metaparameters of the loss: one number, a vector, and weights of examples."""
    losses = F.cross_entropy(z["scale"] * model(batch[0]) + z["bias"], batch[1], reduction="none")
    return (z["data_weights"] * losses).mean()


def of_the_loss(dtype=DOUBLE):
    z = {
        "scale": torch.tensor(1.1, dtype=DOUBLE),
        "bias": torch.linspace(-0.1, 0.2, CLASSES, dtype=DOUBLE),
        "data_weights": weights(),
    }
    return {key: x.to(dtype) for key, x in z.items()}


def mean(fs: Any, z: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The mean over tasks, and its gradient."""
    leaves, spec = tree_flatten(z)
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    value = mgd.mean_over(fs, tree_unflatten(leaves, spec))
    value.backward()
    return value.detach(), tree_unflatten([x.grad for x in leaves], spec)


def alone(fs: Any, z: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same, by the metagradient of each task by itself."""
    found = [f.metagradient(z) for f in fs]
    flat = [tree_flatten({key: each.grads[key] for key in z})[0] for each in found]
    spec = tree_flatten(z)[1]
    grads = [sum(parts) / len(found) for parts in zip(*flat, strict=True)]
    return sum(each.value.double() for each in found) / len(found), tree_unflatten(grads, spec)


def difference(found, expected):
    """The largest relative error of the value and of each key's gradient."""
    (value, grads), (value_, grads_) = found, expected
    assert list(grads) == list(grads_)
    assert all(torch.cat([x.reshape(-1) for x in tree_flatten(g)[0]]).norm() > 0 for g in grads_.values()), "vacuous"
    return max(relative_error(value, value_), *(relative_error(grads[key], grads_[key]) for key in grads_))


def cast(z, dtype):
    return tree_map(lambda x: x.to(dtype), z)
