"""One training: its attribution, other methods' scores, and what retrainings without some examples say of both."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mgd.attribution.attribute import attribute
from mgd.attribution.result import Attribution
from mgd.check import metasmoothness
from mgd.errors import BadData, MissingPackage
from mgd.recipes.attribute.baselines import BASELINES, OF_TEXTS
from mgd.recipes.attribute.lds import LDS, linear_datamodeling_score, predictions, subsets
from mgd.recipes.attribute.removal import most_helpful, rises
from mgd.recipes.attribute.retraining import retrained, timed, trained
from mgd.recipes.attribute.task import Task
from mgd.recipes.attribute.windows import Window, windows
from mgd.recipes.intervals import Interval
from mgd.ui.console import Reporter

OURS = "metagradient"
DIFFERENCE_STEP = 0.1  # how far the weight that moves most is moved from 1, each way
SMOOTHNESS_SHARE, SMOOTHNESS_STEP = 0.1, 0.5  # examples whose weights fall, and how far a step of metasmoothness goes


@dataclass(frozen=True)
class Evaluation:
    """How scores are judged. fractions: of the training examples that are dropped; none: where a training takes too
    long to be repeated so often. subsets: retrainings per fraction. rough_subsets: the same for the roughly trained
    network, dropout_subsets: for the one with dropout; 0 leaves it out. baselines: names of those to compare. windows:
    shares of the steps, the last ones, whose part of the scores is judged, and that of the steps before. removed: the
    share of the examples, those that a method calls most helpful to a query, without which that query is judged; 0
    leaves it out. singles: the number of examples, those with the largest scores, whose weights are moved one by one; 0
    leaves it out."""

    fractions: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2)
    subsets: int = 40
    rough_subsets: int = 20
    dropout_subsets: int = 16
    baselines: tuple[str, ...] = tuple(BASELINES)
    windows: tuple[float, ...] = (0.25, 0.5)
    removed: float = 0.05
    singles: int = 4
    resamples: int = 1000
    chunk: int | None = None

    def quick(self) -> Evaluation:
        few = replace(self, fractions=(0.05, 0.2), subsets=8, rough_subsets=0, dropout_subsets=5)
        return replace(few, windows=(0.5,), singles=2, resamples=200)


@dataclass
class Judged:
    """A training, the attribution of its queries, and how well each method's predictions came true.

    model_state: after the training. dropped: fraction -> the m subsets that retrainings leave out. predicted: method ->
    fraction -> `[m, k]`; true: fraction -> `[m, k]`; scores: method -> fraction -> LDS. windows: parts of the scores.
    removal: method -> how much a query's loss rises without its most helpful examples, and the interval.
    missing: baselines that did not run, and why. plain_seconds: of a training without a gradient. difference: the
    derivative of the mean query loss along its own gradient, by the scores and by a central difference of two
    trainings. singles: of examples whose weight was moved alone, the derivatives of all query losses by the scores and
    by central differences, each `[m, k]`. smoothness: the training's empirical metasmoothness along the weights of a
    tenth of the examples.
    """

    task: Task
    attribution: Attribution
    model_state: dict[str, Tensor]
    loss: float
    accuracy: float
    plain_seconds: float
    attribution_seconds: float
    difference: tuple[float, float]
    smoothness: float
    singles: tuple[Tensor, Tensor] | None = None
    dropped: dict[float, list[Tensor]] = field(default_factory=dict)
    true: dict[float, Tensor] = field(default_factory=dict)
    predicted: dict[str, dict[float, Tensor]] = field(default_factory=dict)
    scores: dict[str, dict[float, LDS]] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    removal: dict[str, Interval] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    baseline_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def singles_error(self) -> float | None:
        """Of all those derivatives by the scores, relative to the differences."""
        return self.singles and float((self.singles[0] - self.singles[1]).norm() / self.singles[1].norm())

    @property
    def trainings_per_query(self) -> float:
        """Seconds of the attribution per query, in units of a plain training."""
        return self.attribution_seconds / self.task.queries / self.plain_seconds

    def to_dict(self) -> dict[str, Any]:
        a = self.attribution
        return self.task.facts() | {
            "test_loss": self.loss,
            "test_accuracy": self.accuracy,
            "derivative_by_scores_and_by_difference": list(self.difference),
            "single_weights_by_scores_and_by_difference": self.singles and [x.tolist() for x in self.singles],
            "single_weights_relative_error": self.singles_error,
            "metasmoothness": self.smoothness,
            "plain_training_seconds": self.plain_seconds,
            "attribution_seconds": self.attribution_seconds,
            "trainings_per_query": self.trainings_per_query,
            "attribution": a.report.to_dict(),
            "unvisited": a.unvisited.tolist(),
            "query_losses": a.values.tolist(),
            "lds": {m: {str(f): s.to_dict() for f, s in by.items()} for m, by in self.scores.items()},
            "windows": [window.to_dict() for window in self.windows],
            "rise_without_the_most_helpful": {m: list(x) for m, x in self.removal.items()},
            "true_change_std": {str(f): t.std(0).tolist() for f, t in self.true.items()},
            "baseline_seconds": self.baseline_seconds,
            "baselines_missing": self.missing,
        }


def judge(task: Task, evaluation: Evaluation, reporter: Reporter) -> Judged:
    """Attribute a training, compare with the baselines' scores, and retrain without random subsets."""
    f, z = task.function, task.z
    whole, plain = trained(task, reporter)
    with reporter.phase("attribution", f"attributing {task.queries} test losses"):
        a, seconds = timed(
            lambda: attribute(f, z, task.queries, task.objectives, chunk=evaluation.chunk, progress=reporter.progress)
        )
    loss, accuracy = task.test(whole.model_state)
    with reporter.phase("difference"):
        difference = _difference(task, torch.as_tensor(a.scores).double().mean(0))
    singles = None
    if evaluation.singles:
        with reporter.phase("single weights", f"moving {evaluation.singles} weights one by one"):
            singles = _singles(task, torch.as_tensor(a.scores).double(), evaluation.singles)
    with reporter.phase("metasmoothness"):
        smoothness = metasmoothness(f, z, _direction(task), SMOOTHNESS_STEP)
    judged = Judged(task, a, whole.model_state, loss, accuracy, plain, seconds, difference, smoothness, singles)
    judged.windows = windows(task, a.scores, evaluation.windows, evaluation.chunk, reporter)
    scores: dict[str, Any] = {OURS: a.scores, **_baselines(judged, evaluation.baselines, reporter)}

    count, base = evaluation.subsets, task.query_losses(whole.model_state)
    judged.dropped = {p: subsets(len(task), p, count, task.seed + i + 1) for i, p in enumerate(evaluation.fractions)}
    judged.true = retrained(task, judged.dropped, base, reporter)
    with reporter.phase("judging", "ranking the predictions"):
        for method, table in scores.items():
            judged.predicted[method] = {p: predictions(table, sets) for p, sets in judged.dropped.items()}
            judged.scores[method] = _lds(judged, judged.predicted[method], evaluation)
        for window in judged.windows:
            guess = {p: predictions(window.scores, sets) for p, sets in judged.dropped.items()}
            window.lds = _lds(judged, guess, evaluation)
    if evaluation.removed and task.queries > 1:
        _remove(judged, scores, evaluation.removed, base, reporter)
    return judged


def _baselines(judged: Judged, names: tuple[str, ...], reporter: Reporter) -> dict[str, Tensor]:
    """The scores of other methods, by name; of what did not run, the reason is noted."""
    task = judged.task
    here = replace(task, device="cpu") if task.device != "cpu" else task  # where the other packages work
    state = {name: tensor.cpu() for name, tensor in judged.model_state.items()}
    found = {}
    for name in names:
        if name in OF_TEXTS and task.texts is None:
            continue
        with reporter.phase(name, f"comparing with {name}"):
            try:
                found[name], judged.baseline_seconds[name] = timed(lambda name=name: BASELINES[name](here, state))  # type: ignore[misc]
            except (BadData, MissingPackage) as error:
                judged.missing[name] = str(error)
                reporter.say(f"without {name}: {error}")
    return found


def _lds(judged: Judged, predicted: dict[float, Tensor], evaluation: Evaluation) -> dict[float, LDS]:
    """By fraction."""
    how = {"resamples": evaluation.resamples, "seed": judged.task.seed}
    return {p: linear_datamodeling_score(guess, judged.true[p], **how) for p, guess in predicted.items()}


def _remove(judged: Judged, scores: dict[str, Any], share: float, base: Tensor, reporter: Reporter) -> None:
    """Train once for every method and query, without the examples that help it most."""
    total = judged.task.queries * len(scores)
    with (
        reporter.phase("counterfactuals", f"training {total} times without what helps a query most"),
        reporter.bar("counterfactuals", total) as tick,
    ):
        for name, table in scores.items():
            removed = most_helpful(table, share)
            judged.removal[name] = rises(judged.task, removed, base, lambda name=name: tick(name))  # type: ignore[misc]


def _difference(task: Task, gradient: Tensor) -> tuple[float, float]:
    """The derivative of the mean query loss along its gradient with respect to the weights, float64 `[n]`: by that
    gradient, and by a central difference."""
    direction = gradient / gradient.abs().max().clamp_min(1e-300)
    step = DIFFERENCE_STEP * direction.to(task.z["data_weights"])
    ahead, behind = (task.with_weights(task.z["data_weights"] + sign * step).mean() for sign in (1, -1))
    return float(gradient @ direction), float(ahead - behind) / (2 * DIFFERENCE_STEP)


def _singles(task: Task, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The scores of the examples with the largest ones, float64 `[m, k]`, and central differences of two trainings
    each, in which the weight of one example alone moves."""
    largest = scores.square().sum(0).topk(count).indices
    weights = task.z["data_weights"]
    found = []
    for i in largest.tolist():
        moved = DIFFERENCE_STEP * torch.zeros_like(weights).index_fill(0, torch.tensor(i, device=weights.device), 1.0)
        found.append((task.with_weights(weights + moved) - task.with_weights(weights - moved)) / (2 * DIFFERENCE_STEP))
    return scores[:, largest].T.clone(), torch.stack(found)


def _direction(task: Task) -> dict[str, Tensor]:
    (index,) = subsets(len(task), SMOOTHNESS_SHARE, 1, task.seed)
    return {"data_weights": torch.zeros(len(task)).index_fill(0, index, -1.0).to(task.device)}
