"""The training function f = φ∘A: from metaparameters to the objective of the trained model, with its gradient."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mgd import memory
from mgd.batches import seed_generators, seed_of
from mgd.budget import Budget, Costs, Sizes
from mgd.derivatives import SecondDerivative
from mgd.errors import BadArgument, BadMetaparameter
from mgd.metaparameters import Metaparameters
from mgd.model import Binding, model_kept
from mgd.planner import Plan
from mgd.progress import Progress
from mgd.report import Report
from mgd.steps import Steps
from mgd.sweep import Adjoint, Sweep, objective_adjoints, weighted_sum
from mgd.tracing import Traces
from mgd_kernels import Arena, Optimizer
from mgd_kernels.optimizer import FusedOptimizer

WORTH_TRACING = 32  # evaluations; a trace takes as long as some 10 to 30 of them


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
class Metagradient:
    """value: `[]` or `[k]`. grads: the keys and shapes of z, `[k, ...]` for k objectives. model_state: the trained model's
    parameters and buffers. losses: float64 `[T]`, each step's. report: what it cost."""

    value: Tensor
    grads: dict[str, Any]
    model_state: dict[str, Tensor]
    losses: Tensor
    report: Report


class TrainingFunction:
    """Training as a function of its metaparameters `z`, with exact metagradients (arXiv 2503.13751).

    model: its parameters are the initial ones; those with `requires_grad` are trained. No call changes it.
    loss: `loss(model, batch, z) -> scalar`; reads parameters and metaparameters, changes nothing but the model's buffers.
    batches: `len(batches)` is the number of steps T; `batches[t]` a pytree of tensors, the same each time.
    optimizer: `SGD`, `Adam`, `AdamW`, or any `UpdateRule`.
    objective: `objective(model) -> scalar, or [k]` for k objectives at once.
    max_grad_norm: clip each step's gradient to this global norm.
    microbatches: evaluate each batch in this many slices; the step's loss is their mean weighted by size.
    seed: every step's random stream is a function of `seed` and the step.
    per_example: metaparameter name -> function from a batch to the indices it reads; `loss` then sees `z[name][indices]`.
    autocast: run `loss` under torch.autocast in this dtype.
    budget, schedule: memory for the log and the snapshots, and how to use it (see `mgd.planner`).
    hvp: "auto", "forward" or "reverse" (see `mgd.derivatives`).
    trace: replay the second derivatives from a graph that is traced once (see `mgd.tracing`); by default for trainings
        long enough to win the time of the trace back. compile: compile that graph with `torch.compile`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        batches: Sequence[Any],
        *,
        optimizer: Optimizer,
        objective: Callable[[nn.Module], Tensor],
        max_grad_norm: float | None = None,
        microbatches: int = 1,
        seed: int = 0,
        per_example: Mapping[str, Callable[[Any], Tensor]] | None = None,
        autocast: torch.dtype | None = None,
        budget: Budget | None = None,
        schedule: str = "auto",
        hvp: str = "auto",
        trace: bool | None = None,
        compile: bool = False,
    ):
        if not isinstance(model, nn.Module):
            raise BadArgument(f"expected model to be a torch.nn.Module; got {type(model).__name__}")
        if not isinstance(optimizer, Optimizer):
            raise BadArgument(
                f"expected an optimizer of mgd_kernels (SGD, AdamW, UpdateRule, ...); got {type(optimizer).__name__}"
            )
        if len(batches) < 1:
            raise BadArgument("expected at least one batch; len(batches) is the number of training steps")
        if hvp not in ("auto", "forward", "reverse"):
            raise BadArgument(f"expected hvp to be 'auto', 'forward' or 'reverse'; got {hvp!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise BadArgument(f"expected max_grad_norm > 0; got {max_grad_norm}")
        if microbatches < 1:
            raise BadArgument(f"expected microbatches >= 1; got {microbatches}")
        self.model, self.loss, self.batches = model, loss, batches
        self.optimizer, self.objective = optimizer, objective
        self.max_grad_norm, self.microbatches, self.seed = max_grad_norm, microbatches, seed
        self.per_example, self.autocast = dict(per_example or {}), autocast
        self.budget, self.schedule, self.hvp = budget or Budget(), schedule, hvp
        self.trace, self.compile = trace, compile
        self._costs: Costs | None = None  # measured by the last metagradient
        long = len(batches) * microbatches >= WORTH_TRACING
        self._traces = Traces(compile) if compile or (long if trace is None else trace) else None

    def __len__(self) -> int:
        """The number of training steps."""
        return len(self.batches)

    # --- public ------------------------------------------------------------------------------------------------

    def train(self, z: Mapping[str, Any] | None = None, *, progress: bool = False) -> Trained:
        """Train without a gradient."""
        with self._guarded(progress) as tick:
            return _trained(self._train(z or {}, tick))

    def value(self, z: Mapping[str, Any] | None = None, *, progress: bool = False) -> Tensor:
        """The objective after training, without a gradient: `[]` or `[k]`."""
        with self._guarded(progress) as tick:
            return self._objective(self._train(z or {}, tick))[0]

    def metagradient(self, z: Mapping[str, Any], *, progress: bool = False) -> Metagradient:
        """The objective after training with `z`, and its exact gradient with respect to every entry of `z`."""
        with self._guarded(progress) as tick:
            run = self._forward(z, tick)
            grads = run.reverse(run.adjoints)
            if run.value.ndim == 0:
                grads = _map(lambda g: g[0], grads)
            trained = run.trained
            return Metagradient(run.value, grads, trained.model_state, trained.losses, self._report(run))

    def __call__(self, z: Mapping[str, Any]) -> Tensor:
        """The objective as a node of the autograd graph: `backward` fills the gradients of the tensors in `z`."""
        if not isinstance(z, Mapping):
            raise BadMetaparameter(f"expected z to map names to tensors; got {type(z).__name__}")
        leaves, spec = tree_flatten(dict(z))
        return _Differentiable.apply(self, spec, *leaves)

    def plan(self) -> Plan:
        """What a metagradient will store where, and what it will cost."""
        return self._plan(Arena.of(self.model))[0]

    def replaced(self, **changes: Any) -> TrainingFunction:
        """The same training with other values of some of the constructor's arguments."""
        arguments = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return type(self)(**(arguments | changes))

    # --- private -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _guarded(self, progress: bool = False) -> Iterator[Callable[[str], None]]:
        """Random generators and the model are as before at the end; gradients are on inside, whatever the caller's
        mode. Yields the progress bar's tick."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            model_kept(self.model),
            Progress(len(self), progress) as bar,
        ):
            yield bar.tick

    def _sweep(self, z: Mapping[str, Any], tick: Callable[[str], None], arena: Arena | None = None) -> Sweep:
        """A fresh training, at step 0."""
        arena = arena or Arena.of(self.model)
        meta = Metaparameters(z, len(self), self.optimizer, arena, self.per_example)
        steps = Steps(
            Binding(self.model),
            arena,
            self.loss,
            self.batches,
            self.microbatches,
            self.seed,
            self.autocast,
            SecondDerivative(self.hvp),
            self._traces,
        )
        return Sweep(steps, self.optimizer, meta, self.max_grad_norm, tick)

    def _train(self, z: Mapping[str, Any], tick: Callable[[str], None]) -> Sweep:
        """A training run to its end, with nothing kept."""
        sweep = self._sweep(z, tick)
        sweep.train()
        sweep.meta.check_all_read()
        return sweep

    def _forward(self, z: Mapping[str, Any], tick: Callable[[str], None]) -> Run:
        """A training run to its end, with what its reverse sweep needs."""
        arena = Arena.of(self.model)
        chosen, size = self._plan(arena)
        sweep = self._sweep(z, tick, arena)
        sweep.tape = memory.tape(chosen, size, self.budget, sweep.buffers, arena)
        actions = iter(chosen.actions())
        try:
            sweep.forward(actions)
            sweep.meta.check_all_read()
            return Run(sweep, chosen, actions, _trained(sweep), *self._objective(sweep))
        except BaseException:
            sweep.tape.close()
            raise

    def _plan(self, arena: Arena) -> tuple[Plan, Sizes]:
        size = memory.sizes(arena, self.optimizer, dict(self.model.named_buffers()), self.microbatches)
        return memory.choose(len(self), size, self.budget, self._costs, self.schedule, arena.device), size

    def _objective(self, sweep: Sweep):
        seed_generators(seed_of(self.seed, len(self)), sweep.arena.device)
        with sweep.measured.timed("objective"):
            return objective_adjoints(sweep.steps.binding, self.objective, sweep)

    def _report(self, run: Run) -> Report:
        optimizer, sweep, objectives = self.optimizer, run.sweep, len(run.adjoints)
        backend = "torch"
        if isinstance(optimizer, FusedOptimizer):
            backend = optimizer.backend(sweep.state.params, sweep.state.params).__name__.rpartition(".")[2]
        second = sweep.steps.second
        return Report(
            steps=len(self),
            objectives=objectives,
            seconds=dict(sweep.measured.seconds),
            counts=dict(sweep.measured.counts),
            hvp=second.used,
            hvp_fallback=second.fallback,
            execution=self._traces.describe() if self._traces else "eager",
            backend=backend,
            plan=run.plan.to_dict(),
        )


@dataclass
class Run:
    """A finished training on which the reverse sweep can run once."""

    sweep: Sweep
    plan: Plan
    actions: Iterator[Any]
    trained: Trained
    value: Tensor
    adjoints: list[Adjoint]

    def reverse(self, adjoints: list[Adjoint]) -> dict[str, Any]:
        """Gradients of as many objectives as adjoints of the trained state are given, `[len(adjoints), ...]`."""
        try:
            gradients = self.sweep.reverse(self.actions, adjoints)
        finally:
            self.sweep.tape.close()
        return gradients.collect([adjoint.state.params for adjoint in adjoints])


class _Differentiable(torch.autograd.Function):
    """Forward: the training, keeping log and snapshots. Backward: one reverse sweep with the cotangent of the value."""

    @staticmethod
    def forward(ctx, function: TrainingFunction, spec, *leaves: Any) -> Tensor:
        ctx.function, ctx.spec = function, spec
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in leaves]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in leaves))
        with function._guarded() as tick:
            ctx.run = function._forward(tree_unflatten(leaves, spec), tick)
        return ctx.run.value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent: Tensor):
        # Unpacking the saved tensors raises where z has changed since.
        leaves = [x if tensor is None else tensor for tensor, x in zip(ctx.saved_tensors, ctx.numbers, strict=True)]
        z = tree_unflatten(leaves, ctx.spec)
        with ctx.function._guarded() as tick:
            # The log is consumed by a reverse sweep; a second backward trains again.
            run, ctx.run = ctx.run or ctx.function._forward(z, tick), None
            grads = run.reverse([weighted_sum(run.adjoints, cotangent.reshape(-1).tolist())])
        found = tree_flatten({key: grads[key] for key in z})[0]
        return None, None, *(g[0] if isinstance(x, Tensor) else None for x, g in zip(leaves, found, strict=True))


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([function(leaf) for leaf in leaves], spec)


def _trained(sweep: Sweep) -> Trained:
    views = sweep.arena.views
    slots = zip(sweep.optimizer.slots, sweep.state.slots, strict=True)
    return Trained(
        parameters={name: p.clone() for name, p in views(sweep.state.params).items()},
        buffers={name: b.clone() for name, b in sweep.buffers.items()},
        optimizer_state={"step": sweep.state.step}
        | {slot: {n: t.clone() for n, t in views(flat).items()} for slot, flat in slots},
        losses=sweep.losses.sum(1),
    )
