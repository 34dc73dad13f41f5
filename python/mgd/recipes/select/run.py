"""Select, and compare with other ways to choose training examples."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mgd.descent.state import MetaStep
from mgd.recipes.select.descend import Selection, select
from mgd.recipes.select.problem import WEIGHTS, SelectionProblem
from mgd.recipes.select.setting import Setting
from mgd.results import Metagradient
from mgd.step.rng import seed_of
from mgd.ui.console import Reporter

SELECTED, ALL, RANDOM = "selected by metagradients", "everything", "as many at random"


def names(setting: Setting) -> tuple[str, str, str, str]:
    """Of the choices that a setting words: the filters by a model of the pool and by one of the held-out examples,
    the held-out examples themselves, and all that is good."""
    return (
        f"{setting.filtered} after training on the pool",
        f"{setting.filtered} after training on held-out",
        f"the held-out {setting.examples} alone",
        f"all {setting.truths} (not attainable)",
    )


@dataclass
class Choice:
    """A way to choose: the setting's measure (accuracy) of each repeated training, its further measures, the number of
    different examples, and the share of them that are good (None where it is not from the pool)."""

    accuracies: list[float]
    further: dict[str, list[float]]
    examples: int
    precision: float | None

    @property
    def accuracy(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over the repeated trainings."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


@dataclass
class Found:
    """trace: by meta-step, the test accuracy and precision of what it trained with. choices: name -> how good."""

    setting: Setting
    selection: Selection
    choices: dict[str, Choice]
    trace: list[dict[str, float]]
    seconds: dict[str, float] = field(default_factory=dict)

    def gain(self, over: str) -> float:
        """The measure (accuracy) of the selection above that of another choice."""
        return self.choices[SELECTED].accuracy - self.choices[over].accuracy

    def to_dict(self) -> dict[str, Any]:
        return {
            "setting": self.setting.name,
            "settings": asdict(self.setting.settings),
            "data": self.setting.data(),
            "accuracy_is": self.setting.measures[0],
            "choices": {
                name: {**asdict(choice), "accuracy": choice.accuracy, "spread": choice.spread}
                for name, choice in self.choices.items()
            },
            "gain_in_accuracy": {name: self.gain(name) for name in self.choices if name != SELECTED},
            "counts_by_kind": self.setting.by_kind(self.selection.counts),
            "best_step": self.selection.descent.best_step,
            "notes": self.selection.descent.notes,
            "trace": self.trace,
            "seconds": self.seconds,
        }


def run(setting: Setting, reporter: Reporter | None = None) -> Found:
    """Select, and train on each choice; test examples are looked at by no choice."""
    reporter = reporter or Reporter()
    problem, good, s = setting.problem, setting.good, setting.settings
    trace: list[dict[str, float]] = []

    def observe(step: MetaStep, result: Metagradient, counts: Tensor) -> None:
        used = counts > 0
        trace.append(
            {
                "held_out_loss": round(step.value, 5),
                "test_accuracy": round(setting.test(result.model_state)[0], 5),
                "examples": int(used.sum()),
                "total": int(counts.sum()),
                "precision": round(float(good[used].double().mean()), 5),
                "recall": round(float(used[good].double().mean()), 5),
                "raised": round(float((result.grads[WEIGHTS] < 0).double().mean()), 5),
                "seconds": round(step.seconds, 3),
            }
        )

    words = f"selecting among {len(problem):,} {setting.examples}, {s.meta_steps} trainings with a metagradient"
    with reporter.phase("selection", words):
        selection = select(
            problem,
            s.meta_steps,
            budget=s.budget,
            memory=s.memory,
            share=s.share,
            highest=s.highest,
            shard=s.shard,
            seed=s.seed,
            observe=observe,
            progress=reporter.progress,
        )
    with reporter.phase("comparison", f"training on what each choice keeps, {s.repeats} times"):
        choices = _compare(setting, selection, reporter)
    return Found(setting, selection, choices, trace, dict(reporter.seconds))


def _compare(setting: Setting, selection: Selection, reporter: Reporter) -> dict[str, Choice]:
    problem, held, settings = setting.problem, setting.over(setting.held), setting.settings
    n, kept = len(problem), len(selection.kept)
    # Neither initial parameters nor orders of these trainings were seen by the selection.
    seeds = [seed_of(settings.seed, 10**6 + i) for i in range(settings.repeats)]

    def held_out_loss(counts: Tensor) -> float:
        problem.prepare(counts, seeds[0])
        return float(problem.function.value())

    def filtered(by: SelectionProblem) -> Tensor:
        """A filter keeps as many as suit the held-out examples best: it is given what the selection is given."""
        trained = [by.train(torch.ones(len(by)), seed).model_state for seed in seeds]
        order = torch.stack([setting.scores(state) for state in trained]).mean(0).argsort()
        sizes = sorted({kept, *(int(share * n) for share in setting.sizes)})
        return min((torch.zeros(n).index_fill(0, order[:size], 1.0) for size in sizes), key=held_out_loss)

    order = torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed + 1))
    by_pool, by_held, held_alone, truth = names(setting)
    counts = {
        SELECTED: selection.counts,
        ALL: torch.ones(n),
        RANDOM: torch.zeros(n).index_fill(0, order[:kept], 1.0),
        by_pool: filtered(problem),
        by_held: filtered(held),
        truth: setting.good.float(),
    }
    choices = {}
    with reporter.bar("trainings", (len(counts) + 1) * len(seeds)) as tick:

        def trained(p: SelectionProblem, c: Tensor, precision: float | None) -> Choice:
            found = []
            for seed in seeds:
                found.append(setting.test(p.train(c, seed).model_state))
                tick("")
            accuracies, *others = [list(values) for values in zip(*found, strict=True)]
            further = dict(zip(setting.measures[1:], others, strict=True))
            return Choice(accuracies, further, int((c > 0).sum()), precision)

        for name, c in counts.items():
            choices[name] = trained(problem, c, float(setting.good[c > 0].double().mean()))
        choices[held_alone] = trained(held, torch.ones(len(held)), None)
    return choices
