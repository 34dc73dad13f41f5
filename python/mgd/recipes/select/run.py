"""Select, and compare with other ways to choose training examples."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mgd.batches import seed_of
from mgd.data import Images
from mgd.descent_state import MetaStep
from mgd.recipes.form import Talk
from mgd.recipes.select.descend import Selection, select
from mgd.recipes.select.images import KINDS, Classifier, Pool, Settings, by_kind, make_pool
from mgd.recipes.select.problem import WEIGHTS, SelectionProblem
from mgd.results import Metagradient

SELECTED, ALL, RANDOM = "selected by metagradients", "everything", "as many at random"
LOSS, LOSS_HELD = "lowest loss after training on the pool", "lowest loss after training on held-out"
HELD, TRUTH = "the held-out images alone", "all true labels (not attainable)"
SIZES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # shares of the pool that a filter may keep, beside what the selection keeps


@dataclass
class Choice:
    """A way to choose: test accuracy of each repeated training, the number of different examples, and the share of them
    that are images of the task with a true label (None where it is not from the pool)."""

    accuracies: list[float]
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

    settings: Settings
    pool: Pool
    selection: Selection
    choices: dict[str, Choice]
    trace: list[dict[str, float]]
    seconds: dict[str, float] = field(default_factory=dict)

    def gain(self, over: str) -> float:
        """Test accuracy of the selection above that of another choice."""
        return self.choices[SELECTED].accuracy - self.choices[over].accuracy

    def to_dict(self) -> dict[str, Any]:
        return {
            "setting": "images",
            "settings": asdict(self.settings),
            "data": {
                "name": self.pool.images.name,
                "pool": {name: int((self.pool.kind == i).sum()) for i, name in enumerate(KINDS)},
                "true_labels_of_the_task": int(self.pool.good.sum()),
                "held_out_images": len(self.pool.held_out),
                "test_images": len(self.pool.test),
            },
            "choices": {
                name: {**asdict(choice), "accuracy": choice.accuracy, "spread": choice.spread}
                for name, choice in self.choices.items()
            },
            "gain_in_accuracy": {name: self.gain(name) for name in self.choices if name != SELECTED},
            "counts_by_kind": by_kind(self.pool, self.selection.counts),
            "best_step": self.selection.descent.best_step,
            "notes": self.selection.descent.notes,
            "trace": self.trace,
            "seconds": self.seconds,
        }


def run(train: Images, test: Images, settings: Settings, talk: Talk | None = None) -> Found:
    """Make the pool, select, and train on each choice; test images are looked at by no choice."""
    talk = talk or Talk()
    pool = make_pool(train, test, settings)
    classifier = Classifier(pool, settings)
    problem = classifier.problem(classifier.x, classifier.y)
    trace: list[dict[str, float]] = []

    def observe(step: MetaStep, result: Metagradient, counts: Tensor) -> None:
        accuracy = classifier.test_accuracy(result.model_state, problem.model)
        used = counts > 0
        trace.append(
            {
                "held_out_loss": round(step.value, 5),
                "test_accuracy": round(accuracy, 5),
                "examples": int(used.sum()),
                "total": int(counts.sum()),
                "precision": round(float(pool.good[used].double().mean()), 5),
                "recall": round(float(used[pool.good].double().mean()), 5),
                "raised": round(float((result.grads[WEIGHTS] < 0).double().mean()), 5),
                "seconds": round(step.seconds, 3),
            }
        )

    s = settings
    with talk.phase("selection", f"selecting among {s.pool:,} images, {s.meta_steps} trainings with a metagradient"):
        selection = select(
            problem,
            s.meta_steps,
            budget=s.budget,
            share=s.share,
            highest=s.highest,
            shard=s.shard,
            seed=s.seed,
            observe=observe,
            progress=talk.progress,
        )
    with talk.phase("comparison", f"training on what each choice keeps, {s.repeats} times"):
        choices = _compare(classifier, problem, pool, selection, talk)
    return Found(settings, pool, selection, choices, trace, dict(talk.seconds))


def _compare(
    classifier: Classifier, problem: SelectionProblem, pool: Pool, selection: Selection, talk: Talk
) -> dict[str, Choice]:
    settings, n, kept = classifier.settings, len(problem), len(selection.kept)
    held = classifier.problem(classifier.held_x, classifier.held_y)
    # Neither initial parameters nor orders of these trainings were seen by the selection.
    seeds = [seed_of(settings.seed, 10**6 + i) for i in range(settings.repeats)]

    def lowest(trained_on: SelectionProblem) -> Tensor:
        """A filter keeps as many as suit the held-out images best: it is given what the selection is given."""
        order = torch.stack([classifier.losses(trained_on, seed) for seed in seeds]).mean(0).argsort()
        sizes = sorted({kept, *(int(share * n) for share in SIZES)})
        tried = [torch.zeros(n).index_fill(0, order[:size], 1.0) for size in sizes]
        return min(tried, key=lambda counts: classifier.held_out_loss(problem, counts, seeds[0]))

    order = torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed + 1))
    counts = {
        SELECTED: selection.counts,
        ALL: torch.ones(n),
        RANDOM: torch.zeros(n).index_fill(0, order[:kept], 1.0),
        LOSS: lowest(problem),
        LOSS_HELD: lowest(held),
        TRUTH: pool.good.float(),
    }
    choices = {}
    with talk.bar("trainings", (len(counts) + 1) * len(seeds)) as tick:

        def trained(p: SelectionProblem, c: Tensor) -> list[float]:
            found = []
            for seed in seeds:
                found.append(classifier.test_accuracy(p.train(c, seed).model_state, p.model))
                tick("")
            return found

        for name, c in counts.items():
            used = c > 0
            choices[name] = Choice(trained(problem, c), int(used.sum()), float(pool.good[used].double().mean()))
        choices[HELD] = Choice(trained(held, torch.ones(len(held))), len(held), None)
    return choices
