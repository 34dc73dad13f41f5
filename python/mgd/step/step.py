"""One training step: its gradient, and its second derivatives in given directions.

A step is a pure function of the step number, parameters, buffers and metaparameters: its batch, its random stream and
its microbatches are derived from the number alone, so that it can be evaluated again and give the same bits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mgd.autodiff.joint import JointGraphs, Residuals, is_audited
from mgd.autodiff.second_order import Evaluate, Gradients, Point, Reseed, SecondDerivative, leaves
from mgd.autodiff.traced import Traces
from mgd.errors import BadLoss, MetagradientError, ParametersModified, ReplayDivergence
from mgd.step.batches import microbatches, same, split_tensors
from mgd.step.metaparameters import BatchMetaparameters, Metaparameters
from mgd.step.model import Binding, Buffers, differentiable
from mgd.step.rng import seed_generators, seed_of
from mgd_kernels import Arena


@dataclass
class StepResult:
    """What the first evaluation of a step leaves behind.

    gradient: flat `[n]`, in the dtype in which the model produced it. losses: float64 `[microbatches]` on the CPU, each
    times its share of the batch. buffers: as they stood before each microbatch and after the last one.
    norm: of the gradient, once somebody has computed it. kept: for each microbatch, what its joint graph has computed
    for the second derivatives, where there is one (see `mgd.autodiff.joint`).
    """

    gradient: Tensor
    losses: Tensor
    buffers: list[Buffers]
    norm: float | None = None
    kept: list[Residuals] | None = None


class StepFunction:
    """Evaluates the steps of one training. before: steps made by an earlier one, whose random streams are behind."""

    def __init__(
        self,
        binding: Binding,
        arena: Arena,
        loss: Callable[..., Tensor],
        batches: Sequence[Any],
        microbatches: int,
        seed: int,
        autocast: torch.dtype | None,
        second: SecondDerivative,
        traces: Traces | None = None,
        joints: JointGraphs | None = None,
        before: int = 0,
    ):
        self.binding, self.arena, self.loss, self.batches = binding, arena, loss, batches
        self.microbatches, self.seed, self.autocast, self.second = microbatches, seed, autocast, second
        self.traces, self.joints, self.before = traces, joints, before
        self.evaluations = 0

    def gradient(
        self, t: int, params: Tensor, buffers: Buffers, meta: Metaparameters, into: Tensor | None = None
    ) -> StepResult:
        """Evaluate step `t` at the flat `params`. into: memory for the gradient. Errors name the step."""
        total: Tensor | None = None
        losses, history, kept = [], [buffers], []
        for i, (batch, share) in enumerate(microbatches(self.batches[t], self.microbatches, t)):
            slices = meta.at(batch, t)
            whole = self._joint(t, i, batch, share, slices, params, history[-1]) if self.joints else None
            if whole is None:
                loss, grads, after = self._eager(t, i, batch, share, slices, params, history[-1])
            else:
                loss, grads, after, own = whole
                kept.append(own)
            total = self._accumulate(total, grads, into)
            losses.append(loss.detach().double())
            history.append(after)
        self.evaluations += 1
        assert total is not None  # there is at least one microbatch
        values = torch.stack(losses).cpu() if len(losses) > 1 else losses[0].cpu().reshape(1)
        return StepResult(total, values, history, kept=kept if len(kept) == len(losses) else None)

    def _eager(
        self, t: int, i: int, batch: Any, share: float, slices: BatchMetaparameters, params: Tensor, before: Buffers
    ) -> tuple[Tensor, Sequence[Tensor | None], Buffers]:
        """The loss of one microbatch, its gradient, and the buffers after it, by autograd."""
        parameters = leaves(self.arena.tensors(params))
        given = [*parameters, *self.binding.frozen, *slices.tensors]
        versions = [tensor._version for tensor in given]
        copies = {name: b.clone() for name, b in before.items()}
        # What is asked of a tensor while the model is bound goes through Python: the checks come afterwards.
        with contextlib.ExitStack() as stack:
            try:
                self._seed(t, i)
                loss, left = self._run(t, share, batch, slices, parameters, copies, slices.tensors, stack)
                if not loss.requires_grad:
                    self._check_unmodified(t, given, versions, len(parameters))
                    raise BadLoss(f"the loss of step {t} does not depend on the parameters; was it detached?")
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            except RuntimeError as error:
                self._check_unmodified(t, given, versions, len(parameters))
                if "leaf Variable" in str(error) and not isinstance(error, MetagradientError):
                    raise ParametersModified(t) from error
                raise
        self._check_unmodified(t, given, versions, len(parameters))
        return loss, grads, _settled(before, copies, left)

    def _check_unmodified(self, t: int, tensors: Sequence[Tensor], versions: list[int], parameters: int) -> None:
        """Raises where the loss has changed its parameters, the first of these tensors, or what else it was given."""
        if [tensor._version for tensor in tensors] == versions:
            return
        for k, (tensor, version) in enumerate(zip(tensors, versions, strict=True)):
            if tensor._version != version:
                frozen = parameters + len(self.binding.frozen)
                what = "parameters that do not require a gradient" if k < frozen else "metaparameters"
                raise ParametersModified(t, "parameters" if k < parameters else what)

    def _evaluation(
        self,
        t: int,
        batch: Any,
        share: float,
        slices: BatchMetaparameters,
        before: Buffers,
        stack: contextlib.ExitStack,
    ) -> tuple[Evaluate, list[str], list[Tensor], tuple[Any, ...]]:
        """One microbatch as a function of tensors alone, the names of the buffers in its order, its constants, and
        what it is given beside tensors, as hashable values. The buffers that can carry an adjoint are no constants."""
        names = differentiable(before)
        others = [name for name in before if name not in names]
        batch_tensors, rest, rebuild = split_tensors(batch)

        def evaluate(p, b, z, constants):
            buffers = dict(zip(names, b, strict=True))
            buffers |= {name: tensor.clone() for name, tensor in zip(others, constants, strict=False)}
            loss, left = self._run(t, share, rebuild(constants[len(others) :]), slices, p, buffers, z, stack)
            return loss, [left[name] for name in (*names, *others)]

        constants = [before[name] for name in others] + batch_tensors
        return evaluate, [*names, *others], constants, (share, slices.structure, rest)

    def _key(self, given: tuple[Any, ...], fixed: Sequence[Tensor]) -> tuple[Any, ...]:
        """All that a graph of an evaluation depends on."""
        autocast = torch.is_autocast_enabled(self.arena.device.type)
        modes = tuple([module.training for module in self.binding.modules])
        return (*given, modes, self.binding.names, autocast, tuple([(x.shape, x.stride(), x.dtype) for x in fixed]))

    def _joint(
        self, t: int, i: int, batch: Any, share: float, slices: BatchMetaparameters, params: Tensor, before: Buffers
    ) -> tuple[Tensor, Sequence[Tensor | None], Buffers, Residuals] | None:
        """As `_eager`, by the joint graph, with what it keeps; None where there is none."""
        joints = self.joints
        assert joints is not None
        if joints.refused:
            return None
        stack = contextlib.ExitStack()
        evaluate, names, constants, given = self._evaluation(t, batch, share, slices, before, stack)
        parameters, floats = self.arena.tensors(params), [before[n] for n in names[: len(differentiable(before))]]
        tensors = [*floats, *slices.tensors, *constants]
        key = self._key(given, [*parameters, *tensors])
        joint = joints.graphs.get(key)
        if joint is None:
            loss, grads, _ = self._eager(t, i, batch, share, slices, params, before)
            zeros = [torch.zeros_like(b) for b in floats]
            direction = [p.clone() for p in parameters]
            point = Point(parameters, floats, slices.tensors, constants, [direction], [zeros])
            reseed = functools.partial(self._seed, t, i)
            reseed()
            with stack:
                joint = joints.make(key, evaluate, point, reseed, (loss, grads))
            if joint is None:
                return None
            joint.reads = frozenset(slices.owner.read_at(t))
        elif is_audited(t, len(self.batches)):
            loss, _, _ = self._eager(t, i, batch, share, slices, params, before)
        else:
            loss = None
        slices.owner.note(joint.reads, t)
        self._seed(t, i)
        found, grads, left, kept = joint.first(parameters, tensors)
        kept.slices = slices
        if loss is not None and not joints.accepts(found, loss):
            raise ReplayDivergence(t, self.diagnose(t, i, float(loss.detach()), float(found)))
        after = dict(zip(names, left, strict=True))
        settled = {n: b if torch.equal(b, after[n]) else after[n] for n, b in before.items()}
        return found, grads, settled, kept

    def second_derivatives(
        self,
        t: int,
        params: Tensor,
        step: StepResult,
        meta: Metaparameters,
        directions: Sequence[Tensor],
        buffer_adjoints: list[list[Tensor]],
        add: Callable[[int, list[Tensor | None], BatchMetaparameters, list[Tensor | None]], None],
    ) -> list[list[Tensor]]:
        """Derivatives of `<gradient, direction> + <buffers after, adjoint>` for each direction (flat `[n]`).

        `add(objective, with respect to parameters, slices, with respect to the slices)` receives the terms of every
        microbatch. Returns the adjoints of the buffers before the step. Raises ReplayDivergence where the loss is not
        bit-equal to the first evaluation's.
        """
        parameters = self.arena.tensors(params)
        tangents = [self.arena.tensors(direction) for direction in directions]
        evaluations = microbatches(self.batches[t], self.microbatches, t) if step.kept is None else []
        for i in reversed(range(self.microbatches)):
            before = step.buffers[i]
            names = differentiable(before)
            if step.kept is not None:
                slices, results = self._from_kept(t, i, parameters, step.kept[i], tangents, buffer_adjoints)
            else:
                batch, share = evaluations[i]
                slices = meta.at(batch, t)
                stack = contextlib.ExitStack()
                evaluate, _, constants, given = self._evaluation(t, batch, share, slices, before, stack)
                floats = [before[name] for name in names]
                point = Point(parameters, floats, slices.tensors, constants, tangents, buffer_adjoints)
                reseed = functools.partial(self._seed, t, i)
                reseed()
                with stack:
                    results = self._differentiate(evaluate, point, reseed, given, t, i, step.losses[i])
            p, b = len(parameters), len(parameters) + len(names)
            buffer_adjoints = [
                [torch.zeros_like(before[n]) if a is None else a for n, a in zip(names, result[p:b], strict=True)]
                for result in results
            ]
            for objective, result in enumerate(results):
                add(objective, result[:p], slices, result[b:])
        return buffer_adjoints

    def _from_kept(
        self,
        t: int,
        i: int,
        parameters: list[Tensor],
        kept: Residuals,
        tangents: list[list[Tensor]],
        cotangents: list[list[Tensor]],
    ) -> tuple[BatchMetaparameters, Gradients]:
        """The second derivatives from what the step's joint graph has kept, and the metaparameters it was given."""
        if not kept.unchanged:
            raise ReplayDivergence(t, f"the tensors of microbatch {i} were changed in place since.")
        assert kept.slices is not None
        directions = [(*d, *c) for d, c in zip(tangents, cotangents, strict=True)]
        return kept.slices, kept.joint.later(parameters, kept, directions)

    def _differentiate(
        self,
        evaluate: Evaluate,
        point: Point,
        reseed: Reseed,
        given: tuple[Any, ...],
        t: int,
        i: int,
        expected: Tensor,
    ) -> Gradients:
        """The second derivatives at a point, from a replayed graph where there is one, whose loss is as expected.

        given: what the loss is given beside tensors, as hashable values.
        """
        if self.joints is not None and not self.joints.refused:
            return self._again(point, given, t, i, expected)
        if self.traces is not None:
            key = self._key(given, [x for kind in point.fixed() for x in kind])
            traced = self.traces(self.second, evaluate, point, reseed, key)
            if traced and self.traces.accepts(traced[0].double().cpu(), expected, t):
                return traced[1]
            reseed()
        loss, results = self.second(evaluate, point, reseed)
        if not torch.equal(loss.double().cpu(), expected) and self.second.turn("a loss that rounds otherwise there"):
            reseed()
            loss, results = self.second(evaluate, point, reseed)
        if not torch.equal(loss.double().cpu(), expected):
            raise ReplayDivergence(t, self.diagnose(t, i, float(expected), float(loss)))
        return results

    def _again(self, point: Point, given: tuple[Any, ...], t: int, i: int, expected: Tensor) -> Gradients:
        """The second derivatives by the joint graph that has trained."""
        parameters, *others = point.fixed()
        tensors = [x for kind in others for x in kind]
        assert self.joints is not None
        joint = self.joints.graphs[self._key(given, [*parameters, *tensors])]
        directions = [(*d, *c) for d, c in zip(point.directions, point.cotangents, strict=True)]
        loss, results = joint.again(list(parameters), tensors, directions)
        if not torch.equal(loss.double().cpu(), expected):
            raise ReplayDivergence(t, self.diagnose(t, i, float(expected), float(loss)))
        return results

    def _seed(self, t: int, i: int) -> None:
        """Put torch's generators at the beginning of the random stream of microbatch `i` of step `t`."""
        seed_generators(seed_of(self.seed, self.before + t, i), self.arena.device)

    def _run(
        self,
        t: int,
        share: float,
        batch: Any,
        slices: BatchMetaparameters,
        parameters: Sequence[Tensor],
        buffers: Buffers,
        tensors: Sequence[Tensor],
        until: contextlib.ExitStack,
    ) -> tuple[Tensor, Buffers]:
        """The loss of one microbatch times its share, and the buffers as the model leaves them. See Binding.call."""
        autocast = torch.autocast(self.arena.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with autocast:
            mapping = slices.mapping(list(tensors))
            loss, left = self.binding.call(self.loss, parameters, buffers, batch, mapping, until=until)
        if not isinstance(loss, Tensor) or loss.shape != () or not loss.is_floating_point():
            got = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise BadLoss(
                f"expected the loss to be a floating-point scalar (shape []); got {got} at step {t}. "
                "Reduce it, for instance with .mean()."
            )
        return (loss if share == 1.0 else loss * share), left

    def _accumulate(self, total: Tensor | None, grads: Sequence[Tensor | None], into: Tensor | None) -> Tensor:
        present = [g for g in grads if g is not None]
        if total is None and len(present) == len(grads):
            return self.arena.joined(present, into)
        if total is None:
            total = self.arena.zeros(self.arena.gradient_dtype) if into is None else into.zero_()
        pairs = [(x, g) for x, g in zip(self.arena.slices(total), grads, strict=True) if g is not None]
        torch._foreach_add_([x for x, _ in pairs], [g for _, g in pairs])
        return total

    def diagnose(self, t: int, i: int, first: float, second: float) -> str:
        if not same(self.batches[t], self.batches[t]):
            return (
                f"batches[{t}] differs each time it is asked for; expected the same tensors "
                "(fix the order of the examples and their augmentation)."
            )
        return (
            f"the loss of microbatch {i} was {first!r} at first and {second!r} now. Either batches[{t}] gives other "
            "tensors than before (does the loss change them in place?), or the loss reads something that changes: "
            "random numbers that do not come from torch's generators, state kept outside the model, or a "
            "non-deterministic kernel (see torch.use_deterministic_algorithms)."
        )


def _settled(before: Buffers, copies: Buffers, after: Buffers) -> Buffers:
    """The buffers after an evaluation on `copies` of those before, sharing memory where nothing changed."""

    def settled(name: str, tensor: Tensor) -> Tensor:
        if tensor is not copies[name]:  # replaced by the model, and perhaps a view of something that will change
            return tensor.detach().clone()
        # What is written through `.data` leaves the version as it was.
        return before[name] if tensor._version == 0 and torch.equal(tensor, before[name]) else tensor.detach()

    return {name: settled(name, tensor) for name, tensor in after.items()}
