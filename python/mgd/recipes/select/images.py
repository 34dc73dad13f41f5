"""Setting 1: images of which many have wrong labels, are copies of each other, or show nothing that is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.data import Images
from mgd.errors import BadArgument, BadData
from mgd.recipes.select.problem import SelectionProblem
from mgd_kernels import AdamW

KINDS = ("clean", "wrong", "duplicate", "irrelevant")
WRONG, COPIES = 0.4, 20  # share of the labels that are wrong; how often a duplicated image comes
DUPLICATES, IRRELEVANT = 0.1, 0.2  # shares of the pool
# The class that an annotator who is not careful takes: T-shirt -> shirt, trouser -> dress, pullover -> coat, ...
FASHION = (6, 3, 4, 0, 2, 7, 0, 9, 5, 5)


@dataclass(frozen=True)
class Settings:
    """pool, held_out: numbers of images. uniform: wrong labels are of any other class, not of a similar one. budget,
    shard, share, highest: of `select`. repeats: trainings a figure."""

    pool: int = 5000
    held_out: int = 500
    uniform: bool = False
    steps: int = 400
    batch_size: int = 100
    at: float = 0.8
    learning_rate: float = 1e-3
    width: int = 64
    meta_steps: int = 60
    share: float = 0.05
    highest: int = 2
    budget: int | None = None
    shard: int | None = None
    repeats: int = 5
    seed: int = 0

    def quick(self) -> Settings:
        return replace(
            self, pool=900, held_out=200, steps=150, batch_size=50, meta_steps=25, share=0.12, width=32, repeats=3
        )


@dataclass
class Pool:
    """images: the pool, with the labels that training sees. truth: int64 `[n]`, what they show. kind: int64 `[n]`,
    index into KINDS. good: bool `[n]`, where a true label stands at an image of the task (copies among them)."""

    images: Images
    truth: Tensor
    kind: Tensor
    held_out: Images
    test: Images

    @property
    def good(self) -> Tensor:
        return (self.kind != KINDS.index("irrelevant")) & (self.images.labels == self.truth)


def make_pool(train: Images, test: Images, settings: Settings) -> Pool:
    """The pool: images of the task, of which WRONG have another label; copies of a few of them, their
    labels as they are; and noise and images with shuffled pixels, under labels at random."""
    n, classes = settings.pool, len(train.classes)
    if len(train) == 0 or len(test) == 0:
        raise BadData(f"{train.name} is empty: expected training and test images")
    if len(train.labels.unique()) < 2:
        raise BadData(f"all images of {train.name} are of one class: there is nothing to select for")
    if n + settings.held_out > len(train) or min(n, settings.held_out) < 10 * COPIES:
        raise BadArgument(
            f"expected a pool and held-out images of {10 * COPIES} or more each, {len(train)} together at most (those "
            f"of {train.name}); got {n} and {settings.held_out}"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(train), generator=generator)
    held_out, base = train[order[n : n + settings.held_out]], train[order[:n]]
    images, truth = base.images.clone(), base.labels.clone()
    kind = torch.zeros(n, dtype=torch.int64)
    copies, noise = int(DUPLICATES * n) // COPIES * COPIES, int(IRRELEVANT * n)
    ordinary = n - copies - noise

    wrong = torch.rand(ordinary, generator=generator) < WRONG
    similar = torch.tensor(FASHION if train.name == "Fashion-MNIST" else [(c + 1) % classes for c in range(classes)])
    given = truth.clone()
    other = similar[truth[:ordinary]]
    if settings.uniform:
        other = (truth[:ordinary] + torch.randint(1, classes, (ordinary,), generator=generator)) % classes
    given[:ordinary] = torch.where(wrong, other, truth[:ordinary])
    kind[:ordinary][wrong] = KINDS.index("wrong")

    copied = slice(ordinary, ordinary + copies)
    source = torch.arange(copies // COPIES).repeat_interleave(COPIES)
    images[copied], truth[copied], given[copied] = images[source], truth[source], given[source]
    kind[copied] = KINDS.index("duplicate")

    rest = torch.arange(ordinary + copies, n)
    kind[rest] = KINDS.index("irrelevant")
    given[rest] = torch.randint(0, classes, (noise,), generator=generator)
    random, shuffled = rest.chunk(2)
    images[random] = torch.randint(0, 256, images[random].shape, generator=generator).to(torch.uint8)
    pixels = torch.randperm(images[0].numel(), generator=generator)
    images[shuffled] = images[shuffled].flatten(1)[:, pixels].reshape(images[shuffled].shape)
    return Pool(Images(train.name, images, given, train.classes), truth, kind, held_out, test)


class Classifier:
    """The training that all selections share: a network of one hidden layer, AdamW, a learning rate that falls."""

    def __init__(self, pool: Pool, settings: Settings):
        pixels = pool.held_out.images.float()
        self.mean, self.std, self.settings = pixels.mean(), pixels.std(), settings
        self.classes = len(pool.test.classes)
        self.x, self.y = self.inputs(pool.images), pool.images.labels
        self.held_x, self.held_y = self.inputs(pool.held_out), pool.held_out.labels
        self.test_x, self.test_y = self.inputs(pool.test), pool.test.labels

    def inputs(self, images: Images) -> Tensor:
        """float32 `[n, pixels]`, shifted and scaled by the held-out images."""
        return ((images.images.float() - self.mean) / self.std).flatten(1)

    def problem(self, x: Tensor, y: Tensor) -> SelectionProblem:
        """The training on a pool of inputs `[n, pixels]` and labels `[n]`, judged by the held-out loss."""
        s = self.settings
        t = torch.arange(s.steps, dtype=torch.float64)
        rate = torch.minimum((t + 1) / max(1.0, 0.1 * s.steps), 0.5 * (1 + torch.cos(torch.pi * t / s.steps)))
        return SelectionProblem(
            nn.Sequential(nn.Linear(x.shape[1], s.width), nn.GELU(), nn.Linear(s.width, self.classes)),
            (x, y),
            lambda model, examples: F.cross_entropy(model(examples[0]), examples[1], reduction="none"),
            lambda model: F.cross_entropy(model(self.held_x), self.held_y),
            AdamW(lr=s.learning_rate, weight_decay=0.05, eps_root=1e-6),
            s.steps,
            s.batch_size,
            at=int(s.at * s.steps),
            initialise=_initialise,
            fixed={"lr": s.learning_rate * rate},
        )

    def logits(self, state: dict[str, Tensor], model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.func.functional_call(model, state, (x,))

    def test_accuracy(self, state: dict[str, Tensor], model: nn.Module) -> float:
        return float((self.logits(state, model, self.test_x).argmax(1) == self.test_y).double().mean())

    def held_out_loss(self, problem: SelectionProblem, counts: Tensor, seed: int) -> float:
        problem.prepare(counts, seed)
        return float(problem.function.value())

    def losses(self, problem: SelectionProblem, seed: int) -> Tensor:
        """`[n]`: of the pool's examples, under a model trained on all examples of a problem."""
        state = problem.train(torch.ones(len(problem)), seed).model_state
        return F.cross_entropy(self.logits(state, problem.model, self.x), self.y, reduction="none")


def _initialise(model: nn.Module, seed: int) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()


def by_kind(pool: Pool, counts: Tensor) -> dict[str, Any]:
    """kind -> how many of its examples have which count, up to the highest: `{"clean": [dropped, once, twice]}`."""
    top = int(counts.max()) + 1
    return {name: torch.bincount(counts[pool.kind == i].long(), minlength=top).tolist() for i, name in enumerate(KINDS)}
