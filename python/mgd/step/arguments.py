"""What people hand to a training function, as it works with it; or what is wrong with it, said before any work."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mgd.errors import BadArgument
from mgd.plan.budget import Budget, Sizes
from mgd.plan.plan import plan
from mgd.ranks.shards import Shards
from mgd_kernels import Adam, Optimizer, OptimizerState

# What replaces gradients by those of several processes, or of one of them.
_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.fsdp", "torch.distributed._composable")


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise BadArgument(f"expected model to be a torch.nn.Module; got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"the module {name!r}" if name else "model"
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise BadArgument(f"expected plain modules; {where} is a {kind.__name__} of torch.jit, without Python code")
        if kind.__name__ == "OptimizedModule":  # its class is in a package that takes a second to load
            raise BadArgument(
                f"expected plain modules; {where} is wrapped by torch.compile: give the module inside (._orig_mod). "
                "Steps are captured where that pays, and compiled with compile=True"
            )
        wrapper = next((base.__name__ for base in kind.__mro__ if base.__module__.startswith(_WRAPPERS)), None)
        if wrapper:
            raise BadArgument(
                f"expected plain modules; {where} is a {wrapper}, whose gradients would be those of one process: give "
                "the bare module (.module, or the model before fully_shard), and process_group= for several processes"
            )
        if any(hasattr(p, "placements") for p in module.parameters(recurse=False)):
            raise BadArgument(f"expected plain tensors; {where} has parameters that are DTensors: give the bare module")
        if getattr(module, "sparse", False) is True and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise BadArgument(f"expected dense gradients; {where} is an embedding with sparse=True: set it to False")


def check_batches(batches: Any) -> None:
    if not (hasattr(batches, "__len__") and hasattr(batches, "__getitem__")):
        raise BadArgument(
            f"expected batches with len() and [t], each the same whenever it is read; got {type(batches).__name__}. "
            "mgd.batches makes them of a DataLoader or a dataset; a generator's, list(...) holds in memory"
        )
    if isinstance(batches, Tensor | Mapping | str):
        raise BadArgument(
            f"expected a sequence of batches, one per step; got one {type(batches).__name__}: "
            "mgd.batches cuts a dataset into batches"
        )
    if len(batches) < 1:
        raise BadArgument("expected at least one batch; len(batches) is the number of training steps")


def checked_optimizer(optimizer: Any, model: nn.Module) -> tuple[Optimizer, dict[str, Any] | None]:
    """The optimizer, and its state where it is one of torch that has made steps. Raises BadArgument for others."""
    if isinstance(optimizer, Optimizer):
        return optimizer, None
    if not isinstance(optimizer, torch.optim.Optimizer):
        got = type(optimizer).__name__
        raise BadArgument(
            f"expected an optimizer of mgd_kernels (SGD, AdamW, UpdateRule, ...) or torch.optim; got {got}"
        )
    from mgd_kernels.integrations.torch_optim import import_state, matching_optimizer, skipped_steps

    matching = matching_optimizer(optimizer, model)
    step, skipped = skipped_steps(optimizer, model)
    if not step:
        return matching, None
    state = import_state(optimizer, model, step=step)
    assert state.arena is not None
    slots = {name: dict(state.arena.views(slot)) for name, slot in zip(matching.slots, state.slots, strict=True)}
    return matching, {"step": step, **slots} | ({"skipped": skipped} if skipped else {})


def checked_dtype(dtype: Any) -> torch.dtype | None:
    """The dtype of autocast, also by its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if (found is not None and not isinstance(found, torch.dtype)) or (dtype is not None and found is None):
        raise BadArgument(f"expected autocast to be a dtype such as torch.bfloat16, or its name; got {dtype!r}")
    if found is not None and found not in (torch.bfloat16, torch.float16):
        raise BadArgument(f"expected autocast in torch.bfloat16 or torch.float16; got {found}")
    return found


def checked_budget(budget: Any, model: nn.Module) -> Budget:
    """A budget; a size alone is memory of the kind that the model is in."""
    if budget is None or isinstance(budget, Budget):
        return budget or Budget()
    if not isinstance(budget, str | int) or isinstance(budget, bool):
        raise BadArgument(f'expected budget to be a Budget or a size such as "4GB"; got {type(budget).__name__}')
    on_device = any(p.device.type != "cpu" for p in model.parameters())
    try:
        return Budget(device=budget) if on_device else Budget(host=budget)
    except ValueError as error:
        raise BadArgument(f"expected budget to be a Budget or a size: {error}") from None


def check_schedule(schedule: Any) -> None:
    if not isinstance(schedule, str):
        raise BadArgument(f"expected schedule to be a name such as 'auto'; got {type(schedule).__name__}")
    try:
        plan(1, Sizes(1, 1), schedule=schedule)
    except ValueError as error:
        raise BadArgument(str(error)) from None


def check_names(trace: Any, objective_mode: Any, schedule: Any) -> None:
    check_choice("trace", trace, (None, False, True, "joint"))
    check_choice("objective_mode", objective_mode, ("eval", "train"))
    check_schedule(schedule)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise BadArgument(f"expected {name} among {', '.join(map(repr, choices))}; got {value!r}")


def check_numbers(max_grad_norm: Any, microbatches: int, since: Any, steps: int) -> None:
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise BadArgument(f"expected max_grad_norm > 0; got {max_grad_norm}")
    if microbatches < 1:
        raise BadArgument(f"expected microbatches >= 1; got {microbatches}")
    if since is not None and (not isinstance(since, int) or isinstance(since, bool) or not 1 <= since <= steps):
        raise BadArgument(
            f"expected since between 1 and {steps}, the number of steps: how many of the last ones are differentiated; "
            f"got {since!r}"
        )


def checked_directions(dz: Any) -> list[Mapping[str, Any]]:
    """One direction in the space of z, or several."""
    directions: list[Any] = [dz] if isinstance(dz, Mapping) else list(dz) if isinstance(dz, list | tuple) else [None]
    for each in directions:
        if not isinstance(each, Mapping):
            raise BadArgument(
                f"expected dz to map names of z to tensors, or a list of such directions; got {type(dz).__name__}"
            )
    return directions


def origin(steps: int, since: int | None) -> int:
    """The first of so many steps that is differentiated."""
    return 0 if since is None else max(0, steps - since)


def warn_of_noise(optimizer: Optimizer, hypers: Tensor, shards: Shards, state: OptimizerState) -> None:
    """Warn where the derivative of a training may be noise. hypers: of all steps. state: near the end of it."""
    if halves := {str(dtype) for dtype in shards.arena.dtypes if dtype.itemsize < 4}:
        warnings.warn(
            f"the model computes in {', '.join(sorted(halves))}, whose rounding the metagradient enlarges. Keep the "
            "parameters in float32 and give autocast=, or look at mgd.check",
            RuntimeWarning,
            stacklevel=2,
        )
    if isinstance(optimizer, Adam) and not hypers[:, :, optimizer.column("eps_root")].any():
        second = shards.whole(state.slots[optimizer.slots.index("exp_avg_sq")])
        still = sum(int((v == 0).sum()) for v in shards.arena.slices(second))
        if still and state.step:
            warnings.warn(
                f"{still:,} parameters had gradients of exactly 0 under Adam without eps_root, where its update has no "
                "derivative; theirs counts as 0. A small eps_root, such as 1e-8, makes it smooth",
                RuntimeWarning,
                stacklevel=2,
            )
