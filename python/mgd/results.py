"""What a training and a metagradient return, and the report of what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mgd.util.text import format_bytes, format_seconds, table


@dataclass
class Trained:
    """The end of a training: parameters and buffers by name, and optimizer state, slot -> name -> tensor."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer_state: dict[str, Any]
    losses: Tensor

    @property
    def model_state(self) -> dict[str, Tensor]:
        """For `model.load_state_dict(..., strict=False)`."""
        return {**self.parameters, **self.buffers}


@dataclass
class Report:
    """What a metagradient did, and what it took; where a run was resumed, in this process.

    steps: T. objectives: k. seconds, counts: by kind of work. execution: how steps were evaluated (eager, traced,
    joint), and why a faster way was given up. backend: of the optimizer's kernels. plan: what was kept where (see
    `Plan.to_dict`). measured_seconds: of the plan's phases. kept_bytes: the most that joint graphs kept for second
    derivatives, where the plan left memory. store: what it moved and how fast (see `mgd_kernels.Store.stats`); None
    where everything stayed in memory.
    """

    steps: int
    objectives: int
    seconds: dict[str, float]
    counts: dict[str, int]
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
        facts = {
            "training": f"{self.steps:,} steps, {self.objectives} objective(s)",
            "second derivatives": self.execution,
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


@dataclass
class Metagradient:
    """value: `[]` or `[k]`. grads: the keys and shapes of z, `[k, ...]` for k objectives. model_state: the trained
    model's parameters and buffers. losses: float64 `[T]`, each step's. report: what it cost.
    optimizer_state: of the trained model, as in `Trained`, where the training was given that of its beginning."""

    value: Tensor
    grads: dict[str, Any]
    model_state: dict[str, Tensor]
    losses: Tensor
    report: Report
    optimizer_state: dict[str, Any] | None = None
