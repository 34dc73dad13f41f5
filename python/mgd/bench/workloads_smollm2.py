"""(e) Full fine-tuning of SmolLM2-135M in float32 on English, 4 × 256 tokens a step, its log on disk.

Where the weights are not installed, random ones of the same shapes and random tokens stand in for them: the time is the
same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgd.bench.workload import Workload, build
from mgd.recipes.models import smollm2 as model_of
from mgd_kernels import AdamW

BATCH, LENGTH, DOMAIN = 4, 256, "pydoc"


def smollm2(steps: int = 16, seed: int = 0, size: int = BATCH, length: int = LENGTH) -> Workload:
    """Batches of `size` passages of `length` tokens. AdamW."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    examples = 16 * size
    if model_of.installed():
        model, tokenizer = model_of.pretrained()
        tokens = model_of.passages(tokenizer, DOMAIN, examples, length + 1, seed)
        note = "The weights of SmolLM2-135M, English text."
    else:
        model = model_of.untrained()
        tokens = _random(examples, length + 1, g)
        note = "Random weights and tokens in place of SmolLM2-135M's, which change no time; for these: make data"
    # A rate for fine-tuning, and an eps_root at the size of a typical squared gradient: smooth from the first step on.
    optimizer = AdamW(lr=1e-4, eps_root=1e-8, weight_decay=0.01)
    workload = build("smollm2", model, tokens[:, :-1], tokens[:, 1:].contiguous(), size, steps, optimizer, g)
    workload.note, workload.options = note, model_of.within_memory(size)
    return workload


def _random(count: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(model_of.SHAPE["vocab_size"], (count, length), generator=generator)
