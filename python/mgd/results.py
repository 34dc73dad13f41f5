"""What a training and a metagradient return, with the report of what a metagradient cost."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from mgd.errors import BadData
from mgd.util.tensor_file import read, write
from mgd.util.text import format_bytes, format_seconds, table


class _Saved:
    """What can be written to a file and read again."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a file in the safetensors format; `mgd.load` reads it."""
        write(path, {"kind": type(self).__name__, **vars(self)})


@dataclass(repr=False)
class Trained(_Saved):
    """A trained model.

    parameters, buffers: by name. optimizer_state: the step count as "step", the tensors as slot -> name -> tensor, and,
    where some steps had no gradient of a parameter, how many as "skipped" -> name -> int.
    losses: float64 `[T]`, one per step. share: None, or, where each process keeps its own (`gather=False`), which
    elements of a flat parameter are in `parameters` and `optimizer_state`, by its name: `(start, stop)`.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer_state: dict[str, Any]
    losses: Tensor
    share: dict[str, tuple[int, int]] | None = None

    @property
    def model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers together, for `model.load_state_dict(..., strict=False)`."""
        return {**self.parameters, **self.buffers}

    def __repr__(self) -> str:
        return f"Trained({_count(self.parameters)} parameters, {_losses(self.losses)})"


MEANING = {  # of the kinds of work in a report
    "training": "loss and gradient of each step, the first time",
    "replay": "loss and gradient of steps that are run again",
    "update": "the optimizer's steps",
    "rebuild": "states between snapshots, from logged gradients by the optimizer alone",
    "store": "snapshots and log: copies, writes, waiting for reads",
    "objective": "its value and its gradient",
    "optimizer vjp": "the adjoint through each optimizer step",
    "optimizer jvp": "tangents through each optimizer step",
    "hvp": "second derivatives of each step's loss in one direction",
    "capture": "the graph of a step is made, once for each shape",
}


@dataclass
class Report:
    """What a metagradient did and what it cost. For a resumed run, only what this process did.

    steps: T. objectives: k. seconds, counts: by kind of work. execution: how steps were evaluated (eager or captured),
    and why a faster way was not used. backend: that of the optimizer's kernels. plan: what was stored where (see
    `Plan.to_dict`); empty where all of it was in memory, as of short trainings of small models. measured_seconds: by
    phase of the plan. kept_bytes: the most memory that captured steps used for residuals of second derivatives, if the
    plan left room for them. adjoint_norms: float64 `[T]`, or `[k, T]` for k objectives: the norm of the objective's
    gradient with respect to the parameters after each step; NaN for steps that were not differentiated, None where
    there was no reverse sweep. Where it grows on the way back, so does the effect of any error or change
    (`mgd.errors.UnstableTraining`). store: bytes moved and bandwidths (see `mgd_kernels.Store.stats`); None if
    everything stayed in memory.
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
    adjoint_norms: Tensor | None = None

    @property
    def predicted_seconds(self) -> dict[str, float]:
        """The plan's prediction for each phase, from the costs it was made with."""
        return {phase["name"]: phase["seconds"] for phase in self.plan.get("phases", ())}

    def to_dict(self) -> dict[str, Any]:
        norms = None if self.adjoint_norms is None else _plain(self.adjoint_norms.tolist())
        return dict(vars(self)) | {"adjoint_norms": norms, "predicted_seconds": self.predicted_seconds}

    def __str__(self) -> str:
        facts = {
            "training": f"{_counted(self.steps, 'step')}, {_counted(self.objectives, 'objective')}",
            "second derivatives": self.execution,
            "kernels": self.backend,
            "work": ", ".join(f"{count:,} {what}" for what, count in self.counts.items()),
            **({"kept for them": format_bytes(self.kept_bytes)} if self.kept_bytes else {}),
            **({} if self.plan or self.adjoint_norms is None else {"states": "all in memory, so there is no plan"}),
            **({} if self.adjoint_norms is None else {"adjoint": _range(self.adjoint_norms)}),
            **self._store_facts(),
        }
        width = max(map(len, facts))
        lines = [f"{name.ljust(width)}  {text}" for name, text in facts.items()]
        rows = [[name, format_seconds(seconds)] for name, seconds in self.seconds.items()]
        lines += ["", *table(["time by kind of work", "measured"], rows)]
        for i, name in enumerate(self.seconds, len(lines) - len(rows)):
            lines[i] += f"   {MEANING[name]}" if name in MEANING else ""
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
        rates = [
            f"{format_bytes(self.store[way]['bytes'])} {done} at {format_bytes(self.store[way]['bandwidth'])}/s"
            for way, done in (("write", "written"), ("read", "read"))
        ]
        io = disk["io"] + (f" ({disk['why']})" if disk["why"] else "")
        return {
            "disk": f"{', '.join(rates)}, {io}; at most {format_bytes(disk['peak'])} of {format_bytes(disk['limit'])}",
            "read ahead": f"{ahead['hits']:,} chunks ready when needed, {ahead['drops']:,} dropped for lack of room",
        }


@dataclass(repr=False)
class Metagradient(_Saved):
    """The value of the objectives, their gradients with respect to z, and the trained model.

    value: `[]`, or `[k]` for k objectives. grads: the keys and shapes of z, with a first dimension `[k]` for k
    objectives. model_state: parameters and buffers of the trained model, by name. losses: float64 `[T]`, one per step.
    report: what it cost. optimizer_state: as in `Trained`; None unless the training function was given an
    `optimizer_state` to start from. share: as in `Trained`, and of `grads["init"]` too.
    """

    value: Tensor
    grads: dict[str, Any]
    model_state: dict[str, Tensor]
    losses: Tensor
    report: Report
    optimizer_state: dict[str, Any] | None = None
    share: dict[str, tuple[int, int]] | None = None

    def __repr__(self) -> str:
        keys = ", ".join(map(repr, self.grads))
        return f"Metagradient(value {_numbers(self.value)}, of {keys}; {_losses(self.losses)})"

    def __str__(self) -> str:
        """A table with a row for every tensor of the gradient."""
        head = ["gradient of", "shape", "norm", "mean", "least", "greatest"]
        rows = []
        for key, tree in self.grads.items():
            for path, g in tree_flatten_with_path(tree)[0]:
                numbers = [g.norm(), g.mean(), g.min(), g.max()] if g.numel() else []
                rows.append([key + keystr(path), str(list(g.shape)), *(f"{float(x):.4g}" for x in numbers)])
        return "\n".join([repr(self), "", *table(head, [row + [""] * (len(head) - len(row)) for row in rows])])


@dataclass(repr=False)
class Jvp(_Saved):
    """The value of the objectives, and their derivative along a direction of z.

    value: `[]`, or `[k]` for k objectives. tangent: of the value's shape. model_tangent: of the trained parameters, by
    name. With m directions, both have a first dimension `[m]`. trained: the trained model.
    """

    value: Tensor
    tangent: Tensor
    model_tangent: dict[str, Tensor]
    trained: Trained
    report: Report

    def __repr__(self) -> str:
        return f"Jvp(value {_numbers(self.value)}, tangent {_numbers(self.tangent)}; {_losses(self.trained.losses)})"


def load(path: str | os.PathLike[str]) -> Metagradient | Trained | Jvp:
    """What the `save` of a result wrote.

    Raises BadData for any other file.
    """
    values = read(path)
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    try:
        if kind == "Trained":
            return Trained(**values)
        if kind == "Jvp":
            return Jvp(**values | {"report": Report(**values["report"]), "trained": Trained(**values["trained"])})
        if kind == "Metagradient":
            return Metagradient(**values | {"report": Report(**values["report"])})
    except (KeyError, TypeError) as error:
        raise BadData(f"expected a result of this version of mgd in {os.fspath(path)}: {error}") from None
    raise BadData(f"expected a file that a result's save() wrote; got {os.fspath(path)}, which holds no result")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _numbers(tensor: Tensor) -> str:
    shown = ", ".join(f"{value:.6g}" for value in tensor.reshape(-1)[:4].tolist())
    return shown + (", ..." if tensor.numel() > 4 else "")


def _plain(norms: list[Any]) -> list[Any]:
    """In JSON's types, which have no NaN."""
    return [_plain(x) if isinstance(x, list) else None if x != x else x for x in norms]


def _range(norms: Tensor) -> str:
    known = norms[~norms.isnan()]
    return f"norms between {float(known.min()):.3g} and {float(known.max()):.3g}" if len(known) else "none"


def _count(tensors: dict[str, Tensor]) -> str:
    return f"{sum(tensor.numel() for tensor in tensors.values()):,}"


def _losses(losses: Tensor) -> str:
    steps = len(losses)
    return f"{steps:,} steps, loss {float(losses[0]):.4g} to {float(losses[-1]):.4g}" if steps else "no steps"


torch.serialization.add_safe_globals([Jvp, Metagradient, Report, Trained])  # torch.load: no code is run
