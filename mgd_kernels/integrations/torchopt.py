"""`adamw`, `adam` and `sgd` with the signatures and the protocol of TorchOpt, fused inside.

They stand wherever a `torchopt.GradientTransformation` does: under `torchopt.apply_updates`, `torchopt.chain`,
`torchopt.MetaOptimizer`, `torchopt.FuncOptimizer`, or a loop that calls `init` and `update` by hand. One kernel does
the whole pytree, one kernel its VJP. TorchOpt itself is not needed, only `optree`, which it builds on.

Beyond TorchOpt: every hyperparameter may be a 0-d tensor, and where it requires a gradient it is differentiated
(`lr` may also be a schedule that returns such a tensor); moments of 16-bit parameters are held in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mgd_kernels.errors import BadArgument
from mgd_kernels.integrations.leaves import fused_update, state_dtype, zeros
from mgd_kernels.rules import ADAM, SGD_MOMENTUM, SGD_NESTEROV, SGD_PLAIN, Rule

try:
    import optree
except ImportError as error:
    raise ImportError(
        "mgd_kernels.integrations.torchopt needs optree for pytrees: `pip install optree` "
        "(it comes with `pip install torchopt`)"
    ) from error

try:  # MetaOptimizer and chain want this very class; without TorchOpt its two fields are all there is to it.
    from torchopt.base import GradientTransformation
except ImportError:

    class GradientTransformation(NamedTuple):  # type: ignore[no-redef]
        """`init(params) -> state` and `update(updates, state, *, params=None, inplace=True) -> (updates, state)`."""

        init: Callable
        update: Callable


__all__ = ["AdamState", "TraceState", "adam", "adamw", "sgd"]

Scalar: TypeAlias = float | Tensor
Schedule: TypeAlias = Callable[[Tensor], Scalar]


class AdamState(NamedTuple):
    """mu, nu: the two moments of every leaf (in optree's order, None for a leaf that is None). count: int64
    `[leaves]` on the CPU, the steps that each leaf has made (a leaf without a gradient makes none)."""

    mu: list[Tensor | None]
    nu: list[Tensor | None]
    count: Tensor  # type: ignore[assignment]  # TorchOpt's name for it, and a method of tuples


class TraceState(NamedTuple):
    """trace: the momentum buffers of the leaves, `[]` for SGD without momentum. count: as in AdamState."""

    trace: list[Tensor | None]
    count: Tensor  # type: ignore[assignment]  # as in AdamState


def adamw(
    lr: Scalar | Schedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-2,
    *,
    eps_root: Scalar = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> GradientTransformation:
    """AdamW as `torchopt.adamw`.

    mask: a pytree of booleans (or a prefix of one) with the structure of the parameters, or a function from the
        updates to one: which leaves have weight decay.
    moment_requires_grad: the initial moments are leaves of the graph.
    use_accelerated_op: accepted for the signature's sake; the fused kernel is what always runs.

    Raises BadArgument (a ValueError) for a hyperparameter out of range.
    """
    hyper = _adam_hyper(lr, betas, eps, eps_root)
    decay = _checked("weight_decay", weight_decay)
    return _transformation(ADAM, hyper, AdamState, maximize, moment_requires_grad, weight_decay=decay, mask=mask)


def adam(
    lr: Scalar | Schedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    eps_root: Scalar = 0.0,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> GradientTransformation:
    """Adam with L2 weight decay as `torchopt.adam`; arguments as in `adamw`."""
    hyper = _adam_hyper(lr, betas, eps, eps_root)
    l2 = _checked("weight_decay", weight_decay)
    return _transformation(ADAM, hyper, AdamState, maximize, moment_requires_grad, l2=l2)


def sgd(
    lr: Scalar | Schedule,
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    nesterov: bool = False,
    *,
    moment_requires_grad: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """SGD with momentum, dampening, Nesterov and L2 weight decay as `torchopt.sgd`; arguments as in `adamw`.

    The first step of a leaf (`trace + grad`, without dampening) is recognised by its count in the state; TorchOpt
    uses a flag of the transformation, which a second `init` does not reset.
    """
    _checked("momentum", momentum)
    if nesterov and (not _number(momentum) > 0 or _number(dampening) != 0):
        raise BadArgument(
            f"expected a momentum above 0 and no dampening with Nesterov; got momentum={_number(momentum)}, "
            f"dampening={_number(dampening)}"
        )
    plain = not isinstance(momentum, Tensor) and momentum == 0
    rule = SGD_PLAIN if plain else SGD_NESTEROV if nesterov else SGD_MOMENTUM
    hyper = {"lr": _checked("lr", lr), "momentum": momentum, "dampening": dampening}
    l2 = _checked("weight_decay", weight_decay)
    return _transformation(rule, hyper, TraceState, maximize, moment_requires_grad, l2=l2)


def _adam_hyper(lr, betas, eps, eps_root) -> dict[str, Any]:
    beta1, beta2 = betas
    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "eps_root": eps_root}
    return {name: _checked(name, value, 1.0 if name.startswith("beta") else None) for name, value in hyper.items()}


def _checked(name: str, value: Any, below: float | None = None) -> Any:
    if callable(value) and not isinstance(value, Tensor):
        return value
    if isinstance(value, Tensor) and value.ndim:
        raise BadArgument(f"expected {name} to be a number or a 0-d tensor; got shape {list(value.shape)}")
    number = _number(value)
    if not number >= 0 or (below is not None and not number < below):
        raise BadArgument(f"expected {name} {'>= 0' if below is None else f'in [0, {below:g})'}; got {number}")
    return value


def _number(value: Scalar) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)


def _is_zero(value: Scalar) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _row(rule: Rule, values: dict[str, Any]) -> Tensor:
    """The rule's hyperparameters as float64 `[H]`, in the graph where one of them is."""
    row = [values.get(name, 0.0) for name in rule.hyper]
    if any(isinstance(value, Tensor) and value.requires_grad for value in row):
        return torch.stack([_scalar(value) for value in row])
    return torch.tensor([_number(value) for value in row], dtype=torch.float64)


def _scalar(value: Any) -> Tensor:
    return torch.as_tensor(value).to("cpu", torch.float64).reshape(())


def _leaves(tree: Any) -> list[Tensor | None]:
    return optree.tree_leaves(tree, none_is_leaf=True)


def _transformation(
    rule: Rule,
    hyper: dict[str, Any],
    state_type: type,
    maximize: bool,
    moment_requires_grad: bool,
    l2: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
) -> GradientTransformation:
    """The pair of functions. The state is a tuple of one, as a chain's state is a tuple of its parts."""

    def init(params: Any) -> tuple:
        leaves = _leaves(params)
        there = {i: leaf for i, leaf in enumerate(leaves) if leaf is not None}
        slots: list[list[Tensor | None]] = []
        for _ in rule.slots:
            slot: list[Tensor | None] = [None] * len(leaves)
            for i, leaf in zip(there, zeros(list(there.values())), strict=True):
                slot[i] = leaf.requires_grad_() if moment_requires_grad else leaf
            slots.append(slot)
        count = torch.zeros(len(leaves), dtype=torch.int64)
        return (state_type(*slots, count) if slots else state_type([], count),)

    def update(updates: Any, state: tuple, *, params: Any = None, inplace: bool = True) -> tuple[Any, tuple]:
        grads, spec = optree.tree_flatten(updates, none_is_leaf=True)
        (old,) = state
        slots = [list(slot) for slot in old[: len(rule.slots)]]
        if old.count.shape != (len(grads),):
            raise BadArgument(
                f"expected updates with the {old.count.numel()} leaves of the state; got {len(grads)}: "
                "was `init` called with other parameters?"
            )
        for i, grad in enumerate(grads):
            if grad is not None:
                _check_leaf(i, grad, [slot[i] for slot in slots])
        needs_params = not (_is_zero(l2) and _is_zero(weight_decay))
        leaves: list[Any] = _leaves(params) if needs_params and params is not None else []
        if needs_params and len(leaves) != len(grads):
            raise BadArgument(
                f"expected the parameters, for weight decay: call update(updates, state, params=params); "
                f"got {'none' if params is None else f'{len(leaves)} leaves for {len(grads)} updates'}"
            )
        if maximize:
            grads = [None if g is None else -g for g in grads]
        if not _is_zero(l2):
            decay = lambda g, p: g + (l2 * p).to(g.dtype)
            grads = [None if g is None else decay(g, p) for g, p in zip(grads, leaves, strict=True)]
        decayed = [False] * len(grads) if _is_zero(weight_decay) else _decayed(mask, updates, len(grads))

        new: list[Tensor | None] = [None] * len(grads)
        counts = old.count.tolist()
        for indices in _calls(grads, counts):
            k = counts[indices[0]] + 1
            values = dict(hyper)
            if callable(hyper["lr"]) and not isinstance(hyper["lr"], Tensor):
                values["lr"] = hyper["lr"](torch.tensor(k - 1))
            values["weight_decay"] = weight_decay
            decay_moves = any(isinstance(x, Tensor) and x.requires_grad for x in (values["lr"], weight_decay))
            parts = [[slot[i] for i in indices] for slot in slots]
            if slots and rule is not ADAM:
                if k == 1:
                    values["dampening"] = 0.0
                    parts = _first(rule, values, parts)
                k += 1  # the rule's own first step would drop the trace
            out, moved = fused_update(
                rule,
                k,
                _row(rule, values),
                [grads[i] for i in indices],
                parts,
                [leaves[i] for i in indices if decayed[i]],
                [j for j, i in enumerate(indices) if decayed[i]],
                inplace,
                decay_moves,
            )
            for j, i in enumerate(indices):
                new[i] = out[j]
                for slot, leaves_of_slot in zip(slots, moved, strict=True):
                    slot[i] = leaves_of_slot[j]
        count = old.count + torch.tensor([g is not None for g in grads], dtype=torch.int64)
        return optree.tree_unflatten(spec, new), (state_type(*(slots or [[]]), count),)

    return GradientTransformation(init, update)


def _first(rule: Rule, values: dict[str, Any], parts: list[list[Tensor]]) -> list[list[Tensor]]:
    """TorchOpt's first trace is `trace + grad`: momentum times what stands here, plus grad."""
    if rule is SGD_NESTEROV:
        return [[trace / values["momentum"] for trace in part] for part in parts]
    values["momentum"] = 1.0
    return parts


def _check_leaf(i: int, grad: Tensor, slots: Sequence[Tensor | None]) -> None:
    if type(grad) not in (Tensor, torch.nn.Parameter):
        raise BadArgument(
            f"expected plain tensors; leaf {i} is a {type(grad).__name__}: the kernels read memory by address, "
            "so call update on the local shards"
        )
    for slot in slots:
        if slot is None or slot.shape != grad.shape:
            raise BadArgument(
                f"expected leaf {i} of the updates in the shape of its state, "
                f"{None if slot is None else list(slot.shape)}; got {list(grad.shape)}"
            )


def _calls(grads: Sequence[Tensor | None], counts: Sequence[int]) -> list[list[int]]:
    """Which leaves go into one kernel: those of one device, dtype and step."""
    calls: dict[tuple, list[int]] = {}
    for i, (grad, count) in enumerate(zip(grads, counts, strict=True)):
        if grad is not None:
            calls.setdefault((grad.device, grad.dtype, state_dtype(grad), count), []).append(i)
    return list(calls.values())


def _decayed(mask: Any, updates: Any, count: int) -> list[bool]:
    """For every leaf whether it has weight decay."""
    if mask is None:
        return [True] * count
    tree = mask(updates) if callable(mask) else mask
    try:
        flags = optree.broadcast_prefix(tree, updates, none_is_leaf=True)
    except ValueError as error:
        raise BadArgument(f"expected a mask with the structure of the parameters or a prefix of it: {error}") from error
    return [bool(flag) for flag in flags]
