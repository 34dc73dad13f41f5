"""Plans: which states to save, which gradients to log, and where, so that the reverse sweep takes the least time.

`plan` searches the layouts of `mgd.plan.layout` under a budget. The `Plan` that it returns yields its actions lazily
and knows in advance what they add up to. docs/planning.md explains the model, the optimum and its limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import isfinite, isqrt
from typing import Any

from mgd.errors import BudgetTooSmall
from mgd.plan.actions import Action
from mgd.plan.advice import NOTHING, what_helps
from mgd.plan.budget import Budget, Costs, Sizes
from mgd.plan.layout import Layout, Phase
from mgd.plan.reversal import KAry, Revolve, Rule, kary, stack_height
from mgd.plan.search import Search
from mgd.util.text import format_bytes, format_seconds, table

SCHEDULES = ("auto", "log", "revolve", "kary", "sqrt", "binary", "all")


@dataclass(frozen=True, repr=False)
class Plan:
    """How one metagradient of T steps is computed. `actions()` says what to do; all else is known in advance.

    stop_at: the last step to be reversed. schedule: as it was given to `plan`. limits: bytes by tier, fastest first.
    directory: that of the disk tier.
    """

    T: int
    stop_at: int
    schedule: str
    sizes: Sizes
    costs: Costs
    limits: Mapping[str, int]
    directory: str | None
    layout: Layout = field(repr=False)

    def actions(self) -> Iterator[Action]:
        """A fresh iterator over the actions. Memory: one entry per snapshot held, whatever T is."""
        return self.layout.actions(self.stop_at)

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The first sweep, the replays of the model after it, and the reverse sweep."""
        return self.layout.phases(self.stop_at)

    @property
    def model_steps(self) -> int:
        """Training gradients that the model computes, including those of the first sweep; HVPs do not count."""
        return sum(phase.model for phase in self.phases)

    @property
    def update_steps(self) -> int:
        """The number of elementwise updates from logged gradients."""
        return sum(phase.update for phase in self.phases)

    @property
    def steps_kept(self) -> int:
        """The adjoint steps that use residuals which their own step left; `layout.kept` of them are held at a time."""
        return sum(phase.kept for phase in self.phases)

    @property
    def peak(self) -> dict[str, int]:
        """The most bytes of snapshots and logged gradients held at any time, by tier."""
        return dict(zip(self.limits, self.layout.peak, strict=True))

    @property
    def bytes_moved(self) -> dict[str, dict[str, int]]:
        """Bytes written to and read from each tier: {"host": {"written": ..., "read": ...}, ...}."""
        return {
            tier: {
                "written": sum(phase.written[i] for phase in self.phases),
                "read": sum(phase.read[i] for phase in self.phases),
            }
            for i, tier in enumerate(self.limits)
        }

    @property
    def predicted_seconds(self) -> float:
        """The sum over the phases, each as long as its computation or its slowest transfer."""
        return sum(phase.seconds(self.layout.tiers, self.costs) for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Everything above in JSON types; seconds and bytes."""
        layout, tiers = self.layout, self.layout.tiers

        def by_tier(values: Iterable[int]) -> dict[str, int]:
            return dict(zip(tiers, values, strict=True))

        return {
            "T": self.T,
            "stop_at": self.stop_at,
            "schedule": self.schedule,
            "sizes": asdict(self.sizes),
            "costs": {
                "step": self.costs.step,
                "hvp": self.costs.hvp,
                "hvp_kept": self.costs.hvp_kept,
                "update": self.costs.update,
                "write": dict(self.costs.write),
                "read": dict(self.costs.read),
                "overlap": list(self.costs.overlap),
                "copy": self.costs.copy if isfinite(self.costs.copy) else None,
            },
            "limits": dict(self.limits),
            "directory": self.directory,
            "segments": layout.segments,
            "segment_length": layout.length,
            "snapshots": by_tier(layout.outer.counts),
            "inner_snapshots": by_tier(layout.inner.counts),
            "logged_gradients": by_tier(layout.log),
            "residuals_held": layout.kept,
            "steps_with_residuals": self.steps_kept,
            "model_steps": self.model_steps,
            "update_steps": self.update_steps,
            "peak": self.peak,
            "bytes_moved": self.bytes_moved,
            "predicted_seconds": self.predicted_seconds,
            "phases": [
                {
                    "name": phase.name,
                    "model_steps": phase.model,
                    "update_steps": phase.update,
                    "adjoint_steps": phase.adjoint,
                    "with_residuals": phase.kept,
                    "written": by_tier(phase.written),
                    "read": by_tier(phase.read),
                    "seconds": phase.seconds(tiers, self.costs),
                    "limited_by": phase.limit(tiers, self.costs),
                }
                for phase in self.phases
            ],
        }

    def __repr__(self) -> str:
        held = ", ".join(f"{format_bytes(most)} of {tier}" for tier, most in self.peak.items())
        return f"Plan({self.T} steps, schedule {self.schedule!r}, {self.model_steps} model steps, {held})"

    def __str__(self) -> str:
        return self.explain()

    def explain(self) -> str:
        """The plan in words and tables; `print` of a plan shows the same."""
        return "\n".join([*self._words(), "", *self._work_table(), *self._memory_table(), *self._advice()])

    def _advice(self) -> list[str]:
        """What would make it faster, where it is slow because of its budget."""
        hvp = self.costs.hvp_kept if self.sizes.residuals else self.costs.hvp
        ideal = self.T * self.costs.step + (self.T - self.stop_at) * hvp
        if self.schedule != "auto" or self.predicted_seconds <= (1 + NOTHING) * ideal:
            return []
        search = Search(self.T - self.stop_at, self.sizes, self.limits, self.costs, self.stop_at)
        return ["", what_helps(search, self.predicted_seconds, lambda changed: _layout("auto", None, changed))]

    def _words(self) -> list[str]:
        layout, back = self.layout, self.T - self.stop_at
        again = self.model_steps - self.T
        lines = [
            f"{self.T:,} training steps, {back:,} of them reversed, schedule {self.schedule!r}:"
            f" one snapshot is {format_bytes(self.sizes.snapshot)},"
            f" one gradient {format_bytes(self.sizes.gradient)}."
        ]
        if back == 0:
            return [*lines, "There is nothing to reverse, and nothing to store."]
        if back == 1:
            lines.append("The step is reversed where the training ends, and nothing is stored.")
        elif layout.segments == 1:
            lines.append("The log holds all gradients that are needed, so the model runs each step once.")
        elif layout.length == 1:
            lines.append(f"No gradient is logged. {_count(layout.outer.total)} of states from which to run again.")
        else:
            lines.append(
                f"The chain of {back:,} steps is cut into {layout.segments:,} segments of"
                f" {layout.length:,} steps. Each in turn is logged ({layout.length - 1:,} gradients, "
                f"{(layout.length - 1) / back:.1%} of the training) and reversed. {_count(layout.outer.total)}"
                " of segment starts."
            )
        if layout.inner.total:
            lines.append(
                f"{_count(layout.inner.total)} inside a segment; {self.update_steps:,} elementwise updates"
                " rebuild the states between them."
            )
        if self.sizes.residuals:
            lines.append(self._residuals())
        lines.append(
            f"The model computes {self.model_steps:,} gradients, {again:,} more than training alone"
            f" ({self.model_steps / self.T:.3g} trainings), and {back:,} HVPs."
            f" Predicted time: {format_seconds(self.predicted_seconds)}."
        )
        return lines

    def _residuals(self) -> str:
        """How many steps keep residuals, and why not more."""
        kept, size, tier = self.layout.kept, self.sizes.residuals, self.sizes.memory
        saved = format_seconds(self.costs.hvp - self.costs.hvp_kept)
        text = f"{self.steps_kept:,} of {self.T - self.stop_at:,} HVPs use residuals that their step left ({saved} less"
        text += (
            f" each): {kept:,} steps keep {format_bytes(size)} at a time, {format_bytes(kept * size)} of {tier} memory."
        )
        if self.steps_kept == self.T - self.stop_at:
            return text
        room = self.limits.get(tier, 0)
        if room < size:
            return f"{text} There is no room for more."
        if self.schedule != "auto":
            return f"{text} That is what this schedule leaves."
        return f"{text} More would take memory from the log and the snapshots, where it saves more."

    def _work_table(self) -> list[str]:
        tiers = self.layout.tiers
        head = ["phase", "model steps", "updates", "adjoints"]
        head += [f"{tier} {way}" for tier in tiers for way in ("written", "read")] + ["predicted", "limited by"]
        rows = []
        for phase in self.phases:
            traffic = [format_bytes(x) for pair in zip(phase.written, phase.read, strict=True) for x in pair]
            counts = [f"{x:,}" for x in (phase.model, phase.update, phase.adjoint)]
            seconds = phase.seconds(tiers, self.costs)
            limit = phase.limit(tiers, self.costs) if seconds else ""
            rows.append([phase.name, *counts, *traffic, format_seconds(seconds), limit])
        return table(head, rows)

    def _memory_table(self) -> list[str]:
        layout = self.layout
        if not layout.tiers:
            return []
        head = ["tier", "budget", "snapshots", "inner snapshots", "logged gradients", "peak"]
        residuals = self.layout.kept * self.sizes.residuals
        columns = zip(layout.outer.counts, layout.inner.counts, layout.log, strict=True)
        rows = [
            [tier, format_bytes(limit), *(f"{x:,}" for x in held), format_bytes(self.peak[tier])]
            for (tier, limit), held in zip(self.limits.items(), columns, strict=True)
        ]
        if self.sizes.residuals:
            head.append("residuals")
            for row in rows:
                row.append(format_bytes(residuals if row[0] == self.sizes.memory else 0))
        return ["", *table(head, rows)]


def plan(
    T: int,
    sizes: Sizes,
    budget: Budget | None = None,
    costs: Costs | None = None,
    *,
    schedule: str = "auto",
    stop_at: int = 0,
    default_host_bytes: int | None = None,
) -> Plan:
    """Plan the metagradient of T training steps within `budget`.

    schedule: "auto" (least predicted time), or one kind alone: "log" (log every gradient), "revolve" (the binomial
    optimum without a log; Griewank & Walther 2000), "kary" or "kary:K" (REPLAY's tree, arXiv 2503.13751), "sqrt",
    "binary", or "all" (save every state).
    stop_at: the sweep ends with Reverse(stop_at); earlier steps are only trained.
    default_host_bytes: the host limit that `Budget()` stands for, a share of free memory; unlimited by default.

    Raises BudgetTooSmall, which names the least budget that works, and ValueError for arguments that make no sense.
    """
    budget, costs = budget or Budget(), costs or Costs()
    if T < 0 or not 0 <= stop_at <= T:
        raise ValueError(f"expected 0 <= stop_at <= T; got stop_at={stop_at}, T={T}")
    name, _, argument = schedule.partition(":")
    if name not in SCHEDULES or (argument and not (name == "kary" and argument.isdigit() and int(argument) > 1)):
        names = ", ".join(map(repr, SCHEDULES))
        raise ValueError(f"expected schedule {names} or 'kary:K' with K >= 2; got {schedule!r}")
    chain = T - stop_at
    limits = budget.limits(default_host_bytes)
    if not limits:  # Budget() without default_host_bytes: as much as any schedule could use
        limits = {"host": chain * (sizes.snapshot + sizes.gradient)}
    layout = _layout(name, int(argument) if argument else None, Search(chain, sizes, limits, costs, stop_at))
    return Plan(T, stop_at, schedule, sizes, costs, limits, budget.directory, layout)


def _layout(name: str, k: int | None, search: Search) -> Layout:
    """The layout of the schedule called `name`. Raises BudgetTooSmall if it does not fit."""
    chain, state = search.chain, search.sizes.snapshot
    slots = sum(room // state for room in search.limits.values())
    rule: Rule
    if chain <= 1:
        rule, least = Revolve(1), 0
    elif name == "log":
        full_log = search.best_log()
        if full_log is None:
            needs = (chain - 1) * search.sizes.gradient + state
            raise _too_small(search, needs, f"{chain - 1:,} gradients and a snapshot")
        return full_log
    elif name in ("auto", "revolve"):
        rule, least = Revolve(max(1, min(slots, chain - 1))), 1
    elif name == "all":
        rule, least = Revolve(chain - 1), chain - 1
    else:
        if name == "kary":
            rule = kary(chain, slots, k) or KAry(k or 2)
        else:
            rule = KAry(2 if name == "binary" else max(2, isqrt(chain - 1) + 1))
        least = stack_height(chain, rule)
    plain = Layout.fit(search.limits, search.sizes, chain, 1, rule, stack_height(max(1, chain), rule), 0)
    if plain is None:
        raise _too_small(search, least * state, "1 snapshot" if least == 1 else f"{least:,} snapshots")
    if name != "auto" or chain <= 1:
        return plain
    return search.best()


def _too_small(search: Search, needs: int, what: str) -> BudgetTooSmall:
    advice = (
        f"This schedule holds {what}, with {format_bytes(search.sizes.snapshot)} per snapshot, and splits none of them "
        "across tiers: raise device, host or disk of mgd.Budget."
    )
    return BudgetTooSmall(needs, dict(search.limits), advice)


def _count(snapshots: int) -> str:
    return f"{snapshots:,} snapshot{'s' * (snapshots != 1)}"
