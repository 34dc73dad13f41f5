"""Passages of several domains, some of them corrupted: what a rater of texts learns from and is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mgd.errors import BadArgument
from mgd.recipes.data import text

VOCABULARY = 128  # ASCII
NOISE = "noise"  # the domain of random bytes
PRINTABLE = torch.arange(32, 127)
CORRUPTIONS = ("shuffled", "dropped", "replaced")
LEVELS = (0.2, 0.5)  # the share of a passage's characters that is touched
PREFERRED = ("state-of-the-union", "moby-dick", "shakespeare", "c++", "python", NOISE)
ALWAYS = ("pydoc", "c++", "python", NOISE)

# Shares of a domain's text, from its beginning to its end.
PARTS = {"pool": (0.0, 0.7), "evaluation": (0.7, 0.8), "held out": (0.8, 0.9), "test": (0.9, 1.0)}


def available(domains: Sequence[str] | None) -> list[str]:
    """The domains, the target first: those asked for, or those of `PREFERRED` that are installed if its target is,
    else those that every Python with torch has."""
    if domains is None:
        missing = text.installed()
        domains = PREFERRED if missing[PREFERRED[0]] is None else ALWAYS
        return [name for name in domains if missing.get(name) is None]
    if len(set(domains)) < 2:
        raise BadArgument(f"expected at least two domains, or there is nothing to tell apart; got {list(domains)}")
    if domains[0] == NOISE:
        raise BadArgument("expected the target, the first domain, to be a text; got noise")
    return list(domains)


def passages(domain: str, part: str, n: int, length: int, generator: torch.Generator) -> Tensor:
    """`n` passages `[n, length]` of bytes, int64, from random places in a part of the domain's text."""
    if domain == NOISE:
        return torch.randint(VOCABULARY, (n, length), generator=generator)
    tokens = text.tokens(text.read(domain))
    low, high = PARTS[part]
    first, last = int(low * len(tokens)), int(high * len(tokens)) - length
    if last <= first:
        raise BadArgument(f"expected passages shorter than the {part} part of {domain}; got {length} bytes")
    start = torch.randint(first, last, (n,), generator=generator)
    return tokens[start[:, None] + torch.arange(length)]


def corrupted(clean: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Passages `[n, length]` made from `[n, >= 2 length]`, each with a random share within `LEVELS` of its characters
    permuted among themselves, left out (those that follow close the gaps), or replaced by random printable ones."""
    n, length = clean.shape[0], clean.shape[1] // 2
    share = torch.empty(n, 1).uniform_(*LEVELS, generator=generator)
    hit = torch.rand(clean.shape, generator=generator) < share
    if kind == "replaced":
        other = PRINTABLE[torch.randint(len(PRINTABLE), clean.shape, generator=generator)]
        return torch.where(hit, other, clean)[:, :length]
    if kind == "dropped":
        order = hit.int().argsort(dim=1, stable=True)  # what stays, in its order, comes first
        return clean.gather(1, order)[:, :length]
    if kind == "shuffled":
        result, hit = clean[:, :length].clone(), hit[:, :length]
        for row, mask in zip(result, hit, strict=True):
            places = mask.nonzero()[:, 0]
            row[places] = row[places[torch.randperm(len(places), generator=generator)]]
        return result
    raise BadArgument(f"expected one of {CORRUPTIONS}; got {kind!r}")


@dataclass
class Pool:
    """Passages with what they are. tokens: `[n, length]`. domain: int `[n]`. corruption: int `[n]`, 0 for none, else
    1 + its place in `CORRUPTIONS`."""

    domains: list[str]
    tokens: Tensor
    domain: Tensor
    corruption: Tensor

    @classmethod
    def make(cls, domains: list[str], part: str, each: int, length: int, share: float, seed: int) -> Pool:
        """`each` passages per domain, in random order, a share of which is corrupted (of noise, none)."""
        if each < 1:
            raise BadArgument(f"expected at least one passage per domain; got {each}")
        generator = torch.Generator().manual_seed(seed)
        tokens, kinds = [], []
        for name in domains:
            count = 0 if name == NOISE else round(share * each)
            bounds = [round(count * i / len(CORRUPTIONS)) for i in range(len(CORRUPTIONS) + 1)]
            parts = [passages(name, part, each - count, length, generator)]
            for kind, size in zip(CORRUPTIONS, [b - a for a, b in pairwise(bounds)], strict=True):
                parts.append(corrupted(passages(name, part, size, 2 * length, generator), kind, generator))
            tokens.append(torch.cat(parts))
            kinds.append(torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)]))
        order = torch.randperm(each * len(domains), generator=generator)
        domain = torch.arange(len(domains)).repeat_interleave(each)
        return cls(domains, torch.cat(tokens)[order], domain[order], torch.cat(kinds)[order])

    def __len__(self) -> int:
        return len(self.tokens)

    def where(self, domain: str, clean: bool | None = None) -> Tensor:
        """bool `[n]`: the passages of a domain; only the clean, or only the corrupted ones."""
        mask = self.domain == self.domains.index(domain)
        return mask if clean is None else mask & ((self.corruption == 0) == clean)

    def name(self, i: int) -> str:
        kind = int(self.corruption[i])
        name = self.domains[int(self.domain[i])]
        return name if kind == 0 else f"{name}, {CORRUPTIONS[kind - 1]}"


def readable(tokens: Tensor) -> str:
    """A passage on one line, with what cannot be printed as a dot."""
    shown = {9: " ", 10: "⏎", 13: ""}
    return "".join(shown.get(b, chr(b) if 32 <= b < 127 else "·") for b in tokens.tolist())
