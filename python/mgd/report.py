"""What a metagradient cost, and how it was computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mgd.budget import format_bytes
from mgd.planner import format_seconds, table


@dataclass
class Report:
    """What a metagradient did, and what it took; where a run was resumed, in this process.

    steps: T. objectives: k. seconds, counts: by kind of work. hvp: the road the second derivatives took, and the
    operator that forced a fallback. execution: eager, traced or compiled, and why not traced where that was given up.
    backend: of the optimizer's kernels. plan: what was kept where (see Plan.to_dict). measured_seconds: of the plan's
    phases. kept_bytes: that joint graphs held at most for second derivatives, where the plan left memory.
    store: what it moved and how fast (see mgd_kernels.Store.stats), None where everything stayed in memory.
    """

    steps: int
    objectives: int
    seconds: dict[str, float]
    counts: dict[str, int]
    hvp: str
    hvp_fallback: str | None
    execution: str
    backend: str
    plan: dict[str, Any] = field(default_factory=dict)
    measured_seconds: dict[str, float] = field(default_factory=dict)
    store: dict[str, Any] | None = None
    kept_bytes: int = 0

    @property
    def predicted_seconds(self) -> dict[str, float]:
        """By phase: what the plan said of it, from the costs it was made with."""
        return {phase["name"]: phase["seconds"] for phase in self.plan.get("phases", ())}

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self)) | {"predicted_seconds": self.predicted_seconds}

    def __str__(self) -> str:
        road = self.hvp + (f" (no forward formula: {self.hvp_fallback})" if self.hvp_fallback else "")
        facts = {
            "training": f"{self.steps:,} steps, {self.objectives} objective(s)",
            "second derivatives": f"{road}, {self.execution}",
            "kernels": self.backend,
            "work": ", ".join(f"{count:,} {what}" for what, count in self.counts.items()),
            **({"kept for them": format_bytes(self.kept_bytes)} if self.kept_bytes else {}),
            **self._store_facts(),
        }
        width = max(map(len, facts))
        lines = [f"{name.ljust(width)}  {text}" for name, text in facts.items()]
        rows = [[name, format_seconds(seconds)] for name, seconds in self.seconds.items()]
        lines += ["", *table(["time by kind of work", "measured"], rows)]
        measured, predicted = self.measured_seconds, self.predicted_seconds
        rows = [
            [name, format_seconds(predicted[name]), format_seconds(measured.get(name, 0.0))]
            for name in predicted
            if predicted[name] or measured.get(name)
        ]
        return "\n".join(lines + (["", *table(["time by phase", "predicted", "measured"], rows)] if rows else []))

    def _store_facts(self) -> dict[str, str]:
        if self.store is None:
            return {}
        disk, ahead = self.store["disk"], self.store["read_ahead"]
        moved = [
            f"{format_bytes(self.store[way]['bytes'])} {done} at {format_bytes(self.store[way]['bandwidth'])}/s"
            for way, done in (("write", "written"), ("read", "read"))
        ]
        io = disk["io"] + (f" ({disk['why']})" if disk["why"] else "")
        return {
            "disk": f"{', '.join(moved)}, {io}; at most {format_bytes(disk['peak'])} of {format_bytes(disk['limit'])}",
            "read ahead": f"{ahead['hits']:,} chunks there when wanted, {ahead['drops']:,} dropped for want of room",
        }
