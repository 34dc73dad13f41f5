"""The demonstration: which training images hurt, and what each step's learning rate did, by one exact metagradient.

A small convolutional network is trained on real images of which a fifth carries a wrong label. The metagradient of its
held-out loss says for every training image whether more weight on it would have helped; the wrong labels stand out.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.check import CheckResult, check
from mgd.errors import BadArgument
from mgd.function import Metagradient, TrainingFunction
from mgd.recipes.data import Images
from mgd.recipes.ranking import auc
from mgd.recipes.trainings import epochs, seeded, warm_up_cosine
from mgd.ui.console import Reporter
from mgd_kernels import AdamW

NOISE = 0.2  # share of the training labels that are replaced by another class
BATCH = 50
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05
EPS_ROOT = 1e-6  # smooths AdamW where gradients vanish; with 1e-8 the training is a harder one to differentiate


def network(images: Images) -> nn.Module:
    """Convolutions of stride 2 with GroupNorm and GELU, down to 4×4 pixels or fewer, and a linear layer: all smooth."""
    channels, side = images.images.shape[1], images.images.shape[2]
    layers: list[nn.Module] = []
    width, kernel = 8, 5
    while side > 4 or len(layers) < 6:
        layers += [nn.Conv2d(channels, width, kernel, 2, kernel // 2), nn.GroupNorm(4, width), nn.GELU()]
        channels, width, kernel, side = width, 16, 3, -(-side // 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, len(images.classes)))


def schedule(steps: int) -> Tensor:
    """The learning rate of every step, float32 `[steps]`."""
    return warm_up_cosine(steps, LEARNING_RATE).float()


@dataclass
class Problem:
    """A training set with wrong labels in it, held-out images for the objective, and test images that nothing looks at
    before the end. given: the labels that training sees. wrong: bool `[n]`, where they are not the true ones."""

    train: Images
    held_out: Images
    test: Images
    given: Tensor
    wrong: Tensor
    function: TrainingFunction
    z: dict[str, Tensor]

    @classmethod
    def make(cls, train: Images, test: Images, steps: int, seed: int, device: str = "cpu") -> Problem:
        if steps < 1:
            raise BadArgument(f"expected at least one training step; got {steps}")
        if len(train) < 4 * BATCH:
            raise BadArgument(f"expected at least {4 * BATCH} training images; {train.name} has {len(train)}")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(train), generator=generator)
        n = min(1000, len(train) * 2 // 3 // BATCH * BATCH)
        held_out, train = train[order[n : 2 * n]], train[order[:n]]
        test = test[torch.randperm(len(test), generator=generator)[:2000]]

        wrong = torch.zeros(n, dtype=torch.bool)
        wrong[torch.randperm(n, generator=generator)[: int(NOISE * n)]] = True
        classes = len(train.classes)
        shift = torch.randint(1, classes, (n,), generator=generator)
        given = torch.where(wrong, (train.labels + shift) % classes, train.labels)

        with seeded(seed):
            model = network(train).to(device)
        x, held_x, held_y = (t.to(device) for t in (train.floats(), held_out.floats(), held_out.labels))
        visits, seen = epochs(n, BATCH, steps, generator).to(device), given.to(device)

        def loss(model: nn.Module, batch: Any, z: Any) -> Tensor:
            x, y, _ = batch
            return (z["data_weights"] * F.cross_entropy(model(x), y, reduction="none")).mean()

        function = TrainingFunction(
            model,
            loss,
            [(x[i], seen[i], i) for i in visits],
            optimizer=AdamW(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, eps_root=EPS_ROOT),
            objective=lambda model: F.cross_entropy(model(held_x), held_y),
            per_example={"data_weights": lambda batch: batch[2]},
            seed=seed,
        )
        z = {
            "lr": schedule(steps).to(device),
            "weight_decay": torch.tensor(WEIGHT_DECAY, device=device),
            "data_weights": torch.ones(n, device=device),
        }
        return cls(train, held_out, test, given, wrong, function, z)

    def without(self, dropped: Tensor) -> dict[str, float]:
        """Loss and accuracy on the test images after a training in which these images have weight 0."""
        weights = self.z["data_weights"]
        weights = weights.index_fill(0, dropped.to(weights.device), 0.0)
        trained = self.function.train({**self.z, "data_weights": weights})
        with torch.no_grad():
            images = self.test.floats().to(weights.device)
            logits = torch.func.functional_call(self.function.model, trained.model_state, (images,)).cpu()
        right = logits.argmax(1) == self.test.labels
        return {"loss": float(F.cross_entropy(logits, self.test.labels)), "accuracy": float(right.double().mean())}


@dataclass
class Demo:
    """What one run found and what it cost. seconds, peak_memory: by phase; memory is the process's high-water mark in
    bytes at the end of the phase. retrained: which images were left out -> loss and accuracy on the test images."""

    problem: Problem
    result: Metagradient
    check: CheckResult
    training_seconds: float
    metagradient_seconds: float
    seconds: dict[str, float]
    peak_memory: dict[str, int]
    retrained: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def harm(self) -> Tensor:
        """`[n]`: the change in held-out loss per unit of weight on each training image; positive is harmful."""
        return self.result.grads["data_weights"].cpu()

    @property
    def ranking(self) -> Tensor:
        """Training images, the most harmful first."""
        return self.harm.argsort(descending=True)

    def precision(self, share: float) -> float:
        """The share of wrong labels among the most harmful `share` of the training images."""
        first = self.ranking[: max(1, round(share * len(self.harm)))]
        return float(self.problem.wrong[first].double().mean())

    @property
    def ratio(self) -> float:
        """Seconds of the metagradient (training included) in units of the plain training."""
        return self.metagradient_seconds / self.training_seconds

    def to_dict(self) -> dict[str, Any]:
        problem, result = self.problem, self.result
        return {
            "data": {
                "name": problem.train.name,
                "training_images": len(problem.train),
                "held_out_images": len(problem.held_out),
                "test_images": len(problem.test),
                "mislabelled": int(problem.wrong.sum()),
            },
            "parameters": sum(p.numel() for p in problem.function.model.parameters()),
            "steps": len(problem.function),
            "seed": problem.function.seed,
            "value": float(result.value),
            "gradient_norms": {key: float(g.norm()) for key, g in result.grads.items()},
            "gradients": {key: result.grads[key].tolist() for key in ("lr", "weight_decay")},
            "finite_difference_errors": {key: found.relative_error for key, found in self.check.keys.items()},
            "check": self.check.to_dict(),
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "metagradient_seconds": self.metagradient_seconds,
            "ratio_to_training": self.ratio,
            "peak_memory_bytes": self.peak_memory,
            "detection": {
                "base_rate": float(problem.wrong.double().mean()),
                "precision_at_5_percent": self.precision(0.05),
                "precision_at_10_percent": self.precision(0.10),
                "auc": auc(self.harm, problem.wrong),
            },
            "retrained": self.retrained,
            "report": result.report.to_dict(),
        }


def run(
    train: Images,
    test: Images,
    steps: int = 200,
    seed: int = 0,
    reporter: Reporter | None = None,
    device: str = "cpu",
) -> Demo:
    """Train, differentiate, check in float64, and train again without the images found harmful."""
    reporter = reporter or Reporter()
    progress = reporter.progress
    problem = Problem.make(train, test, steps, seed, device)
    f, z, n = problem.function, problem.z, len(problem.train)
    seconds: dict[str, float] = {}
    peak = {"start": _high_water()}

    def phase(name: str, words: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        with reporter.phase(name, words):
            value = work()
        seconds[name] = time.perf_counter() - start  # of the last phase of this name
        peak[name] = _high_water()
        return value

    f.replaced(batches=f.batches[:2]).metagradient({**z, "lr": z["lr"][:2]})  # the first calls of torch are slower
    phase("training", "training, without a gradient", lambda: f.train(z, progress=progress))
    result = phase("metagradient", "training, with its metagradient", lambda: f.metagradient(z, progress=progress))
    before = seconds["training"]
    phase("training", "training, without a gradient, for a second timing", lambda: f.train(z, progress=progress))
    found = phase(
        "check",
        "comparing with finite differences, in float64",
        lambda: check(f, z, metagradient=result, seed=seed, progress=progress),
    )
    demo = Demo(
        problem=problem,
        result=result,
        check=found,
        training_seconds=statistics.mean([before, seconds["training"]]),
        metagradient_seconds=seconds["metagradient"],
        seconds=seconds,
        peak_memory=peak,
    )

    def retrain() -> dict[str, dict[str, float]]:
        count = int(problem.wrong.sum())
        chance = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1))
        return {
            "all images": problem.without(chance[:0]),
            f"without {count} images at random": problem.without(chance[:count]),
            f"without the {count} most harmful": problem.without(demo.ranking[:count]),
            f"without the {count} mislabelled": problem.without(problem.wrong.nonzero()[:, 0]),
        }

    demo.retrained = phase("retraining", "training without the images that were found", retrain)
    return demo


def _high_water() -> int:
    """The most memory this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
