"""The two sweeps: training forward while the plan's log and snapshots are kept, then the adjoint backward.

Going back over step t we hold the state s_t, the adjoint of s_{t+1} and the logged gradient g_t. The optimizer's VJP
gives the direct part of the adjoint of s_t, the cotangent u_t of g_t and those of the hyperparameters; the second
derivatives of the loss in direction u_t give the rest (arXiv 2503.13751, section 3, with the log of gradients in place
of stored states).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mgd.errors import NonFiniteState
from mgd.plan.actions import Action, Advance, Drop, Load, Reverse, Save
from mgd.results import Trained
from mgd.step.metaparameters import Gradients, Metaparameters
from mgd.step.model import Buffers
from mgd.step.step import Add, StepFunction, StepResult
from mgd.sweep import record
from mgd.sweep.adjoint import Adjoint, TrainedObjective
from mgd.sweep.clipping import Clipping
from mgd.sweep.growth import AdjointGrowth
from mgd.sweep.prefetch import Prefetcher
from mgd.sweep.storage import Storage
from mgd.sweep.timings import Timings
from mgd.sweep.updates import Updates
from mgd.util.finite import all_finite
from mgd.util.system import MUCH, return_freed_memory
from mgd_kernels import Optimizer, OptimizerState

LOST = "a parameter, at this step or before it,"  # where only its effect was seen; `WatchedSweep` says more


class Sweep:
    """One training, forward by the actions of its storage's plan and backward by the rest of them.

    The current state is `state` with `buffers` at step `state.step`; flat buffers, here and in the history, are this
    process's part (`mgd.ranks.shards`). keep_slots: the end may be the beginning of another training, so its optimizer
    state is part of the result. behind: how often earlier trainings skipped parameters, by name. gather: results are
    whole, not this process's share. index: actions of the plan that are done.
    visited, reversed: steps that each sweep has behind it. trained, value: the end of the training and the objective
    there, once they are known; then `adjoints`, `gradients` and `growth` are those of the reverse sweep, and at its
    end `adjoint_norms`.
    """

    def __init__(
        self,
        step: StepFunction,
        optimizer: Optimizer,
        meta: Metaparameters,
        state: OptimizerState,
        buffers: Buffers,
        storage: Storage,
        *,
        max_grad_norm: float | None = None,
        keep_slots: bool = False,
        gather: bool = True,
        behind: Mapping[str, int] | None = None,
        tick: Callable[..., None] = lambda phase, steps=1: None,
    ):
        self.step, self.optimizer, self.meta = step, optimizer, meta
        self.arena, self.shards, self.state, self.buffers = step.arena, step.shards, state, buffers
        self.storage, self.history, self.residuals = storage, storage.history, storage.residuals
        self.keep_slots, self.gather, self.tick, self.reads = keep_slots, gather, tick, step.loss.reads
        self.updates = Updates(optimizer, step.shards, behind or {})
        self.clipping = Clipping(max_grad_norm, self.shards, self.reads)
        self.length = len(step.batches)
        self.losses = torch.zeros(self.length, step.microbatches, dtype=torch.float64, device="cpu")
        self._losses = self.losses.numpy()  # of the same memory; to write a number through torch takes 5 µs
        self.timings = Timings(self.arena.device)
        self.index = self.visited = self.reversed = 0
        self.trained: Trained | None = None
        self.value: Tensor | None = None
        self.adjoints: list[Adjoint] = []
        self.gradients: Gradients | None = None
        self.growth: AdjointGrowth | None = None
        self.adjoint_norms: Tensor | None = None
        if storage.checkpoint is not None:
            record.restore(self, *storage.checkpoint.load())
        plan = storage.plan
        step.loss.compared = plan is not None or storage.checkpoint is not None
        self._expect(0 if plan is None or meta.origin else self.length)
        self._actions = iter(()) if plan is None else itertools.islice(plan.actions(), self.index, None)

    def _expect(self, steps: int) -> None:
        """Tell the evaluator how many steps, all from here on, will be reversed."""
        self.step.evaluator.begin(steps * self.step.microbatches, self.residuals.room)

    # --- forward -----------------------------------------------------------------------------------------------

    def forward(self) -> Trained:
        """Train to the end, keeping what the plan says. `WatchedSweep` says where a NaN came from."""
        if self.trained is None:
            with self.timings.phase("first sweep"), self.reads.settled():
                end = self._train_all()
            self.timings.settle()
            if not self.shards.ranks.every(all_finite(end[0].params)):
                raise NonFiniteState(self.length - 1, LOST)
            self.meta.settle_reads(self.shards.ranks)
            self.meta.check_all_read()
            self.trained = self.result_of(*end)
            if self.storage.checkpoint is not None:
                self.storage.checkpoint.save_trained(record.named_state(*end))
        return self.trained

    def _train_all(self) -> tuple[OptimizerState, Buffers]:
        """Train; with a plan, keeping what it says. Returns the state after the last step, and its buffers."""
        if self.storage.plan is None:
            self._advance(self.length, None)
            return self.state, self.buffers
        while self.state.step < self.length - 1:
            self._perform(next(self._actions))
            self.index += 1
        # The last step is the first to be reversed. So the state before it stays the current one, and its gradient is
        # kept. The state after it has the room that the adjoint will take: there is none yet. By autograd it keeps no
        # graph: evaluated again, it shows whether steps repeat themselves.
        t = self.state.step
        result = self._evaluate(t, room=self.residuals.left if self.step.evaluator.residual_bytes else 0)
        self._keep_residuals(t, result)
        self.history.hold(t, result)
        end = self.state.clone()
        self._update(end, result)
        self._after_step()
        return end, result.buffers[-1]

    def result_of(self, state: OptimizerState, buffers: Buffers) -> Trained:
        """The end of the training, with memory of its own. Its parameters are whole: the objective looks at them."""
        slots = zip(self.optimizer.slots, state.slots, strict=True) if self.keep_slots else ()
        behind = self.updates.behind(state.step)
        return Trained(
            parameters={name: p.clone() for name, p in self.arena.views(self.shards.whole(state.params)).items()},
            buffers={name: b.clone() for name, b in buffers.items()},
            optimizer_state={"step": state.next_count - 1}
            | ({"skipped": behind} if behind else {})
            | {slot: {n: t.clone() for n, t in self._views(flat).items()} for slot, flat in slots},
            losses=self.losses.sum(1),
        )

    def _views(self, part: Tensor) -> dict[str, Tensor]:
        """What results hold of a flat buffer of which this is this process's part, by the names of parameters."""
        return self.arena.views(self.shards.whole(part)) if self.gather else self.shards.shares(part)

    def own_trained(self) -> Trained:
        """The end of the training as results hold it. The objective cannot be evaluated any more, if that is a part."""
        assert self.trained is not None
        if not self.gather and self.trained.share is None:
            share = self.shards.share()
            own = {name: self.trained.parameters[name].reshape(-1)[a:b].clone() for name, (a, b) in share.items()}
            self.trained = replace(self.trained, parameters=own, share=share)
        return self.trained

    def _perform(self, action: Action) -> None:
        if isinstance(action, Advance):
            self._advance(action.stop, action.log)
        elif isinstance(action, Save):
            with self.timings.timed("store"):
                self.history.save(self.state, self.buffers, action.tier)
        elif isinstance(action, Load):
            with self.timings.timed("store"):
                self.buffers = self.history.load(action.step, self.state)
        elif isinstance(action, Drop):
            self.history.drop(action.step)
        else:
            raise TypeError(f"expected an action of a plan; got {action!r}")

    def _advance(self, stop: int, tier: str | None) -> None:
        """Run to `stop`, by logged gradients where there are, else by the model; then log them on `tier`, if any."""
        while (t := self.state.step) < stop:
            if self.history.logged(t):
                self._rebuild(stop)
                continue
            again = self.gradients is not None
            with self.timings.phase("replay") if again else contextlib.nullcontext():
                self._train(t, tier)
            self._after_step()

    def _train(self, t: int, tier: str | None) -> None:
        """One step by the model, logged on `tier`, if any."""
        with self.history.entry(t, tier) as entry:
            result = self._evaluate(t, entry.gradient, self._room(t, tier))
            if tier is not None:
                self._keep_residuals(t, result)
                with self.timings.timed("store"):
                    entry.commit(result)
            else:
                result.residuals = None
        self._update(self.state, result)
        self.buffers = result.buffers[-1]

    def _room(self, t: int, tier: str | None) -> int:
        """Bytes that step `t` may keep for its second derivatives. Those of the first step are not wanted where only
        hyperparameters are: there it is seen what they would take."""
        if tier is None:
            return 0
        alone = not (self.meta.loss_keys or self.meta.wants_initial)
        least = len(self.shards.own)  # a byte for each
        return min(least, self.residuals.left) if alone and t == self.meta.origin else self.residuals.left

    def _keep_residuals(self, t: int, result: StepResult) -> None:
        """Move what step `t` computed for its second derivatives to where there may be room for it."""
        self.residuals.missed(result.not_kept)
        if result.residuals is not None:
            self.residuals.put(t, result.residuals)
            result.residuals = None

    def _update(self, state: OptimizerState, result: StepResult) -> None:
        """Advance `state` by one step with the gradient of `result`."""
        with self.timings.timed("update"):
            scale = self.clipping.factor(state.step, result.gradient)
            self.updates.step_(state, result.gradient, self.meta.tables[state.step], scale)

    def _rebuild(self, stop: int) -> None:
        """Advance over logged steps by their updates, as many in one pass as are available."""
        start = self.state.step
        with self.timings.timed("store"):
            run = self.history.run(start, stop)
        with self.timings.timed("rebuild"):
            self.updates.replay_(
                self.state,
                [result.gradient for result in run],
                self.meta.resident[start : start + len(run)],
                [self.clipping.factor(t, result.gradient) for t, result in enumerate(run, start)],
            )
        self.buffers = run[-1].buffers[-1]
        self.timings.counts["rebuilt steps"] += len(run)

    def _evaluate(self, t: int, into: Tensor | None = None, room: int | None = None) -> StepResult:
        """room: for residuals, as of `StepFunction.gradient`."""
        first, captured = t >= self.visited, self.step.evaluator.capture_seconds
        work = "training" if first else "replay"
        if first and t == self.meta.origin > 0 and self.storage.plan is not None:
            self._expect(self.length - t)
        with self.timings.timed(work):
            result = self.step.gradient(t, self.state.params, self.buffers, self.meta, into, room)
        self.updates.skip(t, result.skipped)
        if captured := self.step.evaluator.capture_seconds - captured:
            self.timings.move(captured, work, "capture")
        self.timings.counts["model steps"] += 1
        if first:
            self._note_losses(t, result)
        else:
            self.reads.later(result.losses, lambda values: self._compare(t, values))
        return result

    def _compare(self, t: int, losses: list[float]) -> None:
        """Raises ReplayDivergence unless these are the losses that step `t` had at first."""
        for i, (first, now) in enumerate(zip(self._losses[t].tolist(), losses, strict=True)):
            if first != now:
                raise self.step.diverged(t, i, first, now, self.meta)

    def _note_losses(self, t: int, result: StepResult) -> None:
        """Record the losses of step `t`, which is made for the first time."""

        def look(values: list[float]) -> None:
            if not all(map(math.isfinite, values)):
                raise NonFiniteState(t, "the loss" if all_finite(self.state.params) else LOST)
            self._losses[t] = values

        self.reads.later(result.losses, look)
        self.visited = t + 1
        self.tick("train")

    def derivatives_of(self, objective: TrainedObjective) -> tuple[Tensor, list[Adjoint]]:
        """The value of the objective at the end of the training, and its adjoints there."""
        return_freed_memory(MUCH)  # an objective's pieces are not those of steps
        found = objective.adjoints(self.shards, self.state)
        return_freed_memory(MUCH)
        return found

    # --- backward ----------------------------------------------------------------------------------------------

    def begin_reverse(self, value: Tensor, adjoints: list[Adjoint]) -> None:
        """From the objective's value and its adjoints of the final state, which become those of the first."""
        self.value, self.adjoints = value, adjoints
        self.gradients = Gradients(self.meta, len(adjoints), self.shards.ranks)
        self.growth = AdjointGrowth(len(adjoints), self.length, self.shards)

    def reverse(self) -> dict[str, Any]:
        """Perform the rest of the plan. Returns the gradients of the objectives, `[k, ...]`, by the keys of z."""
        with self.reads.settled():
            return self._reverse()

    def _reverse(self) -> dict[str, Any]:
        start = time.perf_counter()
        gradients, growth = self.gradients, self.growth
        assert gradients is not None and growth is not None, "begin_reverse comes first"
        self._go_back(gradients, growth)
        self.reads.settle()
        self.timings.settle()
        self.timings.phases["reverse sweep"] = time.perf_counter() - start - self.timings.phases["replay"]
        gradients.settle()
        initial = [adjoint.state.params for adjoint in self.adjoints]
        if not self.shards.ranks.every(gradients.finite(initial)):
            raise NonFiniteState(self.meta.first_step, "the metagradient")
        self.adjoint_norms = growth.norms()
        growth.warn(self.adjoint_norms)
        return gradients.collect([self._views(x) for x in initial] if self.meta.wants_initial else [])

    def _go_back(self, gradients: Gradients, growth: AdjointGrowth) -> None:
        """From the adjoint of s_T to that of the state before the first step that reads a metaparameter."""
        directions = [torch.zeros_like(self.state.params) for _ in self.adjoints]
        actions = self._actions
        if self.history.store is not None:
            actions = iter(Prefetcher(actions, self.history, self.state.step))
        for action in actions:
            if isinstance(action, Reverse):
                growth.note(action.step, self.adjoints)
                self._reverse_step(action.step, directions, gradients)
                self.reversed += 1
                self.tick("reverse")
                if action.step == self.meta.first_step:
                    break
            else:
                self._perform(action)
            self.index += 1
            if isinstance(action, Reverse):
                self._after_step()

    def _reverse_step(self, t: int, directions: list[Tensor], gradients: Gradients) -> None:
        """From the adjoint of s_{t+1} to that of s_t. directions: memory for the cotangents of the gradient."""
        adjoints, logged = self.adjoints, self.history.logged(t)
        with self.timings.timed("store"):
            result = self.history.read(t) if logged else None
        result = result or self._evaluate(t)
        if logged:
            self.history.forget(t)
        result.residuals = self.residuals.take(t) or result.residuals
        with self.timings.timed("optimizer vjp"):
            self._through_update(t, result.gradient, directions, gradients)
        if t == self.meta.first_step and not self.meta.reads_at(t):
            return

        kind = "hvp, computed again" if result.residuals is None else "hvp, residuals kept"
        with self.timings.timed("hvp"), self.timings.part(kind):
            before = self.step.second_derivatives(
                t,
                self.state.params,
                result,
                self.meta,
                directions,
                [a.buffers for a in adjoints],
                self._adder(t, gradients),
            )
        for adjoint, buffers in zip(adjoints, before, strict=True):
            adjoint.buffers = buffers
        self.timings.counts["hvps"] += len(adjoints)

    def _through_update(self, t: int, gradient: Tensor, directions: list[Tensor], gradients: Gradients) -> None:
        """The adjoint through the optimizer's step. directions: take the cotangents of the gradient."""
        scale = self.clipping.factor(t, gradient)
        wanted = self.meta.hyper_keys if self.clipping.max_norm is None else None
        for j, (adjoint, u) in enumerate(zip(self.adjoints, directions, strict=True)):
            out = self.updates.vjp_(self.state, gradient, self.meta.tables[t], adjoint.state, u, scale, wanted)
            gradients.add_hyper(j, t, out, self.reads)
            self.clipping.add_derivative_(t, gradient, u, out[:, -1])

    def _adder(self, t: int, gradients: Gradients) -> Add:
        """Adds the second derivatives of step `t` to the adjoints, and to the gradients of what it read of z."""

        def add(j: int, with_parameters: Any, with_metaparameters: Any) -> None:
            self.shards.add_(self.adjoints[j].state.params, with_parameters)
            gradients.add(j, t, with_metaparameters)

        return add

    # --- across processes --------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        """After every step of either sweep, where the state is consistent."""
        if self.reads.after_step():
            self.timings.settle()
        if self.storage.checkpoint is not None:
            self.storage.checkpoint.after_step(functools.partial(record.of, self), self.history)
