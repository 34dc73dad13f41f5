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

from mgd.batches import microbatches, same, seed_generators, seed_of, split_tensors
from mgd.derivatives import Evaluate, Gradients, Point, Restart, SecondDerivative, leaves
from mgd.errors import BadLoss, MetagradientError, ParametersModified, ReplayDivergence
from mgd.metaparameters import Metaparameters, Slices
from mgd.model import Binding, Buffers, differentiable
from mgd.tracing import Traces
from mgd_kernels import Arena


@dataclass
class Evaluated:
    """What the first evaluation of a step leaves behind.

    gradient: flat `[n]`, in the dtype in which the model produced it. losses: float64 `[microbatches]` on the CPU, each
    times its share of the batch. buffers: as they stood before each microbatch and after the last one.
    norm: of the gradient, once somebody has computed it.
    """

    gradient: Tensor
    losses: Tensor
    buffers: list[Buffers]
    norm: float | None = None


class Steps:
    """Evaluates the steps of one training."""

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
    ):
        self.binding, self.arena, self.loss, self.batches = binding, arena, loss, batches
        self.microbatches, self.seed, self.autocast, self.second = microbatches, seed, autocast, second
        self.traces = traces
        self.evaluations = 0

    def gradient(self, t: int, params: Tensor, buffers: Buffers, meta: Metaparameters) -> Evaluated:
        """Evaluate step `t` at the flat `params`. Errors name the step."""
        total: Tensor | None = None
        losses, history = [], [buffers]
        for i, (batch, share) in enumerate(microbatches(self.batches[t], self.microbatches, t)):
            parameters = leaves(list(self.arena.views(params).values()))
            slices = meta.at(batch, t)
            watched: dict[str, Sequence[Tensor]] = {
                "parameters": parameters,
                "parameters that do not require a gradient": self.binding.frozen,
                "metaparameters": slices.tensors,
            }
            versions = _versions(watched)
            copies = {name: b.clone() for name, b in history[-1].items()}
            with contextlib.ExitStack() as stack:
                try:
                    self._seed(t, i)
                    loss, left = self._run(t, share, batch, slices, parameters, copies, slices.tensors, stack)
                except RuntimeError as error:
                    if "leaf Variable" in str(error) and not isinstance(error, MetagradientError):
                        raise ParametersModified(t) from error
                    raise
                for what, version in _versions(watched).items():
                    if version != versions[what]:
                        raise ParametersModified(t, what)
                if not loss.requires_grad:
                    raise BadLoss(f"the loss of step {t} does not depend on the parameters; was it detached?")
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            total = self._accumulate(total, grads)
            losses.append(loss.detach().double())
            history.append(_settled(history[-1], copies, left))
        self.evaluations += 1
        assert total is not None  # there is at least one microbatch
        return Evaluated(total, torch.stack(losses).cpu() if len(losses) > 1 else losses[0].cpu().reshape(1), history)

    def second_derivatives(
        self,
        t: int,
        params: Tensor,
        step: Evaluated,
        meta: Metaparameters,
        directions: Sequence[Tensor],
        buffer_adjoints: list[list[Tensor]],
        add: Callable[[int, list[Tensor | None], Slices, list[Tensor | None]], None],
    ) -> list[list[Tensor]]:
        """Derivatives of `<gradient, direction> + <buffers after, adjoint>` for each direction (flat `[n]`).

        `add(objective, with respect to parameters, slices, with respect to the slices)` receives the terms of every
        microbatch. Returns the adjoints of the buffers before the step. Raises ReplayDivergence where the loss is not
        bit-equal to the first evaluation's.
        """
        parameters = list(self.arena.views(params).values())
        tangents = [list(self.arena.views(direction).values()) for direction in directions]
        for i, (batch, share) in reversed(list(enumerate(microbatches(self.batches[t], self.microbatches, t)))):
            before = step.buffers[i]
            names = differentiable(before)
            others = [name for name in before if name not in names]
            slices = meta.at(batch, t)
            batch_tensors, rest, rebuild = split_tensors(batch)

            stack = contextlib.ExitStack()

            def evaluate(
                p, b, z, constants, slices=slices, share=share, names=names, others=others, rebuild=rebuild, stack=stack
            ):
                buffers = dict(zip(names, b, strict=True))
                buffers |= {name: tensor.clone() for name, tensor in zip(others, constants, strict=False)}
                loss, left = self._run(t, share, rebuild(constants[len(others) :]), slices, p, buffers, z, stack)
                return loss, [left[name] for name in names]

            point = Point(
                parameters,
                [before[name] for name in names],
                slices.tensors,
                [before[name] for name in others] + batch_tensors,
                tangents,
                buffer_adjoints,
            )
            restart = functools.partial(self._seed, t, i)
            restart()
            with stack:
                given = (share, slices.structure, rest)
                results = self._differentiate(evaluate, point, restart, given, t, i, step.losses[i])
            p, b = len(parameters), len(parameters) + len(names)
            buffer_adjoints = [
                [torch.zeros_like(before[n]) if a is None else a for n, a in zip(names, result[p:b], strict=True)]
                for result in results
            ]
            for objective, result in enumerate(results):
                add(objective, result[:p], slices, result[b:])
        return buffer_adjoints

    def _differentiate(
        self,
        evaluate: Evaluate,
        point: Point,
        restart: Restart,
        given: tuple[Any, ...],
        t: int,
        i: int,
        expected: Tensor,
    ) -> Gradients:
        """The second derivatives at a point, from a replayed graph where there is one, whose loss is as expected.

        given: what the loss is given beside tensors, as hashable values.
        """
        if self.traces is not None:
            modes = tuple(module.training for module in self.binding.model.modules())
            key = (*given, modes, self.binding.names, torch.is_autocast_enabled(self.arena.device.type))
            traced = self.traces(self.second, evaluate, point, restart, key)
            if traced and self.traces.accepts(traced[0].double().cpu(), expected, t):
                return traced[1]
            restart()
        loss, results = self.second(evaluate, point, restart)
        if not torch.equal(loss.double().cpu(), expected) and self.second.turn("a loss that rounds otherwise there"):
            restart()
            loss, results = self.second(evaluate, point, restart)
        if not torch.equal(loss.double().cpu(), expected):
            raise ReplayDivergence(t, self.diagnose(t, i, float(expected), float(loss)))
        return results

    def _seed(self, t: int, i: int) -> None:
        """Put torch's generators at the beginning of the random stream of microbatch `i` of step `t`."""
        seed_generators(seed_of(self.seed, t, i), self.arena.device)

    def _run(
        self,
        t: int,
        share: float,
        batch: Any,
        slices: Slices,
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

    def _accumulate(self, total: Tensor | None, grads: Sequence[Tensor | None]) -> Tensor:
        if total is None:
            total = self.arena.zeros(self.arena.gradient_dtype)
        pairs = [(x, g) for x, g in zip(self.arena.slices(total), grads, strict=True) if g is not None]
        targets, sources = [x for x, _ in pairs], [g for _, g in pairs]
        torch._foreach_add_(targets, sources)
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


def _versions(tensors: dict[str, Sequence[Tensor]]) -> dict[str, list[int]]:
    """How often each tensor has been changed in place."""
    return {what: [tensor._version for tensor in group] for what, group in tensors.items()}


def _settled(before: Buffers, copies: Buffers, after: Buffers) -> Buffers:
    """The buffers after an evaluation on `copies` of those before, sharing memory where nothing changed."""

    def settled(name: str, tensor: Tensor) -> Tensor:
        if tensor is not copies[name]:  # replaced by the model, and perhaps a view of something that will change
            return tensor.detach().clone()
        # What is written through `.data` leaves the version as it was.
        return before[name] if tensor._version == 0 and torch.equal(tensor, before[name]) else tensor.detach()

    return {name: settled(name, tensor) for name, tensor in after.items()}
