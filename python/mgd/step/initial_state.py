"""The training state before the first step: a fresh one, or the end of another training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mgd.errors import BadArgument
from mgd_kernels import Arena, Optimizer, OptimizerState


def starting_state(
    optimizer: Optimizer, arena: Arena, parameters: Mapping[str, Tensor], optimizer_state: Mapping[str, Any] | None
) -> OptimizerState:
    """A state with copies of these parameters, and with the slots and the step count of an earlier training.

    optimizer_state: `Trained.optimizer_state` of that training, `{"step": int, slot: {parameter: tensor}}`, with
    `"skipped": {parameter: int}` where steps had no gradient of some; None for a fresh start. Slots are zero if it
    lacks them and its step count is 0.

    Raises BadArgument for a state of another optimizer or model.
    """
    state = optimizer.init(arena.flatten(parameters), arena)
    source = optimizer_state or {}
    if unknown := sorted(set(source) - {"step", "skipped", *optimizer.slots}):
        raise BadArgument(
            f"expected optimizer_state of {type(optimizer).__name__} to hold 'step' and {list(optimizer.slots)}; "
            f"got {unknown}: is it another optimizer's?"
        )
    step = source.get("step", 0)
    if not isinstance(step, int) or step < 0:
        raise BadArgument(f"expected optimizer_state['step'] to count steps; got {step!r}")
    if step and (missing := [slot for slot in optimizer.slots if slot not in source]):
        raise BadArgument(
            f"expected optimizer_state after {step} steps to hold {list(optimizer.slots)}; it lacks {missing}"
        )
    for name, count in source.get("skipped", {}).items():
        if name not in arena.names or not isinstance(count, int) or not 0 <= count <= step:
            raise BadArgument(
                f"expected optimizer_state['skipped'] to count up to {step} steps for trained parameters; got "
                f"{count!r} for {name!r}"
            )
    shapes = dict(zip(arena.names, arena.shapes, strict=True))
    for slot, flat in zip(optimizer.slots, state.slots, strict=True):
        if slot not in source:
            continue
        actual = {name: getattr(tensor, "shape", None) for name, tensor in source[slot].items()}
        if actual != shapes:
            name = next(name for name in {**shapes, **actual} if actual.get(name) != shapes.get(name))
            raise BadArgument(
                f"expected optimizer_state[{slot!r}] to hold a tensor for every trained parameter, of its shape: "
                f"expected {shapes.get(name)} for {name!r}; got {actual.get(name)}"
            )
        arena.copy_(flat, source[slot])
    state.before = step
    return state
