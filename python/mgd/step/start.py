"""What a training is before its first step, made of a training function and its metaparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mgd.ranks.shards import Shards
from mgd.step.arguments import origin
from mgd.step.evaluator import Evaluator
from mgd.step.initial_state import starting_state
from mgd.step.loss import BoundLoss
from mgd.step.metaparameters import Metaparameters
from mgd.step.model import Binding, Buffers
from mgd.step.step import StepFunction
from mgd_kernels import Arena, OptimizerState


@dataclass
class Start:
    """A training before its first step."""

    binding: Binding
    arena: Arena
    meta: Metaparameters
    state: OptimizerState
    buffers: Buffers
    step: StepFunction


def start_of(
    f: Any,
    z: Mapping[str, Any],
    anchor: Mapping[str, Any] | None,
    evaluator: Evaluator,
    shards: Callable[[Arena], Shards],
) -> Start:
    """The training of a `TrainingFunction` at `z`. anchor: what steps see that are not differentiated; None: z."""
    binding = Binding(f.model)
    arena = Arena(binding.parameters())
    first = origin(len(f), f.since)
    meta = Metaparameters(z, len(f), f.optimizer, arena, f.per_example, f.fixed, first)
    meta.anchor(anchor)
    initial = binding.parameters() | dict(meta.z.get("init", {}))
    state = starting_state(f.optimizer, arena, initial, f.optimizer_state)
    loss = BoundLoss(binding, f.loss, arena.device, autocast=f.autocast, seed=f.seed, steps_before=state.before)
    step = StepFunction(shards(arena), loss, f.batches, f.microbatches, evaluator)
    return Start(binding, arena, meta, state, binding.buffers(), step)
