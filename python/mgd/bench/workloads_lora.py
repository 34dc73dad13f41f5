"""(d) LoRA of rank 8 on the query and value projections of all-MiniLM-L6-v2, to tell Python, C++ and English apart.

The text is what a Python installation with torch holds: the standard library, torch's C++ headers, and pydoc's
English. Where the pretrained weights are not installed, random ones stand in for them: the time is the same.
"""

from __future__ import annotations

import torch

from mgd.bench.workload import Workload, build
from mgd.recipes.data.text import read
from mgd.recipes.models import encoder
from mgd_kernels import AdamW

CLASSES = ("python", "c++", "pydoc")


def snippets(count: int, characters: int = 240) -> list[tuple[str, int]]:
    """`count` pieces of text of each class with its number, the same on every call."""
    found = []
    for label, name in enumerate(CLASSES):
        text = read(name).decode("ascii")
        stride = max(characters, len(text) // count)
        found += [(text[i * stride : i * stride + characters], label) for i in range(count)]
    return found


def lora(steps: int = 24, seed: int = 0, size: int = 16, length: int = 32, count: int = 128) -> Workload:
    """Batches of `size` snippets of `length` tokens; `count` snippets of each class. AdamW."""
    torch.manual_seed(seed)
    model, tokenize = encoder.pretrained(len(CLASSES))
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
        if encoder.installed()
        else f"Random weights in place of all-MiniLM-L6-v2's, which change no time; for these: {encoder.INSTALL}"
    )
    return workload
