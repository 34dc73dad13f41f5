"""Python state that makes the loss of a step another one at its second evaluation: counters, memories, generators."""

from __future__ import annotations

import copy
import random

import numpy as np
import torch
from pattern import (
    EXAMPLES,
    STATEFUL,
    Training,
    errors,
    features,
    mean,
    mlp,
    pattern,
    seeded,
    training,
)
from patterns_operators import weighted
from torch import Tensor, nn


@pattern()
def forward_hook() -> Training:
    model = mlp()
    model[0].register_forward_hook(lambda module, args, out: out * 1.5 + 0.1)
    return training(mean, model)


@pattern(STATEFUL)
def forward_hook_that_counts() -> Training:
    model, calls = mlp(), []

    def hook(module, args, out):
        calls.append(1)
        return out * (1 + 0.1 * len(calls))

    model[0].register_forward_hook(hook)
    return training(mean, model, objective=lambda m: m[0].weight.square().sum() + m[2].weight.sum())


@pattern(STATEFUL)
def stochastic_depth_by_random() -> Training:
    random.seed(5)

    def loss(m, b, z):
        x = b["x"] if random.random() < 0.5 else b["x"] + features(m, b["x"])[:, :4]
        return mean(m, b | {"x": x}, z)

    return training(loss)


@pattern(STATEFUL)
def mixup_by_random() -> Training:
    random.seed(5)

    def loss(m, b, z):
        lam = random.betavariate(1.0, 1.0)
        return mean(m, b | {k: lam * b[k] + (1 - lam) * b[k].flip(0) for k in ("x", "y")}, z)

    return training(loss)


@pattern(STATEFUL)
def mixup_by_numpy() -> Training:
    rng = np.random.default_rng(5)

    def loss(m, b, z):
        lam = rng.beta(1.0, 1.0)
        p = torch.from_numpy(rng.permutation(EXAMPLES))
        return mean(m, b | {k: lam * b[k] + (1 - lam) * b[k][p] for k in ("x", "y")}, z)

    return training(loss)


@pattern(STATEFUL)
def noise_of_own_generator() -> Training:
    g = torch.Generator().manual_seed(5)

    def loss(m, b, z):
        return mean(m, b | {"x": b["x"] + 0.3 * torch.randn(EXAMPLES, 4, generator=g, dtype=torch.float64)}, z)

    return training(loss)


@pattern(STATEFUL)
def scale_in_a_global() -> Training:
    globals()["SCALE"] = 1.0

    def loss(m, b, z):
        global SCALE
        SCALE *= 0.9
        return mean(m, b, z) * SCALE

    return training(loss)


SCALE = 1.0


@pattern(STATEFUL)
def label_smoothing_by_calls() -> Training:
    calls = 0

    def loss(m, b, z):
        nonlocal calls
        calls += 1
        return mean(m, b | {"y": b["y"] * (1 - 0.05 * calls)}, z)

    return training(loss)


@pattern(STATEFUL)
def cyclic_annealing() -> Training:
    """A weight of period two: an even number of further evaluations hides it."""
    calls = 0

    def loss(m, b, z):
        nonlocal calls
        calls += 1
        return mean(m, b, z) + (calls % 2) * weighted(features(m, b["x"]).square().sum(1), b, z)

    return training(loss)


@pattern(STATEFUL)
def tensor_replaced_in_closure() -> Training:
    cache = {"weights": torch.ones(EXAMPLES, dtype=torch.float64)}

    def loss(m, b, z):
        cache["weights"] = cache["weights"] * 0.9
        return (errors(m, b, z) * cache["weights"]).mean()

    return training(loss)


@pattern(STATEFUL)
def tensor_changed_in_place() -> Training:
    """The object stays; its contents do not."""
    weights = torch.ones(EXAMPLES, dtype=torch.float64)

    def loss(m, b, z):
        weights.mul_(0.9)
        return (errors(m, b, z) * weights).mean()

    return training(loss)


@pattern(STATEFUL)
def schedule_by_length_of_log() -> Training:
    log: list[float] = []

    def loss(m, b, z):
        value = mean(m, b, z) / (1 + 0.1 * len(log))
        log.append(value.item())
        return value

    return training(loss)


@pattern(STATEFUL)
def dropout_rate_by_calls() -> Training:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, 1)))

    def loss(m, b, z):
        m[2].p += 0.05
        return mean(m, b, z)

    return training(loss, model)


@pattern(STATEFUL)
def eval_mode_after_some_calls() -> Training:
    def loss(m, b, z):
        m.calls = getattr(m, "calls", 0) + 1
        if m.calls == 5:
            m[2].eval()
        return mean(m, b, z)

    return training(loss, seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1))))


def gradual(by_flag: bool) -> Training:
    def loss(m, b, z):
        m.calls = getattr(m, "calls", 0) + 1
        if by_flag:
            m[0].requires_grad_(m.calls > 4)
            return mean(m, b, z)
        h = features(m, b["x"])
        o = m[2](h if m.calls > 4 else h.detach())
        return weighted((o - b["y"]).square()[:, 0], b, z)

    return training(loss, mlp())


@pattern(STATEFUL, plain=lambda: gradual(False))
def gradual_unfreezing() -> Training:
    """The first layer's `requires_grad` is switched on after some steps."""
    return gradual(True)


@pattern(STATEFUL, honest=False)
def mean_teacher() -> Training:
    """A copy that follows the model, updated inside the loss."""
    teacher = copy.deepcopy(mlp())

    def loss(m, b, z):
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), m.parameters(), strict=True):
                slow.mul_(0.7).add_(fast, alpha=0.3)
            target = teacher(b["x"] + 0.1)
        return mean(m, b, z) + weighted((m(b["x"]) - target).square()[:, 0], b, z)

    return training(loss)


@pattern(STATEFUL, honest=False)
def memory_bank() -> Training:
    """Negatives are the features of the last steps, in a list (MoCo)."""
    bank: list[Tensor] = []

    def loss(m, b, z):
        h = features(m, b["x"])
        bank.append(h.detach())
        negatives = torch.cat(bank[-3:])
        return mean(m, b, z) + weighted((h @ negatives.T).logsumexp(1), b, z) / 8

    return training(loss)


@pattern(STATEFUL, honest=False)
def consistency_with_last_step() -> Training:
    def loss(m, b, z):
        o = m(b["x"])
        last, m.last = getattr(m, "last", None), o.detach()
        value = weighted((o - b["y"]).square()[:, 0], b, z)
        return value if last is None else value + (o - last).square().mean()

    return training(loss)


@pattern(STATEFUL, honest=False)
def loss_over_its_running_average() -> Training:
    average = 1.0

    def loss(m, b, z):
        nonlocal average
        value = mean(m, b, z)
        average = 0.9 * average + 0.1 * value.item()
        return value / average

    return training(loss)


@pattern(STATEFUL)
def iterator_in_the_loss() -> Training:
    """A second data loader is advanced by the loss."""
    g = torch.Generator().manual_seed(6)
    more = iter([torch.randn(4, 4, generator=g, dtype=torch.float64) for _ in range(40)])

    def loss(m, b, z):
        return mean(m, b, z) + m(next(more)).square().mean()

    return training(loss)
