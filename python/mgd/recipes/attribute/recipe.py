"""The recipe: attribute the losses of test examples to training examples, and judge it by retraining without some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mgd.errors import BadArgument, MetagradientError
from mgd.recipes.attribute.baselines import BASELINES
from mgd.recipes.attribute.dropout import Dropout, judge_dropout
from mgd.recipes.attribute.judging import Evaluation, Judged, judge
from mgd.recipes.attribute.task import Task
from mgd.recipes.attribute.windows import last_steps
from mgd.ui.console import Reporter


@dataclass
class Found:
    """The recipe's result. rough, dropout: of a training that is hard to differentiate, and of one with dropout, if
    they were made."""

    smooth: Judged
    rough: Judged | None
    rough_failure: str | None
    evaluation: Evaluation
    seconds: Mapping[str, float]
    dropout: Dropout | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "seed": self.smooth.task.seed,
            "evaluation": asdict(self.evaluation),
            "smooth": self.smooth.to_dict(),
            "rough": self.rough and self.rough.to_dict(),
            "rough_failure": self.rough_failure,
            "dropout": self.dropout and self.dropout.to_dict(),
            "seconds": dict(self.seconds),
        }


def run(
    task: Task,
    rough: Task | None = None,
    evaluation: Evaluation | None = None,
    reporter: Reporter | None = None,
    dropout: Task | None = None,
) -> Found:
    """Attribute, compare, and retrain without random subsets. rough: a training to contrast it with. dropout: one with
    dropout."""
    evaluation, reporter = evaluation or Evaluation(), reporter or Reporter()
    if unknown := sorted(set(evaluation.baselines) - set(BASELINES)):
        raise BadArgument(f"expected baselines among {list(BASELINES)}; got {unknown}")
    if evaluation.windows and not evaluation.fractions:
        raise BadArgument("expected no windows where nothing is retrained, which judges them: this setting trains once")
    for share in evaluation.windows:
        last_steps(share, len(task.function))
    smooth = judge(task, evaluation, reporter)
    contrast, failure, masked = None, None, None
    if rough is not None and evaluation.rough_subsets:
        own = replace(evaluation, subsets=evaluation.rough_subsets, baselines=(), windows=())
        try:
            contrast = judge(rough, own, reporter)
        except MetagradientError as error:  # a training that diverges is an outcome, too
            failure = f"{type(error).__name__}: {error}"
    if dropout is not None and evaluation.dropout_subsets:
        masked = judge_dropout(dropout, evaluation, reporter)
    return Found(smooth, contrast, failure, evaluation, reporter.seconds, masked)
