"""Python values that a step reads: numbers, strings and objects in the batch, caches, logs. Each step is pure."""

from __future__ import annotations

import functools
import math
from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pattern import EXAMPLES, Training, errors, features, mean, pattern, randn, seeded, training
from torch import Tensor, nn


@pattern()
def int_in_batch() -> Training:
    return training(lambda m, b, z: mean(m, b, z) / (1 + 0.1 * b["step"]), step=lambda t, g: t)


@pattern()
def float_in_batch() -> Training:
    return training(lambda m, b, z: mean(m, b, z) / (1 + b["step"]), step=lambda t, g: 0.1 * t)


@pattern()
def float_in_batch_to_the_backward() -> Training:
    """A number that scales the gradient and not the loss: domain adaptation with its schedule in the batch."""

    def loss(m, b, z):
        h = features(m, b["x"])
        s = b["strength"]
        return (z["w"][b["i"]] * m[2](h.detach() * (1 + s) - h * s)[:, 0]).mean()

    model = training(mean).model
    model[2].requires_grad_(False)
    return training(loss, model, strength=lambda t, g: 2 / (1 + math.exp(-t)) - 1)


@pattern()
def mixup_with_number_in_batch() -> Training:
    def loss(m, b, z):
        lam = b["lam"]
        x = lam * b["x"] + (1 - lam) * b["x"].flip(0)
        y = lam * b["y"] + (1 - lam) * b["y"].flip(0)
        return mean(m, b | {"x": x, "y": y}, z)

    return training(loss, lam=lambda t, g: float(torch.rand((), generator=g)))


@pattern()
def label_smoothing_from_batch() -> Training:
    def loss(m, b, z):
        logits = m(b["x"])
        each = F.cross_entropy(logits, b["c"], label_smoothing=b["smoothing"], reduction="none")
        return (z["w"][b["i"]] * each).mean()

    return training(
        loss,
        seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))),
        objective=lambda m: m(randn(5, 4, g=9)).square().mean(),
        smoothing=lambda t, g: 0.02 * t,
    )


@pattern()
def none_in_batch() -> Training:
    def loss(m, b, z):
        e = errors(m, b, z)
        return e.mean() if b["weights"] is None else (b["weights"] * e).mean()

    return training(loss, weights=lambda t, g: None if t % 2 else torch.rand(EXAMPLES, generator=g).double())


@pattern()
def string_in_batch() -> Training:
    def loss(m, b, z):
        e = errors(m, b, z)
        return e.mean() if b["task"] == "square" else e.sqrt().mean()

    return training(loss, task=lambda t, g: "square" if t % 3 else "root")


@pattern()
def strings_in_batch() -> Training:
    """Paths or captions that come along and are not read."""
    return training(mean, names=lambda t, g: [f"image-{8 * t + i}.png" for i in range(EXAMPLES)])


@pattern()
def key_that_some_batches_lack() -> Training:
    def loss(m, b, z):
        try:
            scale = b["scale"]
        except KeyError:
            scale = 1.0
        return mean(m, b, z) * scale

    def wrap(b):
        return b if b["scale"] else {key: value for key, value in b.items() if key != "scale"}

    return training(loss, wrap=wrap, scale=lambda t, g: 0.5 * (t % 3))


@dataclass
class Item:
    x: Tensor
    y: Tensor
    i: Tensor
    step: int


@pattern()
def dataclass_as_batch() -> Training:
    def loss(m, b, z):
        return mean(m, {"x": b.x, "y": b.y, "i": b.i}, z) / (1 + 0.1 * b.step)

    def wrap(b):
        return Item(b["x"], b["y"], b["i"], b["step"])

    return training(loss, wrap=wrap, step=lambda t, g: t)


Named = namedtuple("Named", ["x", "y", "i"])


@pattern()
def namedtuple_as_batch() -> Training:
    return training(lambda m, b, z: mean(m, b._asdict(), z), wrap=lambda b: Named(b["x"], b["y"], b["i"]))


class Encoding(UserDict):
    """A mapping that is no dict, as the BatchEncoding of transformers; entries are also attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


@pattern()
def encoding_as_batch() -> Training:
    def loss(m, b, z):
        return (z["w"][b.i] * (m(b["x"]) - b["y"]).square()[:, 0]).mean()

    return training(loss, wrap=Encoding)


@pattern()
def logging_by_item() -> Training:
    log: list[float] = []

    def loss(m, b, z):
        value = mean(m, b, z)
        log.append(value.item())
        return value

    return training(loss)


@pattern()
def logging_in_attributes() -> Training:
    def loss(m, b, z):
        e = errors(m, b, z)
        m.last_errors, m.last_loss = e.detach(), float(e.mean().detach())
        return e.mean()

    return training(loss)


@pattern()
def printing() -> Training:
    def loss(m, b, z):
        value = mean(m, b, z)
        print(f"loss {value.item():.3f}")
        return value

    return training(loss)


class CausalMask(nn.Module):
    """Attention whose mask is made at the first call and whenever the length changes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 1)
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or len(self.mask) != len(x):
            self.mask = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.T).masked_fill(~self.mask, -torch.inf)
        return self.head(scores.softmax(-1) @ v)


@pattern()
def cached_mask() -> Training:
    def cut(b):
        return {k: v[: b["n"]] for k, v in b.items() if k != "n"}

    return training(mean, seeded(CausalMask), wrap=cut, n=lambda t, g: 8 - (t // 2) % 3)


@pattern()
def cached_table() -> Training:
    """A position table behind an lru_cache."""

    @functools.lru_cache(maxsize=4)
    def table(length: int) -> Tensor:
        return torch.arange(length, dtype=torch.float64).div(length)[:, None].sin()

    return training(lambda m, b, z: mean(m, b | {"x": b["x"] + table(len(b["x"]))}, z))


@pattern()
def modes_of_submodules() -> Training:
    """A part of the model is put into eval mode by the loss and back again."""

    def loss(m, b, z):
        m[1].eval()
        clean = m(b["x"])
        m[1].train()
        noisy = m(b["x"])
        return (z["w"][b["i"]] * ((noisy - b["y"]).square() + (noisy - clean).square())[:, 0]).mean()

    return training(loss, seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 1))))


@pattern()
def step_of_the_curriculum_in_a_list_of_losses() -> Training:
    """Which loss function runs is looked up by a name that the batch brings."""
    table = {"l2": lambda d: d.square(), "huber": lambda d: F.huber_loss(d, torch.zeros_like(d), reduction="none")}

    def loss(m, b, z):
        return (z["w"][b["i"]] * table[b["kind"]](m(b["x"]) - b["y"])[:, 0]).mean()

    return training(loss, kind=lambda t, g: ["l2", "huber"][t % 2])


@pattern()
def dtype_from_batch() -> Training:
    """Inputs in float32 at some steps, cast by the loss."""

    def loss(m, b, z):
        return mean(m, b | {"x": b["x"].to(m[0].weight.dtype)}, z)

    def wrap(b):
        return b | {"x": b["x"].float() if b["single"] else b["x"]}

    return training(loss, wrap=wrap, single=lambda t, g: t % 2 == 0)


@pattern(honest=False)
def float32_objective() -> Training:
    """The objective is float32 although the training is float64, as the `.loss` of models in transformers.

    Too coarse for finite differences.
    """
    x, y = randn(5, 4, g=8), randn(5, 1, g=9)
    return training(mean, objective=lambda m: (m(x) - y).square().mean().float())


@pattern()
def indices_as_batch() -> Training:
    """The data set stands in the closure of the loss; batches are indices."""
    rows = training(mean).batches
    x, y = torch.cat([b["x"] for b in rows]), torch.cat([b["y"] for b in rows])

    def loss(m, i, z):
        return mean(m, {"x": x[i], "y": y[i], "i": i % EXAMPLES}, z)

    return training(loss, wrap=lambda b: b["rows"], rows=lambda t, g: torch.randint(len(x), (6,), generator=g))


@pattern()
def step_number_as_batch() -> Training:
    rows = training(mean).batches
    return training(lambda m, t, z: mean(m, rows[t], z), wrap=lambda b: b["t"], t=lambda t, g: t)
