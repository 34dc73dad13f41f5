"""Setting 3: LoRA of a pretrained encoder, on texts of which many carry a wrong label or belong to another task."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.errors import BadArgument
from mgd.recipes.data.text import read
from mgd.recipes.models import encoder
from mgd.recipes.select import setting
from mgd.recipes.select.problem import SelectionProblem
from mgd.recipes.select.setting import State
from mgd.recipes.trainings import seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = ("state-of-the-union", "moby-dick", "shakespeare")
OTHERS = ("python", "c++")
WRONG, OTHER = 0.4, 0.2  # shares of the pool
CHARACTERS, CHUNK = 160, 64


@dataclass(frozen=True)
class Settings(setting.Settings):
    """pool, held_out, test: numbers of passages. layers: how many of the encoder's last layers LoRA trains. tokens:
    of a passage."""

    pool: int = 480
    held_out: int = 96
    test: int = 300
    layers: int = 1
    tokens: int = 32
    steps: int = 24
    batch_size: int = 16
    learning_rate: float = 1e-2
    meta_steps: int = 20
    share: float = 0.3
    highest: int = 1
    shard: int | None = 160
    repeats: int = 3

    def quick(self) -> Settings:
        changes = {"pool": 96, "held_out": 32, "test": 90, "tokens": 16, "steps": 16, "batch_size": 8, "meta_steps": 3}
        return replace(self, **changes, share=0.5, shard=None, repeats=1)


class Upper(nn.Module):
    """The last layers of an encoder, as LoRA trains them, and its head. What lies below is frozen: its outputs are
    computed once, and the training is that of the whole encoder."""

    def __init__(self, whole: encoder.Encoder, layers: int):
        super().__init__()
        self.layers, self.head = whole.layers[len(whole.layers) - layers :], whole.head

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """Hidden states `[B, T, WIDTH]`, and where a token is, bool `[B, T]`, to logits `[B, classes]`."""
        for layer in self.layers:
            x = layer(x, there[:, None, None, :])
        return self.head(encoder.mean_of(x, there))


class LoraSetting(setting.Setting):
    """Passages of three texts, to be told apart. WRONG of the pool carry the label of the next class; OTHER are
    programs, under any label."""

    name, title, examples = "lora", "Which passages to fine-tune on?", "passages"
    kinds = ("clean", "wrong", "program")
    sizes = (0.4, 0.6)
    settings: Settings

    def __init__(self, settings: Settings, device: str = "cpu"):
        s = self.settings = settings
        self.device = device
        if not 1 <= s.layers <= encoder.LAYERS:
            raise BadArgument(f"expected 1..{encoder.LAYERS} layers; got {s.layers}")
        if min(s.pool, s.held_out) < s.batch_size or s.test < len(CLASSES):
            raise BadArgument(f"expected a pool and held-out passages of at least a batch ({s.batch_size}) each")
        generator = torch.Generator().manual_seed(s.seed)
        # The order is random: kinds may stand in any place.
        self.kind = torch.zeros(s.pool, dtype=torch.int64)
        place = torch.randperm(s.pool, generator=generator)
        programs, wrong = int(OTHER * s.pool), int(WRONG * s.pool)
        self.kind[place[:programs]], self.kind[place[programs : programs + wrong]] = 2, 1
        self.good = self.kind == 0
        total = s.pool + s.held_out + s.test
        self.truth = torch.randint(0, len(CLASSES), (total,), generator=generator)
        program = torch.zeros(total, dtype=torch.bool)
        program[: s.pool] = self.kind == 2
        self.source = torch.where(program, len(CLASSES) + self.truth % len(OTHERS), self.truth)
        given = self.truth.clone()
        given[: s.pool] = torch.where(self.kind == 1, (given[: s.pool] + 1) % len(CLASSES), given[: s.pool])
        self.labels = given
        self.texts = passages(self.source, generator)
        with seeded(s.seed):
            self.whole, tokenize = encoder.pretrained(len(CLASSES))
        self.whole = self.whole.to(device)
        tokens = torch.tensor([tokenize(text, s.tokens) for text in self.texts]).to(device)
        hidden = torch.cat([self._below(part) for part in tokens.split(CHUNK)])
        parts = (slice(0, s.pool), slice(s.pool, s.pool + s.held_out), slice(s.pool + s.held_out, total))
        self._pool, self._held, self._test = ((hidden[p], tokens[p] != 0, self.labels[p].to(device)) for p in parts)

    def _below(self, tokens: Tensor) -> Tensor:
        """What the layers that stay as they are make of tokens `[B, T]`."""
        with torch.no_grad():
            x = self.whole.embed(tokens)
            for layer in list(self.whole.layers)[: encoder.LAYERS - self.settings.layers]:
                x = layer(x, (tokens != 0)[:, None, None, :])
        return x

    @property
    def pool(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._pool

    @property
    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._held

    def over(self, pool: Any) -> SelectionProblem:
        s = self.settings
        return self.training(
            Upper(self.whole, s.layers),
            pool,
            lambda model, e: F.cross_entropy(model(e[0], e[1]), e[2], reduction="none"),
            lambda model: F.cross_entropy(model(*self._held[:2]), self._held[2]),
            weight_decay=0.01,
            reset=_reset,
        )

    def _logits(self, state: State, examples: tuple[Tensor, ...]) -> Tensor:
        hidden, there = examples[0].split(CHUNK), examples[1].split(CHUNK)
        return torch.cat([self.call(state, *part) for part in zip(hidden, there, strict=True)])

    def test(self, state: State) -> tuple[float, ...]:
        return (float((self._logits(state, self._test).argmax(1) == self._test[2]).double().mean()),)

    def scores(self, state: State) -> Tensor:
        return F.cross_entropy(self._logits(state, self._pool), self._pool[2], reduction="none").cpu()

    def lead(self) -> str:
        s, numbers = self.settings, self.numbers()
        weights = "all-MiniLM-L6-v2" if encoder.installed() else "An encoder of random weights (none are installed)"
        return (
            f"{weights}, LoRA in the last {s.layers} of its {encoder.LAYERS} layers, to tell passages of {s.tokens} "
            f"tokens of {', '.join(CLASSES)} apart: a pool of {s.pool:,} passages, of which "
            f"{numbers['wrong']:,} have a wrong label and {numbers['program']:,} are programs under "
            f"any label; {s.held_out:,} held-out passages."
        )

    def data(self) -> dict[str, Any]:
        return {
            "name": "passages",
            "classes": CLASSES,
            "encoder": "all-MiniLM-L6-v2" if encoder.installed() else "random weights",
            "pool": self.numbers(),
            "held_out_passages": len(self._held[0]),
            "test_passages": len(self._test[0]),
        }

    def show(self, some: Tensor, title: str) -> tuple[Figure | None, list[list[str]]]:
        sources = CLASSES + OTHERS
        rows = [["passage", "label in the pool", "is from"]]
        for i in some.tolist():
            rows.append([self.texts[i][:70] + "…", CLASSES[int(self.labels[i])], sources[int(self.source[i])]])
        return None, rows


def passages(source: Tensor, generator: torch.Generator) -> list[str]:
    """A passage of CHARACTERS for each entry of `source`, an index into CLASSES + OTHERS; no two overlap."""
    texts = {}
    for i, name in enumerate(CLASSES + OTHERS):
        # Without the marks of Markdown, which would give the plays away.
        text = " ".join(re.sub(r"[*#_]", "", read(name).decode("ascii")).split())
        needed, there = int((source == i).sum()), len(text) // CHARACTERS
        if needed > there:
            raise BadArgument(f"expected at most {there} passages of {name}; got {needed}")
        starts = torch.randperm(there, generator=generator)[:needed] * CHARACTERS
        texts[i] = iter([text[start : start + CHARACTERS] for start in starts.tolist()])
    return [next(texts[i]) for i in source.tolist()]


def _reset(model: nn.Module) -> None:
    assert isinstance(model, Upper)
    model.head.reset_parameters()
    for part in model.modules():
        if isinstance(part, encoder.LoRA):
            part.down.data.normal_(std=1 / math.sqrt(part.down.shape[1]))
            part.up.data.zero_()
