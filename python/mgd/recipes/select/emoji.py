"""Setting 2: a contrastive image-text model, small: emoji and their names, of which many do not belong together."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.errors import BadArgument
from mgd.recipes.data.emoji import Captioned
from mgd.recipes.select import setting
from mgd.recipes.select.problem import SelectionProblem
from mgd.recipes.select.setting import State
from mgd.ui import charts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATCHED, MISMATCHED, EMPTY = 0, 1, 2
WRONG, UNINFORMATIVE = 0.4, 0.15  # shares of the pool
FEATURES, WIDTH, TEMPERATURE = 1024, 64, 0.4
GALLERY = 200  # pairs among which one is to be found


@dataclass(frozen=True)
class Settings(setting.Settings):
    """pool, held_out: numbers of pairs; test pairs: the next GALLERY, twice where there are enough."""

    pool: int = 1216
    held_out: int = 280
    steps: int = 120
    batch_size: int = 64
    learning_rate: float = 1e-3
    meta_steps: int = 40
    share: float = 0.1
    highest: int = 1
    budget: int | None = 608
    memory: float = 0.9

    def quick(self) -> Settings:
        return replace(self, pool=640, budget=320, steps=30, meta_steps=8, share=0.2, learning_rate=3e-3, repeats=2)


class TwoTowers(nn.Module):
    """Pictures `[B, 3, 32, 32]` and features of names `[B, FEATURES]` to their similarities `[B, B]` over a fixed
    temperature. As CLIP (Radford et al. 2021, arXiv 2103.00020), small."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=4),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, WIDTH),
        )
        self.name = nn.Sequential(nn.Linear(FEATURES, 128), nn.GELU(), nn.Linear(128, WIDTH))

    def forward(self, pictures: Tensor, names: Tensor) -> Tensor:
        # eps inside the root: the length of a vector has a derivative at zero, too.
        i, t = (
            x * (x.square().sum(1, keepdim=True) + 1e-6).rsqrt() for x in (self.picture(pictures), self.name(names))
        )
        return i @ t.T / TEMPERATURE


def contrastive(similarities: Tensor) -> Tensor:
    """InfoNCE of each pair, `[B]`: the mean of finding its name and finding its picture among those of the batch."""
    rows, columns = similarities.log_softmax(1).diagonal(), similarities.log_softmax(0).diagonal()
    return -(rows + columns) / 2


def features(names: Sequence[str]) -> Tensor:
    """Words and groups of three letters, hashed and counted, at length one: float32 `[n, FEATURES]`."""
    found = torch.zeros(len(names), FEATURES)
    for row, name in zip(found, names, strict=True):
        text = f" {name} "
        for part in [*name.split(), *(text[i : i + 3] for i in range(len(text) - 2))]:
            row[zlib.crc32(part.encode()) % FEATURES] += 1
    return F.normalize(found, dim=1)


class EmojiSetting(setting.Setting):
    """Pairs of pictures and names; WRONG of the pool have another's name, UNINFORMATIVE show noise or are called
    "emoji". Judged by how often a test pair's other half is among the 5 (or is the) most similar of GALLERY."""

    name, title, examples = "emoji", "Which pairs of pictures and names to train on?", "pairs"
    kinds = ("matched", "mismatched", "uninformative")
    measures = (f"R@5 of {GALLERY}", f"R@1 of {GALLERY}")
    filtered, truths = "highest CLIP score", "true pairs"
    settings: Settings

    def __init__(self, emoji: Captioned, settings: Settings, device: str = "cpu"):
        self.device = device
        n, held, test = settings.pool, settings.held_out, len(emoji) - settings.pool - settings.held_out
        if min(n, held) < settings.batch_size or test < GALLERY:
            raise BadArgument(
                f"expected a pool and held-out pairs of at least a batch ({settings.batch_size}) each, and at most "
                f"{len(emoji) - GALLERY} together, as {GALLERY} of the {len(emoji)} test; got {n} and {held}"
            )
        generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(len(emoji), generator=generator)
        self.settings, self.images, self.true = settings, emoji.images[order], [emoji.names[i] for i in order.tolist()]
        self.given = list(self.true)
        # The order is random: kinds may stand in any place, and a slice of candidates holds some of each.
        place = torch.randperm(n, generator=generator)
        wrong, empty = place.split([int(WRONG * n), n - int(WRONG * n)])
        empty = empty[: int(UNINFORMATIVE * n)]
        self.kind = torch.full((n,), MATCHED)
        self.kind[wrong], self.kind[empty] = MISMATCHED, EMPTY
        self.good = self.kind == MATCHED
        for i, other in zip(wrong.tolist(), wrong.roll(1).tolist(), strict=True):
            self.given[i] = self.true[other]
        noise, nameless = empty.chunk(2)
        self.noise = set(noise.tolist())
        self.images[noise] = torch.randint(0, 256, self.images[noise].shape, generator=generator).to(torch.uint8)
        for i in nameless.tolist():
            self.given[i] = "emoji"
        pixels = self.images[n : n + held].float()
        x = (self.images.float() - pixels.mean()) / pixels.std()
        y = features(self.given)
        end = n + held + test // GALLERY * GALLERY
        parts = (slice(0, n), slice(n, n + held), slice(n + held, end))
        self._pool, self._held, self._test = ((x[part].to(device), y[part].to(device)) for part in parts)

    @property
    def pool(self) -> tuple[Tensor, Tensor]:
        return self._pool

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        return self._held

    def over(self, pool: Any) -> SelectionProblem:
        return self.training(
            TwoTowers(),
            pool,
            lambda model, pairs: contrastive(model(*pairs)),
            lambda model: contrastive(model(*self._held)).mean(),
            weight_decay=0.1,
        )

    def test(self, state: State) -> tuple[float, ...]:
        ranks = []
        for x, y in zip(*(part.split(GALLERY) for part in self._test), strict=True):
            similar = self.call(state, x, y)
            for direction in (similar, similar.T):
                ranks.append((direction > direction.diagonal()[:, None]).sum(1))
        rank = torch.cat(ranks)
        return tuple(float((rank < k).double().mean()) for k in (5, 1))

    def scores(self, state: State) -> Tensor:
        parts = zip(*(part.split(256) for part in self._pool), strict=True)
        return -torch.cat([self.call(state, x, y).diagonal() for x, y in parts]).cpu()

    def lead(self) -> str:
        numbers = self.numbers()
        return (
            f"Emoji and their names: a pool of {self.settings.pool:,} pairs, of which {numbers['mismatched']:,} have "
            f"the name of another and {numbers['uninformative']:,} show noise or are called “emoji”; "
            f"{self.settings.held_out:,} held-out pairs; a network for pictures and one for names, trained together by "
            "the symmetric InfoNCE loss."
        )

    def data(self) -> dict[str, Any]:
        return {
            "name": "emoji-datasource-twitter",
            "pool": self.numbers(),
            "held_out_pairs": len(self._held[0]),
            "test_pairs": len(self._test[0]),
            "gallery": GALLERY,
        }

    def show(self, some: Tensor, title: str) -> tuple[Figure | None, list[list[str]]]:
        indices = some.tolist()
        given = [_short(self.given[i]) for i in indices]
        true = ["noise" if i in self.noise else _short(self.true[i]) for i in indices]
        return charts.gallery(title, self.images[some], given, true), []


def _short(name: str, length: int = 17) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
