"""The shares of six text sources for a target: by metagradients, by forward mode, by a grid, and by size.

A small language model is trained on bytes for a moment. Of the target's own two texts there are few passages, of the
other sources many: how much of each, for the lowest loss on the target's held-out text? Test text, and trainings with
other initial weights and batches, judge what each way found.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mgd.errors import BadArgument
from mgd.function import TrainingFunction
from mgd.recipes import intervals
from mgd.recipes.data import text
from mgd.recipes.intervals import Interval
from mgd.recipes.mixture.descent import FLOOR, Path, by_forward_mode, by_metagradient, effects, lattice, weights_of
from mgd.recipes.models.gpt import GPT
from mgd.recipes.rate.data import VOCABULARY, passages
from mgd.recipes.rate.models import LN2, bits_per_byte, losses
from mgd.recipes.trainings import seeded, warm_up_cosine
from mgd.ui.console import Reporter
from mgd_kernels import AdamW

SOURCES = ("state-of-the-union", "pydoc", "moby-dick", "shakespeare", "python", "c++")
TARGETS = 2  # the first sources: their held-out texts, in equal parts, are the target
REVERSE, FORWARD, GRID = "metagradient descent", "forward mode", "grid"
BY_SIZE, EQUAL, OWN = "by size", "equal shares", "target's own texts"
JUDGED_FROM = 1000  # numbers of the trainings that judge


@dataclass(frozen=True)
class Settings:
    """few, many: passages of each text of the target, and of each other source. meta_steps, forward_steps: of the
    descent, and of its repetition by forward mode. outer: Adam's learning rate on the logits. parts: the grid has the
    shares that are multiples of 1/parts. seeds: trainings that judge each mixture. timings: of each mode."""

    steps: int = 90
    batch: int = 16
    context: int = 32
    width: int = 48
    rate: float = 3e-3
    few: int = 100
    many: int = 4000
    held_out: int = 192
    tested: int = 512
    meta_steps: int = 20
    forward_steps: int = 3
    outer: float = 0.3
    parts: int = 3
    seeds: int = 6
    timings: int = 2

    def quick(self) -> Settings:
        small: dict[str, Any] = {"steps": 24, "batch": 8, "width": 32, "rate": 4e-3, "held_out": 48, "tested": 96}
        return replace(self, **small, meta_steps=8, forward_steps=1, outer=0.5, parts=2, seeds=3, timings=1)

    def check(self) -> None:
        ones = ("batch", "few", "many", "meta_steps", "forward_steps", "parts", "timings")
        for name, least in (("steps", 2), ("seeds", 2), *((name, 1) for name in ones)):
            if getattr(self, name) < least:
                raise BadArgument(f"expected {name} >= {least}; got {getattr(self, name)}")
        if self.forward_steps > self.meta_steps:
            raise BadArgument(
                f"expected at most {self.meta_steps} forward_steps, the meta_steps; got {self.forward_steps}"
            )


@dataclass
class Judged:
    """A mixture on test text. bits: per byte, of every judging training. less: how much less that is than with shares
    by size, with an interval over trainings."""

    bits: list[float]
    less: Interval | None = None


@dataclass
class Found:
    """mixtures: by name, `[S]`. spent: what each took, in trainings. held_out: the lowest bits per byte that a search
    saw. table: the derivative of the held-out bits per byte of every source (columns) with respect to every source's
    share (rows), at equal shares. agreement: the largest relative distance of the shares of both modes, over the
    meta-steps that both make. reverse, forward: their costs in trainings, by processor time."""

    settings: Settings
    seed: int
    sources: list[str]
    sizes: list[int]
    mixtures: dict[str, Tensor]
    paths: dict[str, Path]
    spent: dict[str, float]
    held_out: dict[str, float]
    judged: dict[str, Judged]
    table: Tensor
    agreement: float
    reverse: float
    forward: float
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "seed": self.seed,
            "sources": self.sources,
            "target": self.sources[:TARGETS],
            "bytes": self.sizes,
            "mixtures": {name: _rounded(x) for name, x in self.mixtures.items()},
            "paths": {
                name: {"shares": [_rounded(x) for x in path.shares], "held_out_bits_per_byte": path.values}
                for name, path in self.paths.items()
            },
            "trainings_spent": self.spent,
            "held_out_bits_per_byte": self.held_out,
            "judged": {name: asdict(judged) for name, judged in self.judged.items()},
            "effect_of_each_share_on_each_text": [_rounded(row) for row in self.table],
            "distance_of_forward_and_reverse_paths": self.agreement,
            "metagradient_in_trainings": self.reverse,
            "forward_sweep_in_trainings": self.forward,
            "seconds": self.seconds,
        }


class Task:
    """The passages of every source, and trainings on them."""

    def __init__(self, settings: Settings, sources: list[str], seed: int):
        self.settings, self.sources, self.seed = settings, sources, seed
        draw, length = torch.Generator().manual_seed(seed), settings.context + 1

        def drawn(part: str, count: Callable[[int], int]) -> list[Tensor]:
            return [passages(name, part, count(i), length, draw) for i, name in enumerate(sources)]

        self.pools = drawn("pool", lambda i: settings.few if i < TARGETS else settings.many)
        self.held_out = drawn("held out", lambda i: settings.held_out)
        self.test = drawn("test", lambda i: settings.tested)
        self.sizes = [len(text.read(name)) for name in sources]
        self._model = self.network(0)  # of all trainings that seek: so they share their graphs

    def network(self, number: int) -> nn.Module:
        s = self.settings
        with seeded(self.seed + number):
            return GPT(VOCABULARY, s.context, layers=1, width=s.width, heads=4)

    def training(self, shares: Tensor, number: int, texts: bool = False) -> TrainingFunction:
        """Batches drawn by shares `[S]`, in an order that the number decides. The objective is the loss on the
        target's held-out text, in bits per byte; texts: those on every source's, `[S]`."""
        s, draw = self.settings, torch.Generator().manual_seed(7919 * self.seed + number)
        source = torch.multinomial(shares, s.steps * s.batch, replacement=True, generator=draw)
        place = torch.rand(len(source), generator=draw)
        rows = [
            self.pools[k][int(u * len(self.pools[k]))] for k, u in zip(source.tolist(), place.tolist(), strict=True)
        ]
        drawn = shares.expand(s.batch, -1)
        parts = zip(torch.stack(rows).split(s.batch), source.split(s.batch), strict=True)

        def objective(model: nn.Module) -> Tensor:
            found = torch.stack(
                [losses(model, tokens).mean() for tokens in self.held_out[: None if texts else TARGETS]]
            )
            return found / LN2 if texts else found.mean() / LN2

        return TrainingFunction(
            self.network(number) if number >= JUDGED_FROM else self._model,
            _weighted,
            [(tokens, origin, drawn) for tokens, origin in parts],
            optimizer=AdamW(eps_root=1e-7, weight_decay=0.01),
            objective=objective,
            fixed={"lr": warm_up_cosine(s.steps, s.rate)},
        )

    def tested(self, shares: Tensor, number: int) -> float:
        """Bits per byte on the target's test text after a training of its own."""
        f = self.training(shares, number)
        trained = f.train({"mixture": shares}).model_state
        model = self.network(number)
        model.load_state_dict(trained, strict=False)
        return float(torch.stack([bits_per_byte(model, tokens).mean() for tokens in self.test[:TARGETS]]).mean())


def _weighted(model: nn.Module, batch: Any, z: Any) -> Tensor:
    tokens, source, drawn = batch
    return (weights_of(z["mixture"], drawn[0], source) * losses(model, tokens)).mean()


def available() -> list[str]:
    """The sources that are installed; at least the three that every Python with torch has."""
    missing = text.installed()
    return [name for name in SOURCES if missing[name] is None]


def run(settings: Settings | None = None, seed: int = 0, reporter: Reporter | None = None) -> Found:
    """Descend in both modes, search the grid, and judge."""
    settings, reporter = settings or Settings(), reporter or Reporter()
    settings.check()
    task = Task(settings, sources := available(), seed)
    count, s = len(sources), settings
    equal = torch.full((count,), 1 / count)
    with reporter.phase("timing", "timing a training, a metagradient and a forward sweep"):
        reverse, forward = costs(task.training(equal, 0), equal, s.timings)
        table = effects(task.training(equal, 0, texts=True), equal)[1]
    with reporter.phase(REVERSE, f"{s.meta_steps} meta-steps, {reverse:.2f} trainings each"):
        down = by_metagradient(task.training, count, s.meta_steps, s.outer, reporter.progress)
    with (
        reporter.phase(FORWARD, f"{s.forward_steps} of them by forward mode, {forward:.2f} trainings each"),
        reporter.bar(FORWARD, s.forward_steps) as tick,
    ):
        ahead = by_forward_mode(task.training, count, s.forward_steps, s.outer, tick)
    points = lattice(count, s.parts)
    with reporter.phase(GRID, f"a grid of {len(points)} mixtures"), reporter.bar(GRID, len(points)) as tick:
        values = []
        for point in points:
            values.append(float(task.training(point, 0).value({"mixture": point})))
            tick("grid")
    best = min(range(len(points)), key=values.__getitem__)
    size = torch.tensor([float(len(pool)) for pool in task.pools])
    own = (torch.arange(count) < TARGETS).float() / TARGETS
    mixtures = {REVERSE: down.found, GRID: points[best]}
    mixtures |= {BY_SIZE: size / size.sum(), EQUAL: equal, OWN: FLOOR + (1 - count * FLOOR) * own}
    judged = judge(task, mixtures, reporter)
    gap = max(float((a - b).norm() / b.norm()) for a, b in zip(ahead.shares, down.shares, strict=False))
    return Found(
        settings=settings,
        seed=seed,
        sources=sources,
        sizes=task.sizes,
        mixtures=mixtures,
        paths={REVERSE: down, FORWARD: ahead},
        spent={REVERSE: s.meta_steps * reverse, GRID: float(len(points))},
        held_out={REVERSE: min(down.values), GRID: values[best]},
        judged=judged,
        table=table,
        agreement=gap,
        reverse=reverse,
        forward=forward,
        seconds=reporter.seconds,
    )


def judge(task: Task, mixtures: dict[str, Tensor], reporter: Reporter) -> dict[str, Judged]:
    """Bits per byte on test text, after trainings that no search has seen."""
    judged = {name: Judged([]) for name in mixtures}
    seeds = task.settings.seeds
    with reporter.phase("judging"), reporter.bar("judging", seeds * len(mixtures)) as tick:
        for name, shares in mixtures.items():
            for number in range(seeds):
                judged[name].bits.append(task.tested(shares, JUDGED_FROM + number))
                tick(name)
    for name, entry in judged.items():
        if name != BY_SIZE:
            pairs = zip(judged[BY_SIZE].bits, entry.bits, strict=True)
            entry.less = intervals.mean([a - b for a, b in pairs])
    return judged


def costs(f: TrainingFunction, mixture: Tensor, times: int) -> tuple[float, float]:
    """Processor time of a metagradient, and of a forward sweep along all shares, in that of a training with its
    objective: medians of alternating runs, after a first one of each."""
    z = {"mixture": mixture}
    works: list[Callable[[], Any]] = [lambda: f.value(z), lambda: f.metagradient(z), lambda: effects(f, mixture)]
    rounds = []
    for _ in range(1 + times):
        seconds = []
        for work in works:
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        rounds.append(seconds)
    plain, reverse, forward = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    return reverse / plain, forward / plain


def _rounded(x: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in x.tolist()]
