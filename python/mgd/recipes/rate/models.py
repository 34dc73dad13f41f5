"""The networks of the recipe, and plain trainings of them on passages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.recipes.models.gpt import GPT
from mgd.recipes.rate.data import VOCABULARY
from mgd.recipes.trainings import seeded

WARM_UP = 20  # steps
LN2 = 0.6931471805599453


class TextRater(nn.Module):
    """A score for each passage (`[n, length]` bytes to `[n]`): two convolutions over the bytes, the mean over places.
    All passages score 0 at first."""

    def __init__(self, width: int = 48, kernel: int = 5):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width // 2)
        self.layers = nn.Sequential(
            nn.Conv1d(width // 2, width, kernel), nn.GELU(), nn.Conv1d(width, width, 3), nn.GELU()
        )
        self.norm, self.score = nn.LayerNorm(width), nn.Linear(width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.layers(self.embedding(tokens).transpose(1, 2)).mean(2)
        return self.score(self.norm(features))[:, 0]


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean loss per byte of every passage, in nats: `[n, length]` to `[n]`."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokens: Tensor, chunk: int = 64) -> Tensor:
    """The loss of every passage in bits per byte, on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([losses(model, part.to(device)).cpu() for part in tokens.split(chunk)]) / LN2


@dataclass
class Curve:
    """The loss on given passages, in bits per byte, in the course of a training."""

    steps: list[int]
    losses: list[float]


@dataclass
class InnerTraining:
    """How the recipe's language models are made and trained: GPT of `context`, `layers` and `width`, on a device."""

    context: int
    layers: int
    width: int
    lr: float
    batch: int
    device: str = "cpu"

    def model(self) -> nn.Module:
        return GPT(VOCABULARY, self.context, self.layers, self.width, heads=4).to(self.device)

    def train(
        self,
        tokens: Tensor,
        steps: int,
        seed: int,
        judge: Tensor | None = None,
        every: int = 0,
        tick: Callable[[str], None] = lambda note: None,
    ) -> tuple[nn.Module, Curve]:
        """A fresh model trained on random batches of passages, at a learning rate that is constant after a warm-up; its
        curve on `judge`, at every `every` steps and at the end."""
        generator, tokens = torch.Generator().manual_seed(seed), tokens.to(self.device)
        with seeded(seed):
            model = self.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.01)
        curve = Curve([], [])
        for t in range(steps):
            optimizer.param_groups[0]["lr"] = self.lr * min(1.0, (t + 1) / WARM_UP)
            batch = tokens[torch.randint(len(tokens), (self.batch,), generator=generator).to(self.device)]
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if judge is not None and ((every and (t + 1) % every == 0) or t + 1 == steps):
                curve.steps.append(t + 1)
                curve.losses.append(float(bits_per_byte(model, judge).mean()))
            tick("")
        return model, curve
