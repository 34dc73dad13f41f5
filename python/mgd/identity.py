"""What a training depends on, as digests: by these, a directory knows whose run it holds.

Tensors are compared bit by bit. Functions cannot be compared, so what they compute is: the loss at the first step, with
its derivatives with respect to parameters and metaparameters; the updates that the optimizer makes of it; and the
objective, with its gradient, at the initial parameters.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mgd.autodiff.eager import EagerEvaluator
from mgd.step.batches import flatten, loaded
from mgd.step.metaparameters import Metaparameters
from mgd.step.model import modes_kept
from mgd.step.rng import seed_generators, seed_of
from mgd.step.start import Start
from mgd.util.fingerprint import code_digest, digest, leaf_digests, source_digest
from mgd_kernels import Optimizer

Objective = Callable[[nn.Module], Tensor]
UPDATES = 2  # an optimizer's first update does not show all of its momentum


def settings_of(f: Any, anchor: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the results of a training function depend on beside what a `Start` holds. anchor: as of its `anchored`."""
    return {
        "the seed": f.seed,
        "the steps that are differentiated": (f.since, anchor and tree_flatten(dict(anchor))[0]),
        "microbatches, clipping, autocast": (f.microbatches, f.max_grad_norm, f.autocast),
        "the mode of the objective": f.objective_mode,
        "the schedule": f.schedule,
        "the execution (trace, compile)": ("captured" if f.trace else "by bits", f.compile),
        "whether the optimizer state continues": f.optimizer_state is not None,
    }


def identity_of(
    start: Start, optimizer: Optimizer, objectives: Iterable[Objective], settings: Mapping[str, Any]
) -> dict[str, str]:
    """Digests by name. The settings are named by the caller. `start` is used up: its training must be made anew."""
    meta, arena = start.meta, start.arena
    found = given(start, optimizer, settings)
    found["the batches"] = _batches(start.step.batches, meta)
    # Without deterministic kernels, a GPU repeats losses but not gradients.
    exact = arena.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    found["the objective"] = digest([_objective(start, objective, exact) for objective in objectives])
    loss, gradients = _loss(start)
    found["the loss"] = digest(loss, gradients if exact else None)
    if exact:
        found["the optimizer's updates"] = digest(_updates(start, optimizer, gradients[0]))
    return found


def given(start: Start, optimizer: Optimizer, settings: Mapping[str, Any]) -> dict[str, str]:
    """Digests, by name, of what can be told without evaluating anything."""
    meta, state, arena, binding = start.meta, start.state, start.arena, start.binding
    values: dict[str, Any] = {
        "the metaparameters": [*meta.z, meta.structure],
        "the model": (arena.names, [tuple(shape) for shape in arena.shapes], binding.buffer_names),
        "the initial parameters": (state.params, *binding.frozen),
        "the initial buffers": start.buffers,
        "the initial optimizer state": (state.before, state.slots),
        "the optimizer": (type(optimizer).__name__, optimizer.table(), state.segments.table),
        "the hyperparameters": meta.hypers,
        "the number of steps": len(start.step.batches),
        "the version of torch and its threads": (torch.__version__, torch.get_num_threads()),
        "the version of mgd": version("mgd-kernels"),
        **settings,
    }
    return leaf_digests("z", meta.z) | {name: digest(value) for name, value in values.items()}


def code_of(model: nn.Module, loss: Callable[..., Any], objective: Callable[..., Any]) -> dict[str, str]:
    """Digests, by name, of the code that a training runs: that of several processes must be one."""
    kinds = {type(module).__qualname__: type(module).forward for module in model.modules()}
    return {
        "the version of Python": platform.python_version(),
        "the code of mgd": source_digest("mgd", "mgd_kernels"),
        "the code of the model": digest(list(kinds), code_digest(*kinds.values())),
        "the code of the loss": code_digest(loss),
        "the code of the objective": code_digest(objective),
    }


def _batches(batches: Sequence[Any], meta: Metaparameters) -> str:
    """A digest of all batches, and of what `per_example` reads from them."""
    digests = []
    for t in range(len(batches)):
        batch = loaded(batches[t])
        leaves, spec = flatten(batch)
        digests.append(digest(str(spec), leaves, [index(batch) for index in meta.per_example.values()]))
    return digest(digests)


def _loss(start: Start) -> tuple[Tensor, list[Any]]:
    """The loss of the first microbatch, and its gradients: with respect to parameters, and to metaparameters."""
    parameters = start.arena.tensors(start.state.params)
    microbatch = next(start.step.evaluations(0, start.meta, range(1)))  # on every process the same
    leaves = [x.detach().clone().requires_grad_() for x in microbatch.metaparameters.tensors]
    microbatch.metaparameters.tensors = leaves
    second: list[Any] = []

    def look(loss: Tensor) -> None:
        if leaves:
            second.append(torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True))

    evaluation = EagerEvaluator().gradient(microbatch, parameters, start.buffers, look)
    return evaluation.loss, [list(evaluation.gradients), second, evaluation.buffers]


def _updates(start: Start, optimizer: Optimizer, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The training state after a few steps with the first gradient. Changes the state of `start`."""
    gradient = start.arena.zeros(start.arena.gradient_dtype)
    for place, g in zip(start.arena.slices(gradient), gradients, strict=True):
        if g is not None:
            place.copy_(g)
    for t in range(min(UPDATES, len(start.meta.tables))):
        optimizer.step_(start.state, gradient, start.meta.tables[t])
    return start.state.tensors()


def _objective(start: Start, objective: Objective, exact: bool) -> Any:
    """What the objective is at the start, and its gradient, in the random stream that it has at the end."""
    binding, loss = start.binding, start.step.loss
    parameters = [p.detach().clone().requires_grad_() for p in start.arena.tensors(start.state.params)]
    buffers = {name: b.clone() for name, b in start.buffers.items()}
    seed_generators(seed_of(loss.seed, loss.steps_before + len(start.step.batches)), start.arena.device)
    with modes_kept(binding.model), contextlib.ExitStack() as stack:
        value = binding.call(objective, parameters, buffers, until=stack)[0]
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value  # the end of the training will refuse it
        gradients = torch.autograd.grad(value.sum(), parameters, allow_unused=True) if exact else None
    return value, gradients
