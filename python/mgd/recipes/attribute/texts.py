"""Settings of text: `text`, a small GPT that continues bytes; `lora`, a pretrained encoder that tells domains apart;
`smollm2`, a pretrained language model that is fine-tuned whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgd.errors import BadArgument
from mgd.recipes.attribute.task import Task, Training
from mgd.recipes.data import text
from mgd.recipes.models import smollm2
from mgd.recipes.models.encoder import pretrained
from mgd.recipes.models.gpt import GPT
from mgd.recipes.trainings import seeded

CONTEXT, WIDTH, LAYERS = 48, 32, 2  # of the GPT
PREFERRED, ALWAYS_THERE = "shakespeare", "pydoc"
SNIPPET, TOKENS, DOMAINS = 60, 16, ("pydoc", "python", "c++")  # bytes and tokens of what the encoder reads
TEST = 100


def gpt_task(training: Training, queries: int, seed: int, domain: str | None = None, dropout: float = 0.0) -> Task:
    """Continuations of stretches of one text: Shakespeare where it is installed, else Python's documentation. dropout:
    its rate."""
    domain = domain or _english()
    stretches = _stretches(domain, CONTEXT + 1, training.examples + queries + TEST, seed)
    tokens = torch.stack([text.tokens(part) for part in stretches])
    with seeded(seed):
        model = GPT(vocabulary=128, context=CONTEXT, layers=LAYERS, width=WIDTH, heads=2, dropout=dropout)
    name = f"text ({domain})" + (f", dropout {dropout:g}" if dropout else "")
    x, y = tokens[:, :-1], tokens[:, 1:]
    return _task(name, domain, model, training, queries, x, y, stretches, seed, dropout=dropout)


def lora_task(training: Training, queries: int, seed: int) -> Task:
    """LoRA fine-tuning of all-MiniLM-L6-v2 to tell snippets of documentation, Python and C++ apart."""
    total = training.examples + queries + TEST
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(DOMAINS), (total,), generator=generator)
    pools = [iter(_stretches(domain, SNIPPET, total, seed)) for domain in DOMAINS]
    snippets = [next(pools[label]) for label in labels.tolist()]
    with seeded(seed):
        model, tokenize = pretrained(len(DOMAINS))
    tokens = torch.tensor([tokenize(part.decode(), TOKENS) for part in snippets])
    names = [DOMAINS[label] for label in labels.tolist()]
    return _task("LoRA", ", ".join(DOMAINS), model, training, queries, tokens, labels, snippets, seed, names)


def smollm2_task(training: Training, length: int, queries: int, seed: int, domain: str | None = None) -> Task:
    """Full fine-tuning of SmolLM2-135M in float32, on passages of `length` tokens of one text, its log on disk."""
    domain, test = domain or _english(), training.batch  # as many, since their logits are held at once, in float64
    model, tokenizer = smollm2.pretrained()
    total = training.examples + queries + test
    tokens = smollm2.passages(tokenizer, domain, total, length + 1, seed)
    words = [tokenizer.decode(passage).encode() for passage in tokens]
    x, y = tokens[:, :-1], tokens[:, 1:].contiguous()
    options = smollm2.within_memory(training.batch)
    return _task("SmolLM2-135M", domain, model, training, queries, x, y, words, seed, options=options)


def _english() -> str:
    return PREFERRED if text.installed()[PREFERRED] is None else ALWAYS_THERE


def _stretches(domain: str, length: int, count: int, seed: int) -> list[bytes]:
    """`count` stretches of a text, at random places that do not overlap."""
    whole = text.read(domain)
    places = len(whole) // length
    if places < count:
        raise BadArgument(f"expected at least {count * length:,} bytes of {domain}; there are {len(whole):,}")
    order = torch.randperm(places, generator=torch.Generator().manual_seed(seed))[:count]
    return [whole[i * length : (i + 1) * length] for i in order.tolist()]


def _task(
    name: str,
    data: str,
    model: torch.nn.Module,
    training: Training,
    queries: int,
    x: Tensor,
    y: Tensor,
    texts: Sequence[bytes],
    seed: int,
    names: Sequence[str] | None = None,
    options: dict[str, Any] | None = None,
    dropout: float = 0.0,
) -> Task:
    """The first examples are trained on, the next are the queries, the rest are for the accuracy."""
    n = training.examples
    train, query, rest = slice(0, n), slice(n, n + queries), slice(n + queries, None)
    words, labels = [part.decode() for part in texts], list(names or [""] * len(texts))
    return Task(
        name=name,
        data=data,
        model=model,
        training=training,
        x=x[train],
        y=y[train],
        query_x=x[query],
        query_y=y[query],
        test_x=x[rest],
        test_y=y[rest],
        labels=labels[train],
        query_labels=labels[query],
        texts=words[train],
        query_texts=words[query],
        seed=seed,
        dropout=dropout,
        options=options or {},
    )
