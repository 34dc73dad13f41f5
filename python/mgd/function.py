"""The training function f = φ∘A: from metaparameters to the objective of the trained model, with its gradient."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from mgd.autodiff.joint import JointGraphs
from mgd.autodiff.second_order import SecondDerivative
from mgd.autodiff.traced import Traces
from mgd.errors import BadArgument, BadMetaparameter
from mgd.plan.budget import Budget, Costs
from mgd.plan.plan import Plan
from mgd.results import Metagradient, Report, Trained
from mgd.step.initial_state import starting_state
from mgd.step.metaparameters import Metaparameters
from mgd.step.model import Binding, model_kept
from mgd.step.rng import seed_generators, seed_of
from mgd.step.step import StepFunction
from mgd.sweep import storage as memory
from mgd.sweep.checkpoint import RunCheckpoint
from mgd.sweep.sweep import Sweep, objective_adjoints, weighted_sum
from mgd.util.fingerprint import digest
from mgd.util.profiler import chrome_trace
from mgd.util.progress import Progress
from mgd.util.system import keep_freed_memory
from mgd_kernels import Arena, Optimizer
from mgd_kernels.optimizer import FusedOptimizer

WORTH_TRACING = 32  # evaluations; a trace takes as long as some 10 to 30 of them


class TrainingFunction:
    """Training as a function of its metaparameters `z`, with exact metagradients (arXiv 2503.13751).

    model: its parameters are the initial ones; those with `requires_grad` are trained. No call changes it.
    loss: `loss(model, batch, z) -> scalar`; reads parameters and metaparameters, changes nothing but buffers.
    batches: `len(batches)` is the number of steps T; `batches[t]` a pytree of tensors, the same each time.
    optimizer: `SGD`, `Adam`, `AdamW`, or any `UpdateRule`. A hyperparameter in `z` has shape `[]`, `[T]`, `[G]` for G
        parameter groups, or `[T, G]`; where T = G, one dimension is taken for steps.
    objective: `objective(model) -> scalar, or [k]` for k objectives at once.
    max_grad_norm: clip each step's gradient to this global norm.
    microbatches: evaluate each batch in this many slices; the step's loss is their mean weighted by size.
    seed: every step's random stream is a function of `seed` and the step.
    fixed: hyperparameters as in `z`, such as a learning rate for every step, that are no metaparameters: without
        them in `z`, the reverse sweep still ends at the first step that reads one. An entry of `z` overrides them.
    per_example: metaparameter name -> function from a batch to the indices it reads; `loss` then sees those entries.
    autocast: run `loss` under torch.autocast in this dtype.
    budget, schedule: memory for the log and the snapshots, and how to use it (see `mgd.plan.plan`).
    hvp: "auto", "forward" or "reverse" (see `mgd.autodiff.second_order`).
    trace: replay the second derivatives from a graph that is traced once (see `mgd.autodiff.traced`); by default for trainings
        long enough to win the time of the trace back. "joint": the gradients that train come from that graph, too, and
        what it has computed for them is kept where memory allows (see `mgd.autodiff.joint`). compile: compile the joint graph
        with `torch.compile`.
    optimizer_state: go on where another training ended: its `optimizer_state` (`{}`: at the very beginning), beside its
        parameters and buffers in `model`. Steps are then counted on, in Adam's bias corrections and in random
        streams, so that two trainings make the same bits as one of both lengths; a metagradient gives back the state
        at its end. The attribute may be set anew between calls, as may what `model` and `batches` hold.
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
        fixed: Mapping[str, Any] | None = None,
        per_example: Mapping[str, Callable[[Any], Tensor]] | None = None,
        autocast: torch.dtype | None = None,
        budget: Budget | None = None,
        schedule: str = "auto",
        hvp: str = "auto",
        trace: bool | str | None = None,
        compile: bool = False,
        optimizer_state: Mapping[str, Any] | None = None,
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
        if trace not in (None, False, True, "joint"):
            raise BadArgument(f"expected trace to be None, False, True or 'joint'; got {trace!r}")
        if trace == "joint" and hvp == "forward":
            raise BadArgument("a joint graph goes in reverse: expected hvp='auto' or 'reverse' with trace='joint'")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise BadArgument(f"expected max_grad_norm > 0; got {max_grad_norm}")
        if microbatches < 1:
            raise BadArgument(f"expected microbatches >= 1; got {microbatches}")
        self.model, self.loss, self.batches = model, loss, batches
        self.optimizer, self.objective = optimizer, objective
        self.max_grad_norm, self.microbatches, self.seed = max_grad_norm, microbatches, seed
        self.fixed, self.per_example, self.autocast = dict(fixed or {}), dict(per_example or {}), autocast
        self.budget, self.schedule, self.hvp = budget or Budget(), schedule, hvp
        self.trace, self.compile = trace, compile
        self.optimizer_state = optimizer_state
        self._costs: Costs | None = None  # measured by the last metagradient
        long = len(batches) * microbatches >= WORTH_TRACING
        together = trace == "joint" or (compile and hvp != "forward")
        self._joints = JointGraphs(compile) if together else None
        traced = not together and (compile or (long if trace is None else bool(trace)))
        self._traces = Traces(compile) if traced else None

    def __len__(self) -> int:
        """The number of training steps."""
        return len(self.batches)

    # --- public ------------------------------------------------------------------------------------------------

    def train(self, z: Mapping[str, Any] | None = None, *, progress: bool = False) -> Trained:
        """Train without a gradient."""
        with self._guarded(progress) as tick:
            return self._train(z or {}, tick).trained

    def value(self, z: Mapping[str, Any] | None = None, *, progress: bool = False) -> Tensor:
        """The objective after training, without a gradient: `[]` or `[k]`."""
        with self._guarded(progress) as tick:
            return self._objective(self._train(z or {}, tick))[0]

    def metagradient(
        self,
        z: Mapping[str, Any],
        *,
        progress: bool = False,
        resume: str | os.PathLike[str] | None = None,
        profile: str | os.PathLike[str] | None = None,
    ) -> Metagradient:
        """The objective after training with `z`, and its exact gradient with respect to every entry of `z`.

        resume: a directory that holds the log, the snapshots and the sweep's place, so that the same call continues an
        interrupted one, redoing at most `mgd.sweep.checkpoint.CHECKPOINT_EVERY` steps of either sweep, and comes to the same bits. It is
        empty again when the call returns.
        profile: a file that receives every operator's time as a Chrome trace, the phases of the report marked in it
            (some MB a second; open it in chrome://tracing or ui.perfetto.dev). Seconds of a profiled run are longer.
        """
        with chrome_trace(profile), self._guarded(progress) as tick:
            run = self._forward(z, tick, resume)
            grads = run.reverse()
            if run.value.ndim == 0:
                grads = _map(lambda g: g[0], grads)
            trained = run.sweep.trained
            self._costs = memory.measured_costs(run.sweep.measured, run.store, run.sweep.arena.device) or self._costs
            state = trained.optimizer_state if run.sweep.continued else None
            return Metagradient(run.value, grads, trained.model_state, trained.losses, self._report(run), state)

    def __call__(self, z: Mapping[str, Any]) -> Tensor:
        """The objective as a node of the autograd graph: `backward` fills the gradients of the tensors in `z`."""
        if not isinstance(z, Mapping):
            raise BadMetaparameter(f"expected z to map names to tensors; got {type(z).__name__}")
        leaves, spec = tree_flatten(dict(z))
        return _Differentiable.apply(self, spec, *leaves)

    def plan(self) -> Plan:
        """What a metagradient will store where, and what it will cost."""
        arena = Arena.of(self.model)
        size = memory.sizes(arena, self.optimizer, dict(self.model.named_buffers()), self.microbatches, self.budget)
        return memory.choose(len(self), size, self.budget, self._costs, self.schedule, arena.device)

    def identity(self, z: Mapping[str, Any]) -> dict[str, str]:
        """Digests, by name, of what a metagradient at `z` depends on, as far as it can be told without running it."""
        with self._guarded() as tick:
            return self._identity(self._sweep(z, tick))

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
        keep_freed_memory()
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            # The fused attention kernels have neither forward-mode nor second derivatives.
            sdpa_kernel(SDPBackend.MATH),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            model_kept(self.model),
            Progress(len(self), progress) as bar,
        ):
            yield bar.tick

    def _sweep(self, z: Mapping[str, Any], tick: Callable[[str], None], arena: Arena | None = None) -> Sweep:
        """A fresh training, at step 0."""
        arena = arena or Arena.of(self.model)
        meta = Metaparameters(z, len(self), self.optimizer, arena, self.per_example, self.fixed)
        binding = Binding(self.model, fused=self.hvp != "forward")
        initial = binding.parameters() | dict(meta.z.get("init", {}))
        state = starting_state(self.optimizer, arena, initial, self.optimizer_state)
        steps = StepFunction(
            binding,
            arena,
            self.loss,
            self.batches,
            self.microbatches,
            self.seed,
            self.autocast,
            SecondDerivative(self.hvp),
            self._traces,
            self._joints,
            state.before,
        )
        sweep = Sweep(steps, self.optimizer, meta, state, self.max_grad_norm, tick)
        sweep.continued = self.optimizer_state is not None
        return sweep

    def _train(self, z: Mapping[str, Any], tick: Callable[[str], None]) -> Sweep:
        """A training run to its end, with nothing kept."""
        sweep = self._sweep(z, tick)
        sweep.train()
        sweep.meta.check_all_read()
        return sweep

    def _forward(
        self, z: Mapping[str, Any], tick: Callable[[str], None], resume: str | os.PathLike[str] | None = None
    ) -> Run:
        """A training run to its end, with what its reverse sweep needs."""
        arena = Arena.of(self.model)
        sweep = self._sweep(z, tick, arena)
        size = memory.sizes(arena, self.optimizer, sweep.buffers, self.microbatches, self.budget, resume is not None)
        value = None
        if resume is None:
            chosen = memory.choose(len(self), size, self.budget, self._costs, self.schedule, arena.device)
            sweep.tape = memory.tape(chosen, size, self.budget, sweep.buffers, arena, self.microbatches)
            if self._joints is not None:
                sweep.shelf = memory.shelf(chosen, arena.device)
        else:
            disk = memory.resume_limit(resume, self.budget)
            journal = RunCheckpoint(resume, memory.staging({}, size), self._identity(sweep), {"disk": disk})
            sweep.tape = memory.resumable_tape(journal.store, sweep.buffers, arena, self.microbatches)
        with sweep.tape.closed_after_errors():
            if resume is not None:
                disk = journal.settings["disk"]
                chosen = memory.resumable(len(self), size, resume, disk, self.schedule, arena.device)
                journal.begin()
                value = journal.restore(sweep)
                sweep.journal = journal
            actions = itertools.islice(chosen.actions(), sweep.index, None)
            if value is None:
                sweep.forward(actions)
                sweep.meta.check_all_read()
                value, adjoints = self._objective(sweep)
                sweep.begin_reverse(adjoints)
                if sweep.journal is not None:
                    sweep.journal.trained(sweep, value)
            return Run(sweep, chosen, actions, value)

    def _identity(self, sweep: Sweep) -> dict[str, str]:
        """Digests of what the metagradient depends on, as far as it can be told without running it."""
        optimizer, leaves = self.optimizer, tree_flatten_with_path(sweep.meta.z)[0]
        parts = {f"z{keystr(path)}": (leaf,) for path, leaf in leaves} | {
            "the initial parameters": (sweep.state.params,),
            "the initial buffers": tuple(sweep.buffers.values()),
            "the initial optimizer state": (sweep.state.before, sweep.continued, *sweep.state.slots),
            "the optimizer": (type(optimizer).__name__, optimizer.table(), sweep.state.segments.table),
            "the fixed hyperparameters": (sweep.meta.hypers,),
            "the number of steps": (len(self),),
            "the first batch": tuple(tree_flatten(self.batches[0])[0]),
            "the seed": (self.seed,),
            "microbatches, clipping, autocast": (self.microbatches, self.max_grad_norm, self.autocast),
            "the schedule": (self.schedule,),
            "the execution (hvp, trace, compile)": (self.hvp, self._traces is None, self._joints is None, self.compile),
            "the version of torch and its threads": (torch.__version__, torch.get_num_threads()),
            "the version of mgd": (version("mgd-kernels"),),
        }
        return {name: digest(*values) for name, values in parts.items()}

    def _objective(self, sweep: Sweep):
        seed_generators(seed_of(self.seed, sweep.state.before + len(self)), sweep.arena.device)
        with sweep.measured.timed("objective"):
            return objective_adjoints(sweep.steps.binding, self.objective, sweep)

    def _report(self, run: Run) -> Report:
        optimizer, sweep, objectives = self.optimizer, run.sweep, len(run.sweep.adjoints)
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
            execution=graphs.describe() if (graphs := self._traces or self._joints) else "eager",
            backend=backend,
            plan=run.plan.to_dict(),
            measured_seconds=dict(sweep.measured.phases),
            store=run.store,
            kept_bytes=sweep.shelf.peak,
        )


@dataclass
class Run:
    """A finished training on which the reverse sweep can run once. store: what its store did, in the end."""

    sweep: Sweep
    plan: Plan
    actions: Iterator[Any]
    value: Tensor
    store: dict[str, Any] | None = None

    def reverse(self) -> dict[str, Any]:
        """Gradients of the objectives whose adjoints the sweep holds, `[k, ...]`."""
        sweep = self.sweep
        with sweep.tape.closed_after_errors():
            gradients = sweep.reverse(self.actions)
            if sweep.journal is not None:
                sweep.journal.finish()
            self.store = sweep.tape.stats()
        sweep.tape.close()
        return gradients.collect([adjoint.state.params for adjoint in sweep.adjoints])


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
            run.sweep.begin_reverse([weighted_sum(run.sweep.adjoints, cotangent.reshape(-1).tolist())])
            grads = run.reverse()
        found = tree_flatten({key: grads[key] for key in z})[0]
        return None, None, *(g[0] if isinstance(x, Tensor) else None for x, g in zip(leaves, found, strict=True))


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([function(leaf) for leaf in leaves], spec)
