"""The training function f = φ∘A: from metaparameters to the objective of the trained model, with its gradient."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from mgd.autodiff.capture import evaluator_for
from mgd.errors import BadMetaparameter, NonFiniteState, StaleRun
from mgd.identity import Objective, code_of, given, identity_of, settings_of
from mgd.plan.budget import Budget, Costs
from mgd.plan.plan import Plan
from mgd.plan.training import PlanRequest
from mgd.ranks.processes import ranks_of
from mgd.ranks.shards import Shards, shards_of
from mgd.results import Jvp, Metagradient, Trained
from mgd.step import arguments
from mgd.step.model import Buffers
from mgd.step.reads import patiently
from mgd.step.rng import seed_generators, seed_of
from mgd.step.start import Start, start_of
from mgd.step.turn import turn
from mgd.sweep.adjoint import TrainedObjective, weighted_sum
from mgd.sweep.forward import ForwardSweep
from mgd.sweep.node import DifferentiableTraining
from mgd.sweep.report import report_of
from mgd.sweep.resident import NotResident, ResidentSweep, room_for
from mgd.sweep.storage import Resume, no_storage, open_storage
from mgd.sweep.sweep import LOST, Sweep
from mgd.sweep.watched import WatchedSweep
from mgd.util.files import path_of
from mgd.util.fingerprint import digest, leaf_digests
from mgd.util.profiler import chrome_trace
from mgd.util.progress import Progress, no_tick
from mgd.util.replaceable import Replaceable
from mgd_kernels import Arena, Optimizer


class TrainingFunction(Replaceable):
    """Training as a function of its metaparameters `z`, with exact metagradients (arXiv 2503.13751).

    Calls from several threads, also of several training functions, run one after the other: they share torch's default
    generators, and perhaps a model.

    model: its parameters are the initial ones; those with `requires_grad` are trained. No call changes it.
    loss: `loss(model, batch, z) -> scalar`; reads parameters and metaparameters, changes nothing but buffers.
    batches: `len(batches)` is the number of steps T; `batches[t]` is a pytree of tensors, of which any mapping and any
        dataclass may be a part, and the same each time. `mgd.batches` makes them of a `DataLoader` or a dataset.
    optimizer: `SGD`, `Adam`, `AdamW`, or any `UpdateRule`; or `torch.optim.SGD`, `Adam` or `AdamW` with its parameter
        groups, and its state if it has made steps, in whose place the fused one of the same rule works.
        A hyperparameter in `z` has shape `[]`, `[T]`, `[G]` for G parameter groups, or `[T, G]`; where T = G, one
        dimension is taken for steps.
    objective: `objective(model) -> scalar`, or `[k]` for k objectives at once.
    objective_mode: "eval": the objective finds the model in eval mode; "train": in the modes of the training.
    max_grad_norm: clip each step's gradient to this global norm.
    microbatches: evaluate each batch in so many slices; loss and buffers are their means, weighted by size.
    seed: every step's random stream is a function of `seed` and the step.
    since: k: only the last k steps are differentiated, and only they are logged. The state after the steps before them,
        and what those read of `z`, is a constant of the derivative (see `anchored`); None: all steps.
    fixed: hyperparameters as in `z`, such as a learning rate for every step, that are not metaparameters: the reverse
        sweep still ends at the first step that reads one. An entry of `z` overrides them.
    per_example: metaparameter name -> function from a batch to the indices it reads; `loss` then sees those entries.
    autocast: run `loss` under torch.autocast in this dtype (or that of this name).
    budget, schedule: memory for the log and the snapshots, and how to use it (see `mgd.plan.plan`). A size such as
        "4GB" is a budget of the memory that the model is in.
    trace: None: evaluate steps by autograd until a capture pays: the loss as a graph, from which both the gradients
        that train and their second derivatives come; what it computed for them is kept where memory allows
        (`mgd.autodiff.captured`). A capture takes some seconds, once for each shape, and then saves a quarter to a
        third of the time. A graph is used only where it has the bits of the eager step; `mgd.mean_over` runs tasks
        together, up to rounding, when that pays. True: capture at once, also what rounds differently, and run tasks
        together from the first one on. "joint" is another name of True. False: autograd alone, tasks one by one.
        compile: capture at once, and compile the graph with `torch.compile`. Graphs are shared by the trainings of one
        model and loss.
    optimizer_state: continue where another training ended, with its `optimizer_state` (`{}`: at the very beginning)
        and its parameters and buffers in `model`. The count of steps goes on, in Adam's bias corrections and in random
        streams, so that two trainings give the same bits as one of both lengths; a metagradient then returns the state
        at its end. The attribute may be set anew between calls, as may what `model` and `batches` hold.
    process_group: of `torch.distributed`; each of its W processes makes the same calls, with the same arguments. Rank r
        evaluates the microbatches `r V/W` to `(r+1) V/W - 1` of V, and owns 1/W of optimizer state, log, snapshots and
        adjoint; a budget is that of each process. Results are the same on every rank, and have the bits of one process
        with as many microbatches (docs/how-to/processes.md).
    gather: False: of trained parameters, of their optimizer state and of the gradient by `init`, the results of each
        process hold its share alone: of each parameter that it has a part of, flat, the elements that `result.share`
        says. What autograd asks for is whole.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        batches: Sequence[Any],
        *,
        optimizer: Optimizer | torch.optim.Optimizer,
        objective: Callable[[nn.Module], Tensor],
        max_grad_norm: float | None = None,
        microbatches: int = 1,
        seed: int = 0,
        since: int | None = None,
        fixed: Mapping[str, Any] | None = None,
        per_example: Mapping[str, Callable[[Any], Tensor]] | None = None,
        autocast: torch.dtype | str | None = None,
        objective_mode: str = "eval",
        budget: Budget | str | int | None = None,
        schedule: str = "auto",
        trace: bool | str | None = None,
        compile: bool = False,
        optimizer_state: Mapping[str, Any] | None = None,
        process_group: Any = None,
        gather: bool = True,
    ):
        arguments.check_model(model)
        arguments.check_batches(batches)
        optimizer, made = arguments.checked_optimizer(optimizer, model)
        arguments.check_names(trace, objective_mode, schedule)
        arguments.check_numbers(max_grad_norm, microbatches, since, len(batches))
        self.process_group, self.ranks = process_group, ranks_of(process_group)
        self.ranks.check_divides(microbatches)
        self.model, self.loss, self.batches = model, loss, batches
        self.optimizer, self.objective = optimizer, objective
        self.max_grad_norm, self.microbatches, self.seed, self.since = max_grad_norm, microbatches, seed, since
        self.fixed, self.per_example = dict(fixed or {}), dict(per_example or {})
        self.autocast, self.budget = arguments.checked_dtype(autocast), arguments.checked_budget(budget, model)
        self.schedule, self.objective_mode = schedule, objective_mode
        self.trace, self.compile, self.gather = trace, compile, gather
        self.optimizer_state = made if optimizer_state is None else optimizer_state
        self._costs: Costs | None = None  # measured by the last metagradient
        self._residuals = 0  # bytes that a captured step can keep, as measured
        self._small = True  # as far as is known
        self._evaluator = evaluator_for(model, loss, trace, compile)
        self._anchor: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        """The number of training steps."""
        return len(self.batches)

    def __repr__(self) -> str:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        model = f"{type(self.model).__name__} with {trained:,} trained parameters"
        return f"TrainingFunction({model}, {len(self):,} steps, {self.optimizer!r})"

    # --- public ------------------------------------------------------------------------------------------------

    def train(
        self,
        z: Mapping[str, Any] | None = None,
        *,
        progress: bool = False,
        resume: str | os.PathLike[str] | None = None,
    ) -> Trained:
        """Train without a gradient. resume: a directory in which an interrupted training is, as in `metagradient`."""
        resume = None if resume is None else path_of(resume)
        with self._guarded(progress) as tick:

            def run() -> Trained:
                sweep = self._sweep(z or {}, tick, resume=resume)
                with sweep.storage.closed_after_errors():
                    self._forward(sweep, z or {})
                sweep.storage.finish()
                return sweep.own_trained()

            return patiently(run)

    def value(self, z: Mapping[str, Any] | None = None, *, progress: bool = False) -> Tensor:
        """The objective after training, without a gradient: `[]` or `[k]`."""
        with self._guarded(progress) as tick:
            return patiently(lambda: self._objective(self._sweep(z or {}, tick), z or {})[0])

    def metagradient(
        self,
        z: Mapping[str, Any],
        *,
        progress: bool = False,
        resume: str | os.PathLike[str] | None = None,
        profile: str | os.PathLike[str] | None = None,
    ) -> Metagradient:
        """The objective after training with `z`, and its exact gradient with respect to every entry of `z`.

        resume: a directory that holds the log, the snapshots and the state of the sweep, so that the same call
            continues an interrupted one: it repeats at most 50 steps of either sweep and gives the same bits. The
            directory is empty again when the call returns.
        profile: a file that receives every operator's time as a Chrome trace, with the phases of the report marked in
            it (some MB per second; open it in chrome://tracing or ui.perfetto.dev). A profiled run takes longer.
        """
        resume = None if resume is None else path_of(resume)
        with chrome_trace(profile), self._guarded(progress) as tick:
            sweep, grads = patiently(lambda: self._reversed(self._trained(z, tick, resume), z))
            assert sweep.value is not None and sweep.trained is not None
            if sweep.value.ndim == 0:
                grads = tree_map(lambda g: g[0], grads)
            trained, stats = sweep.own_trained(), sweep.storage.stats
            self._residuals = sweep.residuals.step_bytes
            self._costs = sweep.timings.costs(stats, sweep.arena.device) or self._costs
            state = trained.optimizer_state if sweep.keep_slots else None
            results = trained.model_state, trained.losses, report_of(sweep), state, trained.share
            return Metagradient(sweep.value, grads, *results)

    def jvp(
        self, z: Mapping[str, Any], dz: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, progress: bool = False
    ) -> Jvp:
        """The objective after training with `z`, and its derivative along `dz`, by one sweep forward.

        Memory does not grow with the number of steps, and an objective may have any number of outputs. Where every
        output's derivative with respect to few numbers is wanted, this is the way; where one output's with respect to
        many, `metagradient`.

        dz: tensors for some keys of z, of their shapes; or a list of m such directions, which gives the tangents a
            first dimension `[m]`. A further direction costs about two trainings.
        """
        directions = arguments.checked_directions(dz)
        with self._guarded(progress) as tick:
            self.ranks.check_same(lambda: leaf_digests("dz", [dict(each) for each in directions]))

            def run() -> tuple[Any, Tensor, list[Tensor]]:
                sweep = self._sweep(z, tick, kind=functools.partial(ForwardSweep, directions=directions))
                return sweep, *self._objective(sweep, z)

            sweep, value, tangents = patiently(run)
            models, trained = sweep.model_tangents(), sweep.forward()
            tangent, model = torch.stack(tangents), {n: torch.stack([m[n] for m in models]) for n in models[0]}
            if isinstance(dz, Mapping):
                tangent, model = tangent[0], {name: x[0] for name, x in model.items()}
            return Jvp(value, tangent, model, trained, report_of(sweep))

    def __call__(self, z: Mapping[str, Any]) -> Tensor:
        """The objective as a node of the autograd graph: `backward` fills the gradients of the tensors in `z`."""
        if not isinstance(z, Mapping):
            raise BadMetaparameter(f"expected z to map names to tensors; got {type(z).__name__}")
        leaves, spec = tree_flatten(dict(z))
        return DifferentiableTraining.apply(self, spec, *leaves)

    def plan(self) -> Plan:
        """What a metagradient will store where, and what it will cost."""
        return self._plan_request(self._shards(Arena.of(self.model)), dict(self.model.named_buffers())).plan()

    def identity(self, z: Mapping[str, Any], objectives: Iterable[Objective] | None = None) -> dict[str, str]:
        """Digests, by name, of what a metagradient at `z` depends on, as far as can be told without running it (see
        `mgd.identity`). It reads all batches, and evaluates a step and the objective, or those in its place."""
        with self._guarded(alone=True):
            return self._identity(z, (self.objective,) if objectives is None else objectives)

    def anchored(self, z: Mapping[str, Any]) -> TrainingFunction:
        """With `since`, the function of which a metagradient at `z` is the derivative there: its steps before the last
        `since` ones train with this `z`, whatever it is given."""
        if self.since is None:
            return self
        f = self.replaced()
        f._anchor = z
        return f

    # --- private -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _guarded(self, progress: bool = False, alone: bool = False) -> Iterator[Callable[..., None]]:
        """Calls from other threads wait; generators, modes and the model are as before at the end. alone: other ranks
        need not make the same call. Yields the progress bar's tick."""
        with (
            turn(self.model),
            contextlib.nullcontext() if alone else self.ranks.call(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.set_multithreading_enabled(False),  # a device's own thread would add in another order
            Progress(len(self), progress and self.ranks.rank == 0) as bar,
        ):
            yield bar.tick

    def _start(self, z: Mapping[str, Any]) -> Start:
        return start_of(self, z, self._anchor, self._evaluator, self._shards)

    def _sweep(
        self,
        z: Mapping[str, Any],
        tick: Callable[..., None] = no_tick,
        reversible: bool = False,
        resume: str | os.PathLike[str] | None = None,
        kind: Callable[..., Sweep] | None = None,
    ) -> Any:
        """A training at step 0, or where an interrupted one in `resume` is. reversible: with what a way back needs.
        kind: None: that of the sweeps back which is the fastest."""
        name = getattr(kind or Sweep, "__name__", "jvp")
        call = name, reversible, resume and os.fspath(resume), self.gather
        start = self._start(z)
        code = functools.partial(code_of, self.model, self.loss, self.objective)
        self.ranks.check_same(
            lambda: code() | given(start, self.optimizer, settings_of(self, self._anchor) | {"the call": call})
        )
        shards = start.step.shards
        request = self._plan_request(shards, start.buffers)
        small = kind is None and self._small and reversible and resume is None
        room = room_for(start.step, start.meta, request) if small else 0
        kind = kind or (ResidentSweep if room else Sweep)
        if room or (not reversible and resume is None):
            storage = no_storage(request, room)
        else:
            objectives = (self.objective,) if reversible else ()
            kept = None if resume is None else Resume(resume, self._identity(z, objectives), reversible)
            storage = open_storage(replace(request, memory=self.ranks.memory()), shards, kept)
        with storage.closed_after_errors():
            return kind(
                start.step,
                self.optimizer,
                start.meta,
                shards.state(start.state),
                start.buffers,
                storage,
                max_grad_norm=self.max_grad_norm,
                keep_slots=not reversible or self.optimizer_state is not None,
                gather=self.gather or name == "jvp",
                behind=(self.optimizer_state or {}).get("skipped", {}),
                tick=tick,
            )

    def _trained(
        self,
        z: Mapping[str, Any],
        tick: Callable[..., None] = no_tick,
        resume: str | os.PathLike[str] | None = None,
        kind: type[Sweep] | None = None,
    ) -> Sweep:
        """A training run to its end, on which the reverse sweep can run once."""
        try:
            return self._run_to_its_end(self._sweep(z, tick, reversible=True, resume=resume, kind=kind), z, resume)
        except NotResident:
            self._small = False
        return self._trained(z, tick)

    def _run_to_its_end(self, sweep: Sweep, z: Mapping[str, Any], resume: str | os.PathLike[str] | None) -> Sweep:
        with sweep.storage.closed_after_errors():
            if sweep.value is None:
                sweep.begin_reverse(*self._objective(sweep, z))
            elif not torch.equal(sweep.value, self._at_end(sweep).value()):
                assert resume is not None
                raise StaleRun(os.fspath(resume), ["the objective at the trained parameters"])
            sweep.own_trained()
            arguments.warn_of_noise(self.optimizer, sweep.meta.hypers, sweep.shards, sweep.state)
        return sweep

    def _reversed(
        self, sweep: Sweep, z: Mapping[str, Any], weights: list[float] | None = None
    ) -> tuple[Sweep, dict[str, Any]]:
        """The sweep, and gradients of the objectives whose adjoints it holds, `[k, ...]`; its storage is closed then.

        weights: the objective is this sum of several. Errors of lost numbers are as in `_forward`.
        """
        try:
            if weights is not None:
                assert sweep.value is not None
                self.ranks.check_same(lambda: {"the cotangent of the objective": digest(weights)})
                sweep.begin_reverse(sweep.value, [weighted_sum(sweep.adjoints, weights)])
                sweep.gather = True
            with sweep.storage.closed_after_errors():
                gradients = sweep.reverse()
        except NonFiniteState:
            if not isinstance(sweep, WatchedSweep):
                self._reversed(self._trained(z, kind=WatchedSweep), z, weights)
            raise
        sweep.storage.finish()
        return sweep, gradients

    def _forward(self, sweep: Sweep, z: Mapping[str, Any]) -> Trained:
        """Train to the end. Errors of lost numbers name the first of them, if the training repeats itself."""
        try:
            return sweep.forward()
        except NonFiniteState as error:
            if error.where == LOST:
                self._sweep(z, kind=WatchedSweep).forward()
            raise

    def _at_end(self, sweep: Sweep) -> TrainedObjective:
        """The objective at the end of a training that ran until there, in its own stream of random numbers."""
        assert sweep.trained is not None
        seed_generators(seed_of(self.seed, sweep.state.before + len(self)), sweep.arena.device)
        loss, how = sweep.step.loss, (len(self), self.objective_mode)
        return TrainedObjective(loss.binding, self.objective, sweep.trained, *how, loss.written)

    def _objective(self, sweep: Sweep, z: Mapping[str, Any]):
        """What `derivatives_of` returns at the end of the training, which runs until there."""
        self._forward(sweep, z)
        with sweep.timings.timed("objective"):
            found = sweep.derivatives_of(self._at_end(sweep))
            self.ranks.check_same(lambda: {"the objective's value": digest(found[0])})
            return found

    def _shards(self, arena: Arena) -> Shards:
        return shards_of(self.ranks, arena, self.microbatches, self.optimizer.elementwise)

    def _plan_request(self, shards: Shards, buffers: Buffers) -> PlanRequest:
        how = self.microbatches, self.budget, self._costs, self.schedule, self._residuals
        origin = arguments.origin(len(self), self.since)
        return PlanRequest(len(self), shards.longest(self.ranks.size), self.optimizer, buffers, *how, origin)

    def _identity(self, z: Mapping[str, Any], objectives: Iterable[Objective]) -> dict[str, str]:
        return identity_of(self._start(z), self.optimizer, objectives, settings_of(self, self._anchor))
