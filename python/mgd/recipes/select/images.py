"""Setting 1: images of which many have wrong labels, are copies of each other, or show nothing that is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.errors import BadArgument, BadData
from mgd.recipes.data import Images
from mgd.recipes.select import setting
from mgd.recipes.select.problem import SelectionProblem
from mgd.recipes.select.setting import State
from mgd.ui import charts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("clean", "wrong", "duplicate", "irrelevant")
WRONG, COPIES = 0.4, 20  # share of the labels that are wrong; how often a duplicated image comes
DUPLICATES, IRRELEVANT = 0.1, 0.2  # shares of the pool
# The class that an annotator who is not careful takes: T-shirt -> shirt, trouser -> dress, pullover -> coat, ...
FASHION = (6, 3, 4, 0, 2, 7, 0, 9, 5, 5)


@dataclass(frozen=True)
class Settings(setting.Settings):
    """pool, held_out: numbers of images. uniform: wrong labels are of any other class, not of a similar one."""

    pool: int = 5000
    held_out: int = 500
    uniform: bool = False
    width: int = 64

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


class ImageSetting(setting.Setting):
    """The training that all selections share: a network of one hidden layer, AdamW, a learning rate that falls."""

    name, title, examples, kinds = "images", "Which images to train on?", "images", KINDS
    settings: Settings

    def __init__(self, train: Images, test: Images, settings: Settings, device: str = "cpu"):
        self.data_pool, self.settings, self.device = make_pool(train, test, settings), settings, device
        self.kind, self.good = self.data_pool.kind, self.data_pool.good
        pixels = self.data_pool.held_out.images.float()
        self.mean, self.std = pixels.mean(), pixels.std()
        self.x, self.held_x, self.test_x = (
            self.inputs(i) for i in (self.data_pool.images, self.data_pool.held_out, self.data_pool.test)
        )
        self.labels, self.held_labels = (i.labels.to(device) for i in (self.data_pool.images, self.data_pool.held_out))

    @property
    def pool(self) -> tuple[Tensor, Tensor]:
        return self.x, self.labels

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        return self.held_x, self.held_labels

    def inputs(self, images: Images) -> Tensor:
        """float32 `[n, pixels]`, shifted and scaled by the held-out images, on the device."""
        return ((images.images.float() - self.mean) / self.std).flatten(1).to(self.device)

    def over(self, pool: Any) -> SelectionProblem:
        s, held = self.settings, self.held
        classes = len(self.data_pool.test.classes)
        return self.training(
            nn.Sequential(nn.Linear(pool[0].shape[1], s.width), nn.GELU(), nn.Linear(s.width, classes)),
            pool,
            lambda model, examples: F.cross_entropy(model(examples[0]), examples[1], reduction="none"),
            lambda model: F.cross_entropy(model(held[0]), held[1]),
            weight_decay=0.05,
        )

    def test(self, state: State) -> tuple[float, ...]:
        right = self.call(state, self.test_x).argmax(1).cpu() == self.data_pool.test.labels
        return (float(right.double().mean()),)

    def scores(self, state: State) -> Tensor:
        x, y = self.pool
        return F.cross_entropy(self.call(state, x), y, reduction="none").cpu()

    def lead(self) -> str:
        s, numbers = self.settings, self.numbers()
        other = "another" if s.uniform else "a similar"
        return (
            f"{self.data_pool.images.name}: a pool of {s.pool:,} images, of which {numbers['wrong']:,} have the label "
            f"of {other} class, {numbers['duplicate']:,} are copies of a few others and {numbers['irrelevant']:,} show "
            f"noise; {len(self.data_pool.held_out):,} held-out images; a network of one hidden layer."
        )

    def data(self) -> dict[str, Any]:
        return {
            "name": self.data_pool.images.name,
            "pool": self.numbers(),
            "true_labels_of_the_task": int(self.good.sum()),
            "held_out_images": len(self.data_pool.held_out),
            "test_images": len(self.data_pool.test),
        }

    def show(self, some: Tensor, title: str) -> tuple[Figure | None, list[list[str]]]:
        pool, irrelevant = self.data_pool, KINDS.index("irrelevant")
        classes = pool.images.classes
        given = [classes[label] for label in pool.images.labels[some].tolist()]
        true = [
            "noise" if kind == irrelevant else classes[label]
            for kind, label in zip(pool.kind[some].tolist(), pool.truth[some].tolist(), strict=True)
        ]
        return charts.gallery(title, pool.images.images[some], given, true), []
