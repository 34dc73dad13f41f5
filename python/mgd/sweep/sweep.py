"""The two sweeps: training forward while the plan's log and snapshots are kept, then the adjoint backward.

Going back over step t we hold the state s_t, the adjoint of s_{t+1} and the logged gradient g_t. The optimizer's VJP
gives the direct part of the adjoint of s_t, the cotangent u_t of g_t and those of the hyperparameters; the second
derivatives of the loss in direction u_t give the rest (arXiv 2503.13751, section 3, with the log of gradients in place
of stored states).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mgd.errors import BadObjective, NonFiniteState, ReplayDivergence
from mgd.plan.actions import Action, Advance, Drop, Load, Reverse, Save
from mgd.results import Trained
from mgd.step.metaparameters import Gradients, Metaparameters
from mgd.step.model import Binding, differentiable, modes_kept
from mgd.step.step import StepFunction, StepResult
from mgd.sweep.checkpoint import RunCheckpoint
from mgd.sweep.history import History
from mgd.sweep.prefetch import Prefetcher
from mgd.sweep.residuals import ResidualCache
from mgd.util.profiler import phase
from mgd_kernels import Optimizer, OptimizerState
from mgd_kernels.dispatch import dot

CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


@dataclass
class Adjoint:
    """Cotangents of a training state: of the optimizer's tensors and of the floating-point buffers."""

    state: OptimizerState
    buffers: list[Tensor]


@dataclass
class Timings:
    """Seconds and counts by kind of work, filled while the sweeps run.

    phases: seconds of the plan's phases (see `Plan.phases`). firsts: of each kind of work, how long the first time
    took, and how often it was done.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter = field(default_factory=Counter)
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    firsts: dict[str, tuple[float, int]] = field(default_factory=dict)
    _timers: dict[str, _Timer] = field(default_factory=dict)

    def timed(self, phase: str) -> _Timer:
        if phase not in self._timers:
            self._timers[phase] = _Timer(self.seconds, phase, self.firsts)
        return self._timers[phase]

    def mean(self, phase: str) -> float:
        """Seconds each time; the first is left out, since it warms up, or makes a trace."""
        first, times = self.firsts.get(phase, (0.0, 0))
        return (self.seconds[phase] - first) / (times - 1) if times > 1 else first


class _Timer:
    """Adds the seconds of blocks to those of a phase, which it marks in a profile; blocks of one timer do not nest."""

    def __init__(self, seconds: dict[str, float], phase: str, firsts: dict[str, tuple[float, int]] | None = None):
        self.seconds, self.phase, self.firsts = seconds, phase, firsts

    def __enter__(self) -> None:
        self.mark = phase(self.phase)
        if self.mark is not None:
            self.mark.__enter__()
        self.start = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        seconds = time.perf_counter() - self.start
        self.seconds[self.phase] += seconds
        if self.firsts is not None:
            known = self.firsts.get(self.phase)
            self.firsts[self.phase] = (seconds, 1) if known is None else (known[0], known[1] + 1)
        if self.mark is not None:
            self.mark.__exit__(*error)


class Sweep:
    """Interprets the actions of a plan on one training.

    The current state is `self.state` with `self.buffers` at step `self.state.step`. tape: what is kept; memory alone
    unless another one is put in its place. shelf: what the joint graphs of logged steps have computed for their second
    derivatives. continued: the end is a beginning, too, so its optimizer state is kept. index: how many actions of the
    plan are done. reversed: how many steps the reverse sweep has behind it. trained: the end of the training, once it
    is reached. adjoints, gradients: of the reverse sweep, once it has begun.
    """

    def __init__(
        self,
        steps: StepFunction,
        optimizer: Optimizer,
        meta: Metaparameters,
        state: OptimizerState,
        max_grad_norm: float | None,
        tick: Callable[..., None],
    ):
        self.steps, self.optimizer, self.meta = steps, optimizer, meta
        self.max_grad_norm, self.tick = max_grad_norm, tick
        self.arena = steps.arena
        self.state = state
        self.buffers = steps.binding.buffers()
        self.length = len(steps.batches)
        self.continued = False
        self.losses = torch.zeros(self.length, steps.microbatches, dtype=torch.float64)
        self._losses = self.losses.numpy()  # of the same memory; to write a number through torch takes 5 µs
        self.visited = 0
        self.tape = History(None, self.buffers, None, steps.microbatches)
        self.shelf = ResidualCache()
        self.measured = Timings()
        self.index = 0
        self.reversed = 0
        self.trained: Trained
        self.adjoints: list[Adjoint] = []
        self.gradients: Gradients | None = None
        self.journal: RunCheckpoint | None = None

    # --- forward -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """All steps, keeping nothing."""
        self._advance(self.length, None)
        self.complete()

    def forward(self, actions: Iterator[Action]) -> None:
        """Perform the plan's actions until the training is complete."""
        with _Timer(self.measured.phases, "first sweep"):
            while self.state.step < self.length:
                self._perform(next(actions))
                self.index += 1
        self.complete(self.continued)

    def complete(self, slots: bool = True) -> None:
        """The current state is the end of the training. slots: keep the optimizer's, too."""
        views = self.arena.views
        kept = zip(self.optimizer.slots, self.state.slots, strict=True) if slots else ()
        self.trained = Trained(
            parameters={name: p.clone() for name, p in views(self.state.params).items()},
            buffers={name: b.clone() for name, b in self.buffers.items()},
            optimizer_state={"step": self.state.next_count - 1}
            | {slot: {n: t.clone() for n, t in views(flat).items()} for slot, flat in kept},
            losses=self.losses.sum(1),
        )

    def _perform(self, action: Action) -> None:
        if isinstance(action, Advance):
            self._advance(action.stop, action.log)
        elif isinstance(action, Save):
            with self.measured.timed("store"):
                self.tape.save(self.state, self.buffers, action.tier)
        elif isinstance(action, Load):
            with self.measured.timed("store"):
                self.buffers = self.tape.load(action.step, self.state)
        elif isinstance(action, Drop):
            self.tape.drop(action.step)
        else:
            raise TypeError(f"unknown action {action!r}")

    def _advance(self, stop: int, tier: str | None) -> None:
        """Run to `stop`, by logged gradients where there are, else by the model; then log them on `tier`, if any."""
        while (t := self.state.step) < stop:
            if self.tape.logged(t):
                self._rebuild(stop)
                continue
            again = self.gradients is not None
            with _Timer(self.measured.phases, "replay") if again else contextlib.nullcontext():
                self._train(t, tier)
            if self.journal is not None:
                self.journal.reached(self)

    def _train(self, t: int, tier: str | None) -> None:
        """One step by the model, logged on `tier`, if any."""
        step = self._evaluate(t, self.tape.blank(self.arena, tier))
        kept, step.kept = step.kept, None
        if tier is not None:
            if kept is not None:
                self.shelf.put(t, kept)
            with self.measured.timed("store"):
                self.tape.log(t, step, tier)
        with self.measured.timed("update"):
            self.optimizer.step_(self.state, step.gradient, self.meta.tables[t], self._clip(step)[0])
        self.buffers = step.buffers[-1]

    def _rebuild(self, stop: int) -> None:
        """Advance over logged steps by their updates, in one pass as many as can be had at a time."""
        start = self.state.step
        with self.measured.timed("store"):
            run = self.tape.run(start, stop)
        with self.measured.timed("rebuild"):
            self.optimizer.replay_(
                self.state,
                [step.gradient for step in run],
                self.meta.hypers[start : start + len(run)],
                [self._clip(step)[0] for step in run],
            )
        self.buffers = run[-1].buffers[-1]
        self.measured.counts["rebuilt steps"] += len(run)

    def _evaluate(self, t: int, into: Tensor | None = None) -> StepResult:
        first = t >= self.visited
        with self.measured.timed("training" if first else "replay"):
            evaluated = self.steps.gradient(t, self.state.params, self.buffers, self.meta, into)
        self.measured.counts["model steps"] += 1
        losses = evaluated.losses
        if first:
            values = losses.tolist()
            if not all(map(math.isfinite, values)):
                raise NonFiniteState(t, "the loss")
            self._losses[t] = values
            self.visited = t + 1
            self.tick("train")
        elif not torch.equal(self.losses[t], losses):
            i = int((self.losses[t] != losses).nonzero()[0])
            raise ReplayDivergence(t, self.steps.diagnose(t, i, float(self.losses[t, i]), float(losses[i])))
        return evaluated

    def _clip(self, step: StepResult) -> tuple[float, float]:
        """The factor of global-norm clipping, and its derivative's coefficient: d factor/dg = coefficient g."""
        if self.max_grad_norm is None:
            return 1.0, 0.0
        if step.norm is None:
            step.norm = float(dot(step.gradient, step.gradient)) ** 0.5
        norm = step.norm
        factor = self.max_grad_norm / (norm + CLIP_EPSILON)
        if factor >= 1.0:
            return 1.0, 0.0
        return factor, -factor / (norm + CLIP_EPSILON) / norm

    # --- backward ----------------------------------------------------------------------------------------------

    def zero_adjoint(self) -> Adjoint:
        buffers = [torch.zeros_like(self.buffers[name]) for name in differentiable(self.buffers)]
        return Adjoint(self.state.zeros_like(), buffers)

    def begin_reverse(self, adjoints: list[Adjoint]) -> None:
        """From the adjoints of the final state, which become those of the first."""
        self.adjoints = adjoints
        self.gradients = Gradients(self.meta, len(adjoints))

    def reverse(self, actions: Iterator[Action]) -> Gradients:
        """Perform the rest of the plan."""
        begin = time.perf_counter()
        gradients = self.gradients
        assert gradients is not None, "begin_reverse comes first"
        directions = [torch.zeros_like(self.state.params) for _ in self.adjoints]
        for action in actions if self.tape.store is None else Prefetcher(actions, self.tape, self.state.step):
            if isinstance(action, Reverse):
                self._reverse_step(action.step, self.adjoints, directions, gradients)
                self.reversed += 1
                self.tick("reverse")
                if action.step == self.meta.first_step:
                    break
            else:
                self._perform(action)
            self.index += 1
            if self.journal is not None and isinstance(action, Reverse):
                self.journal.reached(self)
        self.measured.phases["reverse sweep"] = time.perf_counter() - begin - self.measured.phases["replay"]
        if not gradients.finite([adjoint.state.params for adjoint in self.adjoints]):
            raise NonFiniteState(self.meta.first_step, "the metagradient")
        return gradients

    def _reverse_step(self, t: int, adjoints: list[Adjoint], directions: list[Tensor], gradients: Gradients) -> None:
        logged = self.tape.logged(t)
        with self.measured.timed("store"):
            step = self.tape.read(t) if logged else None
        step = step or self._evaluate(t)
        if logged:
            self.tape.forget(t)
        step.kept = self.shelf.take(t) or step.kept
        scale, clip = self._clip(step)
        with self.measured.timed("optimizer vjp"):
            for j, adjoint in enumerate(adjoints):
                out = self.optimizer.vjp_table_(
                    self.state, step.gradient, self.meta.tables[t], adjoint.state, directions[j], scale
                )
                if not gradients.add_hyper(j, t, out):
                    raise NonFiniteState(t, "the adjoint")
                if clip:
                    directions[j].add_(step.gradient, alpha=clip * float(out[:, -1].sum()))
        if t == self.meta.first_step and not self.meta.reads_at(t):
            return

        def add(j, with_parameters, slices, with_slices):
            pairs = [
                (x, dx if dx.dtype == x.dtype else dx.to(x.dtype))
                for x, dx in zip(self.arena.slices(adjoints[j].state.params), with_parameters, strict=True)
                if dx is not None
            ]
            if pairs:
                torch._foreach_add_([x for x, _ in pairs], [dx for _, dx in pairs])
            gradients.add(j, slices, with_slices)

        with self.measured.timed("hvp"):
            before = self.steps.second_derivatives(
                t, self.state.params, step, self.meta, directions, [a.buffers for a in adjoints], add
            )
        for adjoint, buffers in zip(adjoints, before, strict=True):
            adjoint.buffers = buffers
        self.measured.counts["hvps"] += len(adjoints)


def objective_adjoints(
    binding: Binding, objective: Callable[..., Tensor], sweep: Sweep
) -> tuple[Tensor, list[Adjoint]]:
    """The objective's value at the trained state (`[]` or `[k]`) and, for each component, its adjoint."""
    state, arena = sweep.state, sweep.arena
    names = differentiable(sweep.buffers)
    parameters = [view.detach().requires_grad_() for view in arena.views(state.params).values()]
    floats = [sweep.buffers[name].detach().clone().requires_grad_() for name in names]
    copies = {n: b.clone() for n, b in sweep.buffers.items()} | {
        n: b.clone() for n, b in zip(names, floats, strict=True)
    }
    versions = [p._version for p in parameters]
    with modes_kept(binding.model), contextlib.ExitStack() as stack:
        value = _checked(binding.call(objective, parameters, copies, until=stack)[0], sweep.length)
        if [p._version for p in parameters] != versions:
            raise BadObjective("the objective changed parameters in place; expected it to only read them")
        found = [
            torch.autograd.grad(component, [*parameters, *floats], retain_graph=True, allow_unused=True)
            for component in value.reshape(-1)
        ]
    adjoints = []
    for grads in found:
        if all(g is None for g in grads):
            raise BadObjective("a component of the objective depends on no trained parameter")
        adjoint = state.zeros_like()
        pairs = [(x, g) for x, g in zip(arena.slices(adjoint.params), grads, strict=False) if g is not None]
        if pairs:
            torch._foreach_copy_([x for x, _ in pairs], [g for _, g in pairs])
        buffers = [torch.zeros_like(b) for b in floats]  # memory of its own: a gradient may be a view with stride 0
        for b, g in zip(buffers, grads[len(parameters) :], strict=True):
            if g is not None:
                b.copy_(g)
        adjoints.append(Adjoint(adjoint, buffers))
    return value.detach(), adjoints


def _checked(value: Any, steps: int) -> Tensor:
    """The objective's value, if it is one."""
    if not isinstance(value, Tensor) or value.ndim > 1 or value.numel() == 0 or not value.is_floating_point():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise BadObjective(f"expected the objective to be a floating-point tensor of shape [] or [k]; got {got}")
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteState(steps, "the objective")
    if not value.requires_grad:
        raise BadObjective(
            "the objective does not depend on the trained parameters: compute it from the model it is given, without "
            "torch.no_grad() or .detach()"
        )
    return value


def weighted_sum(adjoints: list[Adjoint], weights: list[float]) -> Adjoint:
    """The adjoint of the weighted sum of the objectives, in the place of the first one's."""
    total = adjoints[0]
    tensors = [*total.state.tensors(), *total.buffers]
    torch._foreach_mul_(tensors, weights[0])
    for adjoint, weight in zip(adjoints[1:], weights[1:], strict=True):
        torch._foreach_add_(tensors, [*adjoint.state.tensors(), *adjoint.buffers], alpha=weight)
    return total
