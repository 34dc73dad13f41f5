"""Training states of `torch.optim.SGD`, `Adam` and `AdamW`, to and fro: a checkpoint may start or end a training here.

    optimizer = matching_optimizer(torch_optimizer, model)    # the same rule and parameter groups
    state = import_state(torch_optimizer, model)              # parameters, slots, step
    ...                                                       # optimizer.step_(state, ...), any number of times
    model.load_state_dict(state.arena.views(state.params), strict=False)
    torch_optimizer.load_state_dict(export_state(state, torch_optimizer, model))

What goes over and comes back unchanged is equal bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mgd_kernels.arena import Arena
from mgd_kernels.errors import BadArgument
from mgd_kernels.fused import SGD, Adam, AdamW
from mgd_kernels.optimizer import Optimizer, OptimizerState

__all__ = ["export_state", "import_state", "matching_optimizer", "skipped_steps"]

_UNSUPPORTED = {
    "amsgrad": "its maximum of second moments is no part of the rule",
    "maximize": "negate the loss instead",
    "capturable": "its step count lives on the device; construct the optimizer with capturable=False",
    "differentiable": "a metagradient needs no graph of torch; construct the optimizer with differentiable=False",
}


def matching_optimizer(
    torch_optimizer: torch.optim.Optimizer, model: nn.Module, arena: Arena | None = None, *, eps_root: float = 0.0
) -> Optimizer:
    """The optimizer of this package with the rule, the hyperparameters and the parameter groups of a torch optimizer.

    Learning rates are those of now; torch's schedulers stay behind: hand a scheduled lr to `step_`. eps_root: inside
    the square root of Adam, which torch does not have; a small one keeps metagradients finite.

    Raises BadArgument for an optimizer, or an option of it, that the rules do not cover.
    """
    kind = _kind(torch_optimizer)
    with_momentum = any(group.get("momentum") for group in torch_optimizer.param_groups)
    groups = [_hyper(kind, group, with_momentum) for group in torch_optimizer.param_groups]
    overrides = []
    for names, hyper in zip(_names(torch_optimizer, model, arena or Arena.of(model))[1:], groups[1:], strict=True):
        if names:
            overrides.append({"params": frozenset(names).__contains__, **hyper})
    first = groups[0]
    if kind is SGD:
        nesterov = {bool(group["nesterov"]) for group in torch_optimizer.param_groups}
        if len(nesterov) > 1:
            raise BadArgument("expected all parameter groups with or all without Nesterov momentum; got both")
        return SGD(**first, nesterov=nesterov.pop(), param_groups=overrides)
    betas = (first.pop("beta1"), first.pop("beta2"))
    return kind(betas=betas, **first, eps_root=eps_root, param_groups=overrides)


def import_state(
    torch_optimizer: torch.optim.Optimizer, model: nn.Module, arena: Arena | None = None, *, step: int | None = None
) -> OptimizerState:
    """A copy of the model's trainable parameters and of the optimizer's slots, as a state of `matching_optimizer`.

    arena: the layout, `Arena.of(model)` by default. step: the number of steps made, where it is to differ from what
        the optimizer says, or where parameters differ in it (`skipped_steps`). SGD says nothing of it: 1 stands for
        "some" where there is momentum, which is all that its rule asks (its first step is special).

    Raises BadArgument where parameters have made different numbers of steps and `step` is not given.
    """
    arena = arena or Arena.of(model)
    optimizer = matching_optimizer(torch_optimizer, model, arena)
    state = optimizer.init(arena.flatten(model), arena)
    entries = [_slots(torch_optimizer, parameter) for parameter in _parameters(model, arena)]
    if step is None:
        steps = set(_steps(torch_optimizer, model, arena).values())
        if len(steps) > 1:
            raise BadArgument(
                f"expected all parameters to have made the same number of steps; got {sorted(steps)}: one that never "
                "had a gradient has made none; hand the optimizer to mgd.TrainingFunction, which counts for each, or "
                "freeze that parameter (requires_grad=False)"
            )
        step = max(steps, default=0)
    for name, slot in zip(optimizer.slots, state.slots, strict=True):
        for view, entry in zip(arena.slices(slot), entries, strict=True):
            if entry.get(name) is not None:
                view.copy_(entry[name].detach())
    state.step = int(step)
    return state


def skipped_steps(
    torch_optimizer: torch.optim.Optimizer, model: nn.Module, arena: Arena | None = None
) -> tuple[int, dict[str, int]]:
    """The most steps that a parameter has made, and for those that made fewer (`grad` was None) how many fewer, by
    name: what `mgd.TrainingFunction` takes as `optimizer_state["step"]` and `["skipped"]`."""
    steps = _steps(torch_optimizer, model, arena or Arena.of(model))
    most = max(steps.values(), default=0)
    return most, {name: most - made for name, made in steps.items() if made != most}


def export_state(state: OptimizerState, torch_optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """A state_dict for `torch_optimizer.load_state_dict` with the slots and the step of `state`, copied, in the dtypes
    of the parameters. Hyperparameters are those of `torch_optimizer`, which stays as it is; so does the model.

    state: with an arena, as from `import_state`.
    """
    kind = _kind(torch_optimizer)
    if state.arena is None:
        raise BadArgument("expected a state with an arena: make it by import_state, or by optimizer.init(flat, arena)")
    names = ("exp_avg", "exp_avg_sq") if kind is not SGD else ("momentum_buffer",)
    if len(state.slots) not in (len(names), 0):
        raise BadArgument(f"expected the slots {names} for {type(torch_optimizer).__name__}; got {len(state.slots)}")
    exported = torch_optimizer.state_dict()
    numbers: dict[int, int] = {}
    for group, packed in zip(torch_optimizer.param_groups, exported["param_groups"], strict=True):
        numbers.update(zip(map(id, group["params"]), packed["params"], strict=True))
    slots = [state.arena.slices(slot) for slot in state.slots]
    entries: dict[int, dict[str, Tensor]] = {}
    buffered = _buffered(torch_optimizer, model, state.arena)
    for i, parameter in enumerate(_parameters(model, state.arena)):
        if not slots or not buffered[i] or state.step == 0:
            continue
        entry = {} if kind is SGD else {"step": _step_tensor(torch_optimizer.state.get(parameter, {}), state.step)}
        for name, views in zip(names, slots, strict=True):
            entry[name] = views[i].detach().to(parameter.dtype, copy=True)
        entries[numbers[id(parameter)]] = entry
    exported["state"] = entries
    return exported


def _kind(torch_optimizer: torch.optim.Optimizer) -> Any:
    name = type(torch_optimizer)
    if name not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise BadArgument(
            f"expected torch.optim.SGD, Adam or AdamW; got {name.__module__}.{name.__qualname__}: "
            "write its rule as an UpdateRule and fill its slots by hand"
        )
    decoupled = set()
    for group in torch_optimizer.param_groups:
        for option, why in _UNSUPPORTED.items():
            if group.get(option):
                raise BadArgument(f"expected {name.__name__} with {option}=False; got True: {why}")
        decoupled.add(bool(group.get("decoupled_weight_decay", name is torch.optim.AdamW)))
    if name is torch.optim.SGD:
        return SGD
    if len(decoupled) > 1:
        raise BadArgument("expected decoupled weight decay in all parameter groups or in none; got both")
    return AdamW if decoupled.pop() else Adam


def _hyper(kind: type, group: dict[str, Any], with_momentum: bool) -> dict[str, Any]:
    hyper = {"lr": float(group["lr"]), "weight_decay": float(group["weight_decay"])}
    if kind is not SGD:
        beta1, beta2 = group["betas"]
        return {**hyper, "beta1": float(beta1), "beta2": float(beta2), "eps": float(group["eps"])}
    if not with_momentum:
        return hyper
    momentum = float(group["momentum"])
    # Without momentum torch ignores the dampening; beside groups that have a buffer the rule would not.
    return {**hyper, "momentum": momentum, "dampening": float(group["dampening"]) if momentum else 0.0}


def _parameters(model: nn.Module, arena: Arena) -> list[Tensor]:
    """The model's parameters in the arena's order."""
    named = dict(model.named_parameters())
    missing = [name for name in arena.names if name not in named]
    if missing:
        raise BadArgument(f"expected an arena of this model's parameters; the model has no {missing}")
    return [named[name] for name in arena.names]


def _names(torch_optimizer: torch.optim.Optimizer, model: nn.Module, arena: Arena) -> list[list[str]]:
    """For every parameter group the names of its parameters that are in the arena."""
    name_of = {id(p): name for p, name in zip(_parameters(model, arena), arena.names, strict=True)}
    groups = [[name_of[id(p)] for p in group["params"] if id(p) in name_of] for group in torch_optimizer.param_groups]
    left = set(arena.names).difference(*groups)
    if left:
        raise BadArgument(
            f"expected an optimizer over every trainable parameter of the model; it lacks {sorted(left)}: "
            "set requires_grad=False on them, or add them to the optimizer"
        )
    return groups


def _buffered(torch_optimizer: torch.optim.Optimizer, model: nn.Module, arena: Arena) -> list[bool]:
    """For every tensor of the arena whether torch keeps state for it: SGD does where its group has momentum."""
    has = {}
    for group, names in zip(torch_optimizer.param_groups, _names(torch_optimizer, model, arena), strict=True):
        has.update(dict.fromkeys(names, "momentum" not in group or group["momentum"] != 0))
    return [has[name] for name in arena.names]


def _steps(torch_optimizer: torch.optim.Optimizer, model: nn.Module, arena: Arena) -> dict[str, int]:
    """How many steps each parameter has made, by name, without those of which torch keeps no state."""
    counted = zip(arena.names, _parameters(model, arena), _buffered(torch_optimizer, model, arena), strict=True)
    return {name: _slots(torch_optimizer, p).get("step", 0) for name, p, kept in counted if kept}


def _slots(torch_optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """What torch keeps for a parameter, `step` being an int; SGD's is 1 where there is a buffer."""
    entry = dict(torch_optimizer.state.get(parameter, {}))
    if entry.get("momentum_buffer") is not None:
        entry["step"] = 1
    elif "step" in entry:
        entry["step"] = int(entry["step"])
    return entry


def _step_tensor(entry: dict[str, Any], step: int) -> Tensor:
    like = entry.get("step")
    dtype = like.dtype if isinstance(like, Tensor) else torch.promote_types(torch.float32, torch.get_default_dtype())
    return torch.tensor(float(step), dtype=dtype)
