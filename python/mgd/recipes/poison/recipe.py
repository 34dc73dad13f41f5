"""How much do a few perturbed training images cost, and can one see them? A robustness test of a training (arXiv
2503.13751, on public toy data).

The pixels of 2.5% of the training images move inside [0, 1], their labels stay. Metagradient descent moves them such
that models trained on the set err on held-out images; gradient cancelling, the method before it, and controls do what
they can with the same images. Freshly trained models are judged on test images that nothing else looks at. Then the
defender's side: how far the pixels moved, and which checks rank the poisoned images first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd.descent.descent import Descent
from mgd.descent.state import MetaStep
from mgd.errors import BadArgument
from mgd.recipes.data import Images
from mgd.recipes.poison import cancelling
from mgd.recipes.poison.attack import chosen, controls, descend, with_pixels
from mgd.recipes.poison.cancelling import Cancelled
from mgd.recipes.poison.checks import Detection, examine, psnr
from mgd.recipes.poison.training import Training, check_data, wrong_probability
from mgd.ui.console import Reporter

FRESH, TUNING, DEFENDER = 1000, 2000, 3000  # first seeds of judging, of the baseline's tuning and of the defender


@dataclass(frozen=True)
class Settings:
    """training, held_out, defender, test: numbers of images. share: of the training images that is poisoned. low, high:
    where their pixels may go. network, steps, batch: of the training under test. others: architectures that judge too.
    meta_steps: trainings of the descent, over `seeds` seeds in turn. step_size: of a pixel in a meta-step. fresh: seeds
    that judge and that the descent has not seen; fresh_others: of them for each of the others. radii, cancelling_steps:
    of gradient cancelling. check_seeds: trainings of a check. watch: meta-steps between two looks at fresh seeds."""

    training: int = 1000
    held_out: int = 1000
    defender: int = 1000
    test: int = 5000
    share: float = 0.025
    low: float = 0.0
    high: float = 1.0
    network: str = "mlp"
    others: tuple[str, ...] = ("cnn", "resnet9")
    steps: int = 200
    batch: int = 50
    meta_steps: int = 80
    step_size: float = 0.05
    seeds: int = 8
    fresh: int = 12
    fresh_others: int = 3
    radii: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0)
    cancelling_steps: int = 200
    check_seeds: int = 3
    watch: int = 10
    seed: int = 0

    def quick(self) -> Settings:
        return replace(
            self,
            step_size=0.1,
            training=600,
            held_out=400,
            defender=300,
            test=1000,
            others=("cnn",),
            steps=80,
            batch=30,
            meta_steps=30,
            seeds=4,
            fresh=4,
            fresh_others=2,
            radii=(0.02, 0.1),
            cancelling_steps=60,
            check_seeds=1,
            watch=6,
        )

    def fitting(self, available: int) -> Settings:
        """With fewer images where the data set has fewer, in the same proportions."""
        parts = (self.training, self.held_out, self.defender)
        if available >= sum(parts):
            return self
        training, held_out, defender = (part * available // sum(parts) for part in parts)
        return replace(self, training=training, held_out=held_out, defender=defender)


@dataclass
class Found:
    """images: name of a training set (an arm) -> its images. accuracies: judges -> arm -> test accuracy of a model a
    seed; the judges are "seen seeds", "fresh seeds" and the other architectures. way: meta-step -> test accuracies of
    freshly trained models there. test_on_the_way: of every training of the descent. checks: arm -> one Detection a
    check; at_random: test accuracies without as many images at random. tuning: radius -> held-out accuracy."""

    settings: Settings
    data: str
    classes: tuple[str, ...]
    labels: Tensor
    poisoned: Tensor
    images: dict[str, Tensor]
    descent: Descent
    test_on_the_way: list[float]
    way: dict[int, list[float]]
    cancelled: Cancelled
    tuning: dict[float, float]
    accuracies: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    checks: dict[str, list[Detection]] = field(default_factory=dict)
    at_random: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def drops(self, arm: str, judges: str = "fresh seeds") -> Tensor:
        """What the arm costs in test accuracy, seed by seed, against the clean training of the same seed."""
        scores = self.accuracies[judges]
        return torch.tensor(scores["clean"], dtype=torch.float64) - torch.tensor(scores[arm], dtype=torch.float64)

    def ratio(self, judges: str = "fresh seeds") -> float:
        """The mean drop by metagradients in units of that by gradient cancelling; infinite where that is no drop."""
        ours, theirs = (float(self.drops(arm, judges).mean()) for arm in (MGD, CANCELLING))
        return ours / theirs if theirs > 0 else float("inf")

    def ratio_interval(self, judges: str = "fresh seeds", draws: int = 2000) -> tuple[float, float]:
        """Its 95% interval: both means over the same seeds, drawn with replacement."""
        ours, theirs = self.drops(MGD, judges), self.drops(CANCELLING, judges)
        pick = torch.randint(len(ours), (draws, len(ours)), generator=torch.Generator().manual_seed(0))
        below = theirs[pick].mean(1)
        ratios = torch.where(below > 0, ours[pick].mean(1) / below, torch.inf).sort().values
        return float(ratios[int(0.025 * draws)]), float(ratios[int(0.975 * draws)])

    def noise_levels(self) -> dict[str, list[float]]:
        """Arm -> PSNR in decibels of every poisoned image that differs from its original."""
        original = self.images["clean"][self.poisoned]
        found = {}
        for arm, images in self.images.items():
            values = psnr(images[self.poisoned], original)
            found[arm] = values[torch.isfinite(values)].tolist()
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": vars(self.settings),
            "data": self.data,
            "poisoned_images": len(self.poisoned),
            "accuracies": self.accuracies,
            "drops": {
                judges: {
                    arm: {"mean": float(paired.mean()), "standard_error": standard_error(paired)}
                    for arm in scores
                    for paired in [self.drops(arm, judges)]
                }
                for judges, scores in self.accuracies.items()
            },
            "ratio_to_gradient_cancelling": {judges: self.ratio(judges) for judges in self.accuracies},
            "ratio_interval": list(self.ratio_interval()),
            "descent": self.descent.to_dict(),
            "test_accuracy_of_every_meta_step": self.test_on_the_way,
            "test_accuracy_of_fresh_seeds_on_the_way": self.way,
            "gradient_cancelling": {
                **{name: value for name, value in vars(self.cancelled).items() if name != "images"},
                "held_out_accuracy_by_radius": self.tuning,
            },
            "psnr": self.noise_levels(),
            "checks": {arm: [check.to_dict() for check in checks] for arm, checks in self.checks.items()},
            "test_accuracies_without_as_many_at_random": self.at_random,
            "seconds": self.seconds,
        }


MGD, CANCELLING = "metagradient descent", "gradient cancelling"


def standard_error(x: Tensor) -> float:
    return float(x.std() / len(x) ** 0.5) if len(x) > 1 else float("nan")


def run(
    train: Images,
    test: Images,
    settings: Settings | None = None,
    reporter: Reporter | None = None,
    device: str = "cpu",
) -> Found:
    """Attack the training, judge freshly trained models, and look for the poison."""
    s, reporter = settings or Settings(), reporter or Reporter()
    needed = s.training + s.held_out + s.defender
    if len(train) < needed or len(test) < 1:
        raise BadArgument(
            f"expected at least {needed} images to train on, to hold out and to defend with, and one to test with; "
            f"{train.name} has {len(train)} and {len(test)}"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(s.seed))
    parts = order[:needed].split([s.training, s.held_out, s.defender])
    tested = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(s.seed))[: s.test]]
    (x, y), held_out, own, judged = (_floats(part, device) for part in (*(train[i] for i in parts), tested))
    classes = len(train.classes)
    for name, part in (("held-out", held_out), ("defender's", own), ("test", judged)):
        check_data(*part, classes, name)
    poisoned = chosen(len(x), s.share, s.seed).to(device)

    def training(network: str, objective: Any) -> Training:
        return Training(x, y, classes, objective, network=network, steps=s.steps, batch=s.batch)

    victim = training(s.network, lambda model: -wrong_probability(model(held_out[0]), held_out[1]))
    fresh, tuning = ([start + s.seed + i for i in range(s.fresh)] for start in (FRESH, TUNING))

    def accuracies(
        of: Training, images: Tensor | None, seeds: Any, on: Any = judged, weights: Tensor | None = None
    ) -> list[float]:
        return [of.accuracy(of.train(seed, images, weights), *on) for seed in seeds]

    test_on_the_way: list[float] = []
    way: dict[int, list[float]] = {}

    with (
        reporter.phase("descent", "metagradient descent on the pixels"),
        reporter.bar("meta-steps", s.meta_steps) as tick,
    ):

        def observe(step: MetaStep, result: Any, variables: Mapping[str, Tensor]) -> None:
            test_on_the_way.append(victim.accuracy(result.model_state, *judged))
            if step.step % s.watch == 0:
                pixels = with_pixels(x, poisoned, variables["pixels"])
                way[step.step] = accuracies(victim, pixels, fresh[:3])
            tick(f"held-out error {-step.value:.3f}")

        descent = descend(
            victim,
            poisoned,
            steps=s.meta_steps,
            step_size=s.step_size,
            seeds=s.seeds,
            low=s.low,
            high=s.high,
            observe=observe,
        )

    pixels = descent.variables["pixels"]
    way[s.meta_steps] = accuracies(victim, with_pixels(x, poisoned, pixels), fresh[:3])

    with reporter.phase("cancelling", "gradient cancelling, tuned"), reporter.bar("radii", len(s.radii)) as tick:

        def judge(candidate: Tensor) -> float:
            scores = accuracies(victim, with_pixels(x, poisoned, candidate), tuning[:4], held_out)
            return sum(scores) / len(scores)

        cancelled, by_radius = cancelling.tuned(
            victim.initial(0),
            victim.train(TUNING + s.seed),
            x,
            y,
            poisoned,
            held_out,
            judge,
            radii=s.radii,
            steps=s.cancelling_steps,
            low=s.low,
            high=s.high,
            tick=tick,
        )

    images = {"clean": x} | controls(x, y, poisoned, pixels, s.seed)
    images |= {CANCELLING: with_pixels(x, poisoned, cancelled.images), MGD: with_pixels(x, poisoned, pixels)}
    seen = {arm: pictures.cpu() for arm, pictures in images.items()}
    indices = y.cpu(), poisoned.cpu()
    found = Found(s, train.name, train.classes, *indices, seen, descent, test_on_the_way, way, cancelled, by_radius)
    judges = {
        "seen seeds": (victim, range(s.seeds)),
        "fresh seeds": (victim, fresh),
        **{name: (training(name, victim.function.objective), fresh[: s.fresh_others]) for name in s.others},
    }
    with (
        reporter.phase("judging", "training afresh on every set"),
        reporter.bar("sets", len(judges) * len(images)) as tick,
    ):
        for name, (trainer, seeds) in judges.items():
            found.accuracies[name] = {}
            for arm, pictures in images.items():
                found.accuracies[name][arm] = accuracies(trainer, pictures, seeds)
                tick(f"{name}: {arm}")

    with reporter.phase("checks", "looking for the poison"):
        defender = training(s.network, lambda model: F.cross_entropy(model(own[0]), own[1]))
        seeds = [DEFENDER + s.seed + i for i in range(s.check_seeds)]
        dropped = min(2 * len(poisoned), len(x) - 1)
        judging = fresh[: max(1, s.fresh // 2)]
        for arm in (CANCELLING, MGD):

            def judge_without(weights: Tensor, pictures: Tensor = images[arm]) -> list[float]:
                return accuracies(defender, pictures, judging, judged, weights)

            found.checks[arm] = examine(defender, images[arm], poisoned, judge_without, seeds=seeds, dropped=dropped)
        some = torch.randperm(len(x), generator=torch.Generator().manual_seed(s.seed + 1))[:dropped]
        weights = torch.ones(len(x)).index_fill(0, some, 0.0).to(device)
        found.at_random = accuracies(defender, images[MGD], judging, judged, weights)
    found.seconds = dict(reporter.seconds)
    return found


def _floats(images: Images, device: str) -> tuple[Tensor, Tensor]:
    return images.images.to(device).float() / 255, images.labels.to(device)
