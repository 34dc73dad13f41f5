"""Which choices make a training smooth enough to descend on, and what accuracy they cost (arXiv 2503.13751, section 4).

A ResNet-9-style network is trained with one choice changed at a time. Metaparameters are the weights of all training
examples. Of each training we measure the metasmoothness, and how well its metagradient predicts what one step of sign
descent does to the held-out loss.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd import schedules
from mgd.errors import BadArgument, NonFiniteState
from mgd.function import TrainingFunction
from mgd.recipes.data import Images
from mgd.recipes.intervals import spearman
from mgd.recipes.small_images import Task
from mgd.recipes.smoothness.trust import Trust, trust
from mgd.ui.console import Reporter
from mgd_kernels import AdamW

BASE = "as it stands"
ENOUGH = 8  # ways to train, for a correlation over them


@dataclass(frozen=True)
class Choice:
    """A way to train. injected: from which part of the training on the examples' weights count; before, all are 1."""

    norm: str = "group"
    order: str = "norm-first"
    pool: str = "average"
    activation: str = "gelu"
    scale: float = 1.0
    width: int = 8
    batch: int = 48
    eps_root: float = 1e-8
    injected: float = 0.0


CHOICES: dict[str, Choice] = {
    BASE: Choice(),
    "norm after the activation": Choice(order="activation-first"),
    "BatchNorm": Choice(norm="batch"),
    "BatchNorm, after the activation": Choice(norm="batch", order="activation-first"),
    "no norm": Choice(norm="none"),
    "max pooling": Choice(pool="max"),
    "ReLU": Choice(activation="relu"),
    "ReLU, max pooling": Choice(activation="relu", pool="max"),
    "ReLU, max pooling, norm after": Choice(activation="relu", pool="max", order="activation-first"),
    "output times 0.3": Choice(scale=0.3),
    "output times 0.1": Choice(scale=0.1),
    "width 16": Choice(width=16),
    "batches of 24": Choice(batch=24),
    "batches of 96": Choice(batch=96),
    "eps_root 1e-12": Choice(eps_root=1e-12),
    "eps_root 1e-6": Choice(eps_root=1e-6),
    "eps_root 1e-4": Choice(eps_root=1e-4),
    "weights count from half-way on": Choice(injected=0.5),
    "weights count in the last eighth": Choice(injected=0.875),
}
QUICK = (BASE, "output times 0.1", "ReLU, max pooling, norm after", "eps_root 1e-4", "weights count in the last eighth")


@dataclass(frozen=True)
class Settings:
    """steps: of every training. sizes: h, by which weights are changed. directions: random ones, beside that of the
    metagradient. seeds: initial weights, orders and directions over which everything is averaged."""

    steps: int = 40
    rate: float = 3e-3
    held_out: int = 600
    tested: int = 5000
    sizes: tuple[float, ...] = (0.01, 0.05)
    directions: int = 2
    seeds: int = 2
    choices: tuple[str, ...] = tuple(CHOICES)

    def quick(self) -> Settings:
        return replace(self, steps=16, held_out=200, tested=400, directions=1, seeds=1, choices=QUICK)

    def check(self) -> None:
        for name, least in (("steps", 2), ("directions", 0), ("seeds", 1)):
            if getattr(self, name) < least:
                raise BadArgument(f"expected {name} >= {least}; got {getattr(self, name)}")
        if not self.sizes or not all(0 < h < 0.5 for h in self.sizes):
            # The weights are 1, and none may go below 0 in two steps.
            raise BadArgument(f"expected sizes between 0 and 0.5; got {self.sizes}")
        if unknown := sorted(set(self.choices) - set(CHOICES)):
            raise BadArgument(f"expected choices of {list(CHOICES)}; got {unknown}")
        if BASE not in self.choices:
            raise BadArgument(f"expected {BASE!r}, with which the others are compared, among the choices")


@dataclass
class Timings:
    """A choice: by seed, its trust (None where the training diverged) and the trained network's test accuracy."""

    trusts: list[Trust | None]
    accuracies: list[float]

    def mean(self, quantity: str) -> float:
        """NaN where a training diverged."""
        if any(trust is None for trust in self.trusts):
            return math.nan
        return mean(getattr(trust, quantity) for trust in self.trusts)

    @property
    def smoothness(self) -> float:
        return self.mean("mean_smoothness")

    @property
    def error(self) -> float:
        return self.mean("error")

    @property
    def accuracy(self) -> float:
        return mean(self.accuracies)


@dataclass
class Found:
    """rho: Spearman's, of smoothness and the prediction's error over the choices. interval: its 95% by bootstrap. Both
    None where fewer than `ENOUGH` choices were measured: a correlation of a handful of points says nothing."""

    settings: Settings
    data: str
    seed: int
    measured: dict[str, Timings]
    rho: float | None
    interval: tuple[float, float] | None
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "spearman": self.rho,
            "spearman_95_percent": self.interval and list(self.interval),
            "choices": {
                name: {
                    "choice": asdict(CHOICES[name]),
                    "smoothness": measured.smoothness,
                    "prediction_error": measured.error,
                    "accuracy": measured.accuracy,
                    "by_seed": [trust and asdict(trust) for trust in measured.trusts],
                    "accuracies": measured.accuracies,
                }
                for name, measured in self.measured.items()
            },
            "seconds": self.seconds,
        }


def run(
    train: Images,
    test: Images,
    settings: Settings | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
    device: str = "cpu",
) -> Found:
    """Measure every choice with every seed."""
    settings, reporter = settings or Settings(), reporter or Reporter()
    settings.check()
    largest = max(CHOICES[name].batch for name in settings.choices)
    measured = {name: Timings([], []) for name in settings.choices}
    total = len(measured) * settings.seeds
    with (
        reporter.phase("measuring", f"{len(measured)} ways to train, {settings.seeds} times each"),
        reporter.bar("choices", total) as tick,
    ):
        for number in range(seed, seed + settings.seeds):
            task = Task.make(train, test, settings.steps * largest, settings.held_out, settings.tested, number, device)
            for name, entry in measured.items():
                measure(task, CHOICES[name], settings, number, entry)
                tick(name)
    pairs = [(m.smoothness, m.error) for m in measured.values() if not math.isnan(m.smoothness)]
    if len(pairs) < ENOUGH:
        return Found(settings, train.name, seed, measured, None, None, reporter.seconds)
    rho, low, high = spearman([x for x, _ in pairs], [y for _, y in pairs], seed)
    return Found(settings, train.name, seed, measured, rho, (low, high), reporter.seconds)


def measure(task: Task, choice: Choice, settings: Settings, seed: int, entry: Timings) -> None:
    """Add the measurements of one choice with one seed."""
    f, z = training(task, choice, settings, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = z["data_weights"].shape
    signs = [
        (torch.randint(2, shape, generator=generator) * 2.0 - 1).to(task.device) for _ in range(settings.directions)
    ]
    try:
        entry.trusts.append(trust(f, z, "data_weights", signs, settings.sizes))
        _, right = task.judge(f, z)
        entry.accuracies.append(float(right.double().mean()))
    except NonFiniteState:
        entry.trusts.append(None)
        entry.accuracies.append(math.nan)


def training(task: Task, choice: Choice, settings: Settings, seed: int) -> tuple[TrainingFunction, dict[str, Tensor]]:
    """A training by this choice, and its metaparameters: a weight for every example that it sees."""
    activations: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
    names = ("norm", "order", "pool", "scale", "width")
    options: dict[str, Any] = {name: getattr(choice, name) for name in names}
    first = math.floor(choice.injected * settings.steps)
    batches = [
        (x, y, i, torch.tensor(float(t >= first), device=task.device))
        for t, (x, y, i) in enumerate(task.batches(choice.batch, settings.steps, seed))
    ]

    def loss(model: nn.Module, batch: Any, z: Any) -> Tensor:
        x, y, _, counts = batch
        return ((1 + counts * (z["data_weights"] - 1)) * F.cross_entropy(model(x), y, reduction="none")).mean()

    f = TrainingFunction(
        task.network(seed, activation=activations[choice.activation], **options),
        loss,
        batches,
        optimizer=AdamW(eps_root=choice.eps_root),
        objective=task.held_out.loss,
        per_example={"data_weights": lambda batch: batch[2]},
        seed=seed,
        trace=False,  # one metagradient each
    )
    rates = schedules.one_cycle(settings.steps, settings.rate, 0.2 * settings.rate, 0.1 * settings.rate)
    return f, {"data_weights": torch.ones(len(task.train), device=task.device), "lr": rates}
