"""Dropout: do the scores predict trainings with the same masks, and do they predict trainings with others?

The masks of a training are a function of its seed, its steps and the examples' places in the batch. An example that is
left out keeps its place, with weight 0. So a retraining from the same seed differs from the training by the examples
alone, and scores are the derivative of just that: single-model attribution, as MAGIC defines it. A retraining from
another seed has other masks, and they change a query's loss, too. What examples do there is the difference of two
trainings from that seed, with them and without: the scores of one training are judged by many others. The usual linear
datamodeling score takes no such difference. Then the chance of the masks is in what is to be predicted, which no
attribution of one training can.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mgd.recipes.attribute.judging import Evaluation, Judged, judge
from mgd.recipes.attribute.lds import LDS, linear_datamodeling_score
from mgd.recipes.attribute.task import Task
from mgd.ui.console import Reporter

SHARE = 0.05  # of the examples that a retraining drops
SAME, OTHER, CHANCE = "the same masks", "other masks", "other masks, with their chance"


@dataclass
class Dropout:
    """A training with dropout, and how well its scores predict retrainings without a share of the examples.

    judged: by retrainings with the same masks. scores: by which masks the retrainings had (SAME, OTHER, CHANCE) ->
    method -> LDS. effect, chance: the standard deviation of a query's loss over subsets that are dropped, with the same
    masks, and over masks, with nothing dropped; both the mean over queries.
    """

    rate: float
    judged: Judged
    scores: dict[str, dict[str, LDS]]
    effect: float
    chance: float

    def to_dict(self) -> dict[str, Any]:
        lds = {masks: {m: score.to_dict() for m, score in by.items()} for masks, by in self.scores.items()}
        return {
            "rate": self.rate,
            "share_dropped": SHARE,
            "judged": self.judged.to_dict(),
            "lds_by_masks": lds,
            "deviation_over_subsets": self.effect,
            "deviation_over_masks": self.chance,
        }


def judge_dropout(task: Task, evaluation: Evaluation, reporter: Reporter) -> Dropout:
    """Attribute a training with dropout. Each subset is judged with the same masks, and with others of its own."""
    own = replace(evaluation, fractions=(SHARE,), subsets=evaluation.dropout_subsets, windows=(), removed=0, singles=0)
    judged = judge(task, own, reporter)
    without = judged.dropped[SHARE]
    base = task.query_losses(judged.model_state)
    with (
        reporter.phase("other masks", f"training {2 * len(without)} times with other masks"),
        reporter.bar("other masks", 2 * len(without)) as tick,
    ):
        pairs = []
        for number, index in enumerate(without, 1):
            for dropped in (index[:0], index):
                pairs.append(task.without(dropped, task.seed + number))
                tick(f"masks {number}")
    full, less = torch.stack(pairs[::2]), torch.stack(pairs[1::2])
    true = {SAME: judged.true[SHARE], OTHER: less - full, CHANCE: less - base}
    return Dropout(
        task.dropout,
        judged,
        {masks: _scores(judged, changes, own, task.seed) for masks, changes in true.items()},
        float(judged.true[SHARE].std(0).mean()),
        float(full.std(0).mean()),
    )


def _scores(judged: Judged, true: Tensor, evaluation: Evaluation, seed: int) -> dict[str, LDS]:
    return {
        method: linear_datamodeling_score(by[SHARE], true, resamples=evaluation.resamples, seed=seed)
        for method, by in judged.predicted.items()
    }
