"""What a metagradient cost, and how it was computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """steps: T. objectives: k. seconds, counts: by phase. hvp: the road the second derivatives took, and the operator that
    forced a fallback. execution: eager, traced or compiled, and why not traced where that was given up. backend: of the optimizer's kernels. plan: what was kept where (see Plan.to_dict)."""

    steps: int
    objectives: int
    seconds: dict[str, float]
    counts: dict[str, int]
    hvp: str
    hvp_fallback: str | None
    execution: str
    backend: str
    plan: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        road = self.hvp + (f" (no forward formula: {self.hvp_fallback})" if self.hvp_fallback else "")
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.seconds.items())
        counts = ", ".join(f"{count} {what}" for what, count in self.counts.items())
        return (
            f"{self.steps} steps, {self.objectives} objective(s), {sum(self.seconds.values()):.2f} s: {phases}\n"
            f"{counts}; second derivatives by {road}, {self.execution}; kernels: {self.backend}"
        )
