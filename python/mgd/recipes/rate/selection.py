"""Fresh models trained on what is kept of a pool, by ratings and otherwise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mgd.rater.sampling import keep_best
from mgd.recipes.rate.data import Pool
from mgd.recipes.rate.models import Curve, InnerTraining, bits_per_byte
from mgd.ui.console import Reporter

EVERYTHING = "everything"
RATER = "best rated"


@dataclass
class Kept:
    """A way to keep a share of the pool. curves: loss on the test text of trainings that differ in their seed.
    composition: domain -> its share of what is kept. corrupted: the share of corrupted passages in it."""

    curves: list[Curve]
    composition: dict[str, float]
    corrupted: float

    @property
    def final(self) -> float:
        return statistics.mean(curve.losses[-1] for curve in self.curves)

    def mean_curve(self) -> Curve:
        return Curve(
            self.curves[0].steps, [statistics.mean(x) for x in zip(*(c.losses for c in self.curves), strict=True)]
        )


@dataclass
class Selection:
    """keep: the share that is kept. shares: share -> held-out loss of a training on the best rated, by which it was
    chosen; empty where there was no choice. ways: name -> what it keeps and what comes of it. steps: of every training.
    """

    keep: float
    shares: dict[float, float]
    steps: int
    ways: dict[str, Kept]

    def needed(self, way: str) -> list[float | None]:
        """The share of the steps after which each of its trainings is as good as the one on everything with the same
        seed in the end; None where it never is."""
        pairs = zip(self.ways[way].curves, self.ways[EVERYTHING].curves, strict=True)
        return [share_needed(curve, reference.losses[-1]) for curve, reference in pairs]

    def needed_on_average(self, way: str) -> float | None:
        """The same of the mean curves."""
        return share_needed(self.ways[way].mean_curve(), self.ways[EVERYTHING].final)

    def to_dict(self) -> dict[str, Any]:
        return {
            "keep": self.keep,
            "held_out_loss_by_share": {str(share): loss for share, loss in self.shares.items()},
            "steps": self.steps,
            "ways": {
                name: {
                    **asdict(kept),
                    "final": kept.final,
                    "needed": self.needed(name),
                    "needed_on_average": self.needed_on_average(name),
                }
                for name, kept in self.ways.items()
            },
        }


def share_needed(curve: Curve, goal: float) -> float | None:
    """The share of a curve's steps until it first is at `goal` or below."""
    reached = [step for step, loss in zip(curve.steps, curve.losses, strict=True) if loss <= goal]
    return reached[0] / curve.steps[-1] if reached else None


def select(
    inner: InnerTraining,
    pool: Pool,
    ratings: Tensor,
    held_out: Tensor,
    test: Tensor,
    keeps: Sequence[float],
    steps: int,
    every: int,
    repeats: int,
    seed: int,
    reporter: Reporter,
) -> Selection:
    """Train on everything, on a random share, on what two perplexity filters keep, and on the best rated.

    A perplexity filter keeps the passages that a language model finds the least surprising: one trained on the pool
    itself, which knows nothing of the target, and one trained on the held-out text, from which ratings come, too. All
    keep the share of `keeps` with which the best rated lead to the lowest held-out loss.
    """
    shares = {}
    if len(keeps) > 1:
        for share in keeps:
            best = pool.tokens[keep_best(ratings, share)]
            shares[share] = inner.train(best, steps, seed + 1002, held_out[: len(test)])[1].losses[-1]
    keep = min(shares, key=lambda share: shares[share]) if shares else keeps[0]
    chance = torch.rand(len(pool), generator=torch.Generator().manual_seed(seed))
    of_pool, _ = inner.train(pool.tokens, steps, seed + 1000)
    of_target, _ = inner.train(held_out, steps, seed + 1001)
    scores = {
        "random": chance,
        "perplexity, of the pool": -bits_per_byte(of_pool, pool.tokens),
        "perplexity, of the target": -bits_per_byte(of_target, pool.tokens),
        RATER: ratings,
    }
    kept = {EVERYTHING: torch.arange(len(pool))} | {name: keep_best(score, keep) for name, score in scores.items()}
    ways: dict[str, Kept] = {}
    with reporter.bar("training", len(kept) * repeats * steps) as tick:
        for name, index in kept.items():
            curves = [
                inner.train(pool.tokens[index], steps, seed + 2000 + r, test, every, tick)[1] for r in range(repeats)
            ]
            of_domains = torch.bincount(pool.domain[index], minlength=len(pool.domains)) / len(index)
            ways[name] = Kept(
                curves,
                dict(zip(pool.domains, of_domains.tolist(), strict=True)),
                float((pool.corruption[index] > 0).double().mean()),
            )
    return Selection(keep, shares, steps, ways)
