"""Rate the passages of a mixed pool by how much they teach about a target text: DataRater (arXiv 2505.17895).

A rater is trained by metagradients through short windows of small language models' trainings. It is judged by text that
neither saw: does it rank the domains as trainings on each alone do, does it find corrupted passages within a domain,
and does a fresh model learn faster from what it keeps?
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgd.errors import MissingPackage
from mgd.rater.data_rater import DataRater, RaterStep
from mgd.recipes.rate.data import CORRUPTIONS, NOISE, Pool, available, passages
from mgd.recipes.rate.models import InnerTraining, TextRater, losses
from mgd.recipes.rate.selection import Selection, select
from mgd.recipes.trainings import seeded
from mgd.ui.console import Reporter
from mgd.util.fingerprint import digest
from mgd.util.run_directory import RunDirectory
from mgd_kernels import AdamW

SNAPSHOTS = 20  # times at which the ratings are looked at while they are learned


@dataclass(frozen=True)
class Settings:
    """domains: the first is the target; None takes those that are installed. each: passages of a domain in the pool,
    of which the share `corruption` is corrupted. meta_steps, population, lifetime, window, rater_lr: of the DataRater.
    transfer_steps: of a training on one domain. steps, repeats: of the trainings on a selection. keep: shares of
    the pool, of which the one is kept whose best rated passages lead to the lowest held-out loss."""

    domains: tuple[str, ...] | None = None
    each: int = 6000
    corruption: float = 0.25
    context: int = 48
    layers: int = 1
    width: int = 64
    lr: float = 5e-3
    batch: int = 16
    meta_steps: int = 1000
    population: int = 3
    lifetime: int = 600
    window: int = 2
    rater_lr: float = 3e-3
    transfer_steps: int = 600
    steps: int = 1200
    every: int = 25
    repeats: int = 3
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    judged: int = 128
    seed: int = 0

    def quick(self) -> Settings:
        return replace(
            self,
            domains=("pydoc", "c++", "python", NOISE),
            each=2000,
            context=32,
            width=48,
            meta_steps=150,
            population=2,
            lifetime=200,
            rater_lr=5e-3,
            transfer_steps=150,
            keep=(0.25,),
            steps=300,
            every=10,
            repeats=1,
            judged=64,
        )

    def inner(self, device: str = "cpu") -> InnerTraining:
        return InnerTraining(self.context, self.layers, self.width, self.lr, self.batch, device)


@dataclass
class Found:
    """What was found.

    history: every meta-step. course: meta-step -> mean rating of each domain. evaluated, ratings: passages that the
    rater never saw, and their ratings. transfer: domain -> loss on the test text, in bits per byte, after training on
    that domain alone. rank_correlation: Spearman's, of mean rating and transfer loss (negated). auc: domain -> kind of
    corruption -> how well ratings tell clean from corrupted passages of that domain. selection: trainings on what was
    kept. seconds: by kind of work while rating was learned. phases: of everything.
    """

    settings: Settings
    domains: list[str]
    history: list[RaterStep]
    course: dict[int, dict[str, float]]
    evaluated: Pool
    ratings: Tensor
    transfer: dict[str, float]
    rank_correlation: float
    auc: dict[str, dict[str, float]]
    selection: Selection
    seconds: dict[str, float]
    notes: list[str]
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def target(self) -> str:
        return self.domains[0]

    def mean_ratings(self) -> dict[str, float]:
        """Of the clean passages of every domain."""
        return mean_ratings(self.evaluated, self.ratings)

    @property
    def agreeing_pairs(self) -> tuple[int, int]:
        """Of how many pairs of domains the better rated one leads to the lower loss, and how many pairs there are."""
        means = self.mean_ratings()
        pairs = list(combinations(self.domains, 2))
        agree = ((means[a] - means[b]) * (self.transfer[a] - self.transfer[b]) < 0 for a, b in pairs)
        return sum(agree), len(pairs)

    def to_dict(self) -> dict[str, Any]:
        thinned = self.history[:: max(1, len(self.history) // 100)]
        return {
            "settings": asdict(self.settings),
            "domains": self.domains,
            "mean_ratings": self.mean_ratings(),
            "transfer_bits_per_byte": self.transfer,
            "rank_correlation": self.rank_correlation,
            "auc": self.auc,
            "selection": self.selection.to_dict(),
            "course": {str(k): v for k, v in self.course.items()},
            "history": [
                {"step": s.step, "values": s.values, "ages": s.ages, "effective": s.effective} for s in thinned
            ],
            "windows": sum(len(s.values) for s in self.history),
            "seconds": self.seconds,
            "notes": self.notes,
            "phases": self.phases,
        }


def run(
    settings: Settings, reporter: Reporter | None = None, directory: Path | None = None, device: str = "cpu"
) -> Found:
    """Learn to rate, and judge the ratings. directory: keeps the learning, to continue one that was interrupted.
    device: where models are trained; what is found lies on the CPU."""
    reporter, s = reporter or Reporter(), settings
    spearmanr, _ = _statistics()
    domains = available(s.domains)
    length, inner = s.context + 1, s.inner(device)
    pool = Pool.make(domains, "pool", s.each, length, s.corruption, s.seed)
    evaluated = Pool.make(domains, "evaluation", s.judged, length, 0.5, s.seed + 1)
    generator = torch.Generator().manual_seed(s.seed + 2)
    held_out = passages(domains[0], "held out", s.each, length, generator)
    test = passages(domains[0], "test", s.judged, length, generator)

    rater = make_rater(s, pool.tokens, held_out, device)
    words = f"learning to rate: {s.meta_steps} meta-steps, {s.population} inner models, windows of {s.window} steps"
    with reporter.phase("rating", words):
        course = learn(rater, evaluated, s, directory, reporter.progress)
    ratings = rate(rater, evaluated)
    with reporter.phase("transfer", "training on each domain alone"):
        transfer = transfer_losses(s, domains, test, inner)
    with reporter.phase("selection", "training on what is kept"):
        selection = select(
            inner, pool, rate(rater, pool), held_out, test, s.keep, s.steps, s.every, s.repeats, s.seed, reporter
        )
    means = mean_ratings(evaluated, ratings)
    correlation = float(spearmanr([means[d] for d in domains], [-transfer[d] for d in domains]).statistic)
    auc = detection(evaluated, ratings)
    phases = dict(reporter.seconds)
    return Found(
        s,
        domains,
        rater.history,
        course,
        evaluated,
        ratings,
        transfer,
        correlation,
        auc,
        selection,
        dict(rater.seconds),
        rater.notes,
        phases,
    )


def learn(
    rater: DataRater, evaluated: Pool, s: Settings, directory: Path | None, progress: bool
) -> dict[int, dict[str, float]]:
    """Fit the rater. Returns, now and then on the way, the mean rating of each domain, by meta-step."""
    course: dict[int, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        kept = None
        if directory is not None:
            identity = rater.identity() | {"what is rated": digest(evaluated.tokens)}
            kept = stack.enter_context(RunDirectory(directory / "course", "course", identity))
            course |= kept.read("course") or {}

        def observe(step: RaterStep) -> None:
            if (step.step + 1) % max(1, s.meta_steps // SNAPSHOTS) == 0:
                course[step.step + 1] = mean_ratings(evaluated, rate(rater, evaluated))
                if kept is not None:
                    kept.write("course", course)

        rater.fit(s.meta_steps, directory=directory and directory / "rater", progress=progress, observe=observe)
    return course


def make_rater(s: Settings, pool: Tensor, held_out: Tensor, device: str = "cpu") -> DataRater:
    """The DataRater of these settings."""
    with seeded(s.seed):
        network = TextRater().to(device)
    return DataRater(
        network,
        s.inner(device).model,
        losses,
        pool.to(device),
        held_out.to(device),
        optimizer=AdamW(lr=s.lr, eps_root=1e-8),
        batch=s.batch,
        held_out_batch=s.batch,
        window=s.window,
        population=s.population,
        lifetime=s.lifetime,
        lr=s.rater_lr,
        seed=s.seed,
    )


def rate(rater: DataRater, pool: Pool) -> Tensor:
    """Ratings `[n]` of the passages, on the CPU."""
    return rater.rate(pool.tokens.to(rater.parameters[0].device)).cpu()


def mean_ratings(pool: Pool, ratings: Tensor) -> dict[str, float]:
    return {domain: float(ratings[pool.where(domain, clean=True)].mean()) for domain in pool.domains}


def transfer_losses(s: Settings, domains: list[str], test: Tensor, inner: InnerTraining) -> dict[str, float]:
    """Bits per byte on `test` after training on clean passages of each domain alone."""
    found = {}
    for i, domain in enumerate(domains):
        generator = torch.Generator().manual_seed(s.seed + 100 + i)
        tokens = passages(domain, "pool", s.each, s.context + 1, generator)
        _, curve = inner.train(tokens, s.transfer_steps, s.seed, test)
        found[domain] = curve.losses[-1]
    return found


def detection(pool: Pool, ratings: Tensor) -> dict[str, dict[str, float]]:
    """Domain -> kind of corruption, or "all" -> area under the ROC curve of ratings, clean against corrupted."""
    _, roc_auc_score = _statistics()
    found: dict[str, dict[str, float]] = {}
    for domain in pool.domains:
        if domain == NOISE:
            continue
        clean = pool.where(domain, clean=True)
        kinds = {kind: pool.where(domain) & (pool.corruption == i) for i, kind in enumerate(CORRUPTIONS, 1)}
        kinds["all"] = pool.where(domain, clean=False)
        found[domain] = {
            kind: float(roc_auc_score(clean[clean | bad].int(), ratings[clean | bad])) for kind, bad in kinds.items()
        }
    return found


def _statistics() -> tuple[Any, Any]:
    try:
        from scipy.stats import spearmanr
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise MissingPackage("recipes", "scipy and scikit-learn", "recipes") from error
    return spearmanr, roc_auc_score
