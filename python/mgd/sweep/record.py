"""A sweep between two steps as a record of tensors and of values of JSON's types, by name, and a sweep from one.

Names of flat buffers, of which each rank has its range, begin as `checkpoint.SHARDED` says; every rank has all of the
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mgd.step.model import Buffers
from mgd.sweep.adjoint import Adjoint
from mgd_kernels import OptimizerState

Sweep = Any  # the class of that name imports this module


def of(sweep: Sweep) -> dict[str, Any]:
    """The record of a sweep. Called by every rank."""
    sweep.reads.settle()
    numbers = {name: getattr(sweep, name) for name in ("index", "visited", "reversed")}
    return {
        **numbers,
        "step": sweep.state.step,
        "first_read": sweep.meta.first_read,
        "written": sweep.step.loss.written,
        "trained": sweep.trained is not None,
        "objectives": len(sweep.adjoints),
        "losses": sweep.losses,
        "influence": sweep.step.influence.values,
        "skipped": sweep.updates.record(),
        **named_state(sweep.state, sweep.buffers),
        **_named_reverse(sweep),
        **({} if sweep.growth is None else {"growth": sweep.growth.whole()}),
    }


def restore(sweep: Sweep, state: dict[str, Any] | None, end: dict[str, Any] | None) -> None:
    """Continue a new sweep from the record of an earlier process, and from `end`, that of the training if it was
    reached; None: from the beginning."""
    if state is None:
        sweep.history.discard_after(0)
        return
    sweep.index, sweep.visited, sweep.reversed = state["index"], state["visited"], state["reversed"]
    sweep.tick("train", sweep.visited)
    sweep.meta.first_read.update(state["first_read"])
    sweep.step.loss.written.update(state["written"])
    sweep.losses.copy_(state["losses"])
    sweep.updates.restore(state["skipped"])
    sweep.step.influence.prepare(sweep.meta)
    sweep.step.influence.values.copy_(state["influence"])
    if end is not None:
        _restore_training(sweep, end, sweep.length)
        sweep.trained = sweep.result_of(sweep.state, sweep.buffers)
        sweep.tick("reverse", sweep.reversed)
    _restore_training(sweep, state, state["step"])
    if end is not None:
        zeros = [Adjoint.zeros(sweep.state, sweep.buffers) for _ in range(state["objectives"])]
        sweep.begin_reverse(state["value"].to(sweep.arena.device), zeros)
        for name, tensor in _named_reverse(sweep).items():
            tensor.copy_(state[name])
        assert sweep.growth is not None
        sweep.growth.load(state["growth"])
    else:
        sweep.history.discard_after(state["step"])


def _restore_training(sweep: Sweep, state: dict[str, Any], step: int) -> None:
    for name, tensor in named_state(sweep.state, sweep.buffers).items():
        if name.startswith("state."):
            tensor.copy_(state[name])
    sweep.state.step = step
    sweep.buffers = {name: state[f"buffers.{name}"].to(sweep.arena.device) for name in sweep.buffers}


def named_state(state: OptimizerState, buffers: Buffers) -> dict[str, Tensor]:
    """The tensors of a training state."""
    tensors = {f"state.{i}": x for i, x in enumerate(state.tensors())}
    return tensors | {f"buffers.{name}": b for name, b in buffers.items()}


def _named_reverse(sweep: Sweep) -> dict[str, Tensor]:
    """The objective's value, and the tensors that the reverse sweep changes in place."""
    gradients = sweep.gradients
    if gradients is None or sweep.value is None:
        return {}
    gradients.settle()
    flat = [x for adjoint in sweep.adjoints for x in adjoint.state.tensors()]
    whole: Sequence[Tensor] = [*(x for a in sweep.adjoints for x in a.buffers), gradients.hyper, *gradients.leaves]
    named = {f"adjoint.{i}": x for i, x in enumerate(flat)} | {f"reverse.{i}": x for i, x in enumerate(whole)}
    return {"value": sweep.value} | named
