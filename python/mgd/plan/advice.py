"""What would make a plan faster: the same training planned with more memory, and with faster tiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mgd.plan.layout import Layout
from mgd.plan.search import Search
from mgd.util.text import format_bytes, format_seconds

#: A change that gains less than this share of the time is called none.
NOTHING = 0.01


def what_helps(search: Search, seconds: float, layout: Callable[[Search], Layout]) -> str:
    """What each change would bring, the best first. seconds: as planned. layout: plans a search."""
    after = {name: min(seconds, changed.seconds(layout(changed))) for name, changed in _changes(search)}
    names = sorted(after, key=after.__getitem__)
    helpful = [name for name in names if after[name] <= (1 - NOTHING) * seconds]
    if not helpful:
        return "Neither more memory on a tier nor a faster one would help."
    changes = [f"{name}: {format_seconds(seconds)} to {format_seconds(after[name])}" for name in helpful]
    changes += [f"{name}: no change" for name in names if name not in helpful]
    return f"What would help: {'; '.join(changes)}."


def _changes(search: Search) -> list[tuple[str, Search]]:
    """More memory on one tier, or a faster one."""
    changes = []
    for tier, room in search.limits.items():
        more = room // 2 or search.chain * search.sizes.gradient
        memory = "disk" if tier == "disk" else f"{tier} memory"
        limits = {**search.limits, tier: room + more}
        changes.append((f"{format_bytes(more)} more {memory}", replace(search, limits=limits)))
        write, read = ({**of, tier: 2 * of[tier]} for of in (search.costs.write, search.costs.read))
        costs = replace(search.costs, write=write, read=read)
        changes.append((f"{tier} transfers twice as fast", replace(search, costs=costs)))
    return changes
