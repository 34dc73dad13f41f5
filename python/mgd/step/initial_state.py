"""The training state before the first step: from nothing, or where another training ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mgd.errors import BadArgument
from mgd_kernels import Arena, Optimizer, OptimizerState


def starting_state(
    optimizer: Optimizer, arena: Arena, parameters: Mapping[str, Tensor], given: Mapping[str, Any] | None
) -> OptimizerState:
    """A copy of these parameters with the slots and the step count of `given`: `Trained.optimizer_state` of another
    training, `{"step": int, slot: {parameter: tensor}}`; slots that it lacks are zero.

    Raises BadArgument for a state of another optimizer or model.
    """
    state = optimizer.init(arena.flatten(parameters), arena)
    given = given or {}
    if unknown := sorted(set(given) - {"step", *optimizer.slots}):
        raise BadArgument(
            f"expected optimizer_state of {type(optimizer).__name__} to hold 'step' and {list(optimizer.slots)}; "
            f"got {unknown}: is it another optimizer's?"
        )
    step = given.get("step", 0)
    if not isinstance(step, int) or step < 0:
        raise BadArgument(f"expected optimizer_state['step'] to count steps; got {step!r}")
    if step and (missing := [slot for slot in optimizer.slots if slot not in given]):
        raise BadArgument(
            f"expected optimizer_state after {step} steps to hold {list(optimizer.slots)}; it lacks {missing}"
        )
    shapes = dict(zip(arena.names, arena.shapes, strict=True))
    for slot, flat in zip(optimizer.slots, state.slots, strict=True):
        if slot not in given:
            continue
        found = {name: getattr(tensor, "shape", None) for name, tensor in given[slot].items()}
        if found != shapes:
            odd = next(name for name in {**shapes, **found} if found.get(name) != shapes.get(name))
            raise BadArgument(
                f"expected optimizer_state[{slot!r}] to hold a tensor for every trained parameter, of its shape; "
                f"{odd!r} is {found.get(odd)}, expected {shapes.get(odd)}"
            )
        arena.copy_(flat, given[slot])
    state.before = step
    return state
