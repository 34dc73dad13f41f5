"""Attribution (MAGIC, arXiv 2504.16430): which training examples decided a prediction, judged by retraining."""

from mgd.recipes.attribute.command import command
from mgd.recipes.attribute.judging import Evaluation, Judged, judge
from mgd.recipes.attribute.lds import LDS, linear_datamodeling_score, predictions, subsets
from mgd.recipes.attribute.recipe import Found, run
from mgd.recipes.attribute.task import Task, Training

__all__ = [
    "LDS",
    "Evaluation",
    "Found",
    "Judged",
    "Task",
    "Training",
    "command",
    "judge",
    "linear_datamodeling_score",
    "predictions",
    "run",
    "subsets",
]
