"""Errors of the metagradient layer: one class per violated promise.

Every text says what was expected, what came (and at which step), and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping

from mgd_kernels.errors import BadArgument, CorruptState, KernelError, StoreBusy, StoreFull, StoreIOError, UnknownFormat

__all__ = [
    "BadArgument",
    "BadBatch",
    "BadData",
    "BadLoss",
    "BadMetaparameter",
    "BadObjective",
    "BudgetTooSmall",
    "CorruptScores",
    "CorruptState",
    "KernelError",
    "MetagradientError",
    "MissingPackage",
    "NonFiniteState",
    "NotDifferentiable",
    "ParametersModified",
    "ReplayDivergence",
    "StaleRun",
    "StoreBusy",
    "StoreFull",
    "StoreIOError",
    "UnknownFormat",
]


class MetagradientError(RuntimeError):
    """Base class of the errors that this package raises on purpose."""


class BadMetaparameter(MetagradientError, ValueError):
    """A metaparameter is unknown, missing, or of the wrong shape, dtype or device."""


class BadBatch(MetagradientError, ValueError):
    """A batch cannot be used: no tensors, no common length, or too few examples for the microbatches."""


class BadData(MetagradientError, ValueError):
    """A data set is not where it was said to be, or its files are not in the expected format."""


class BadLoss(MetagradientError, ValueError):
    """The loss of a step is not a floating-point scalar, or does not depend on the parameters."""


class BadObjective(MetagradientError, ValueError):
    """The objective is not a scalar or a vector, or does not depend on the trained parameters."""


class BudgetTooSmall(MetagradientError, ValueError):
    """No plan fits the budget. `needs` and `has`: bytes, the least that would work and what was given.

    As mappings they go by tier, and each entry of `needs` is enough by itself, with the other parts as they were given.
    """

    def __init__(self, needs: Mapping[str, int] | int, has: Mapping[str, int] | int, advice: str = ""):
        self.needs, self.has, self.advice = needs, has, advice

        def words(sizes: Mapping[str, int] | int, joint: str) -> str:
            parts = sizes.items() if isinstance(sizes, Mapping) else [("", sizes)]
            return joint.join(f"{tier} {size:,} bytes".strip() for tier, size in parts)

        super().__init__(
            f"the least budget that works is {words(needs, ' or ')}; got {words(has, ', ')}. {advice}".rstrip()
        )


class ParametersModified(MetagradientError):
    """The loss changed parameters, or metaparameters, in place."""

    def __init__(self, step: int, what: str = "parameters"):
        self.step = step
        super().__init__(
            f"the loss of step {step} changed {what} in place; expected it to only read them. "
            "Let the optimizer change the parameters, and keep running averages in buffers."
        )


class MissingPackage(MetagradientError, ImportError):
    """An optional package is needed for what was asked for."""

    def __init__(self, purpose: str, package: str, extra: str):
        super().__init__(f"{purpose} need {package}, which is not installed: pip install 'mgd-kernels[{extra}]'")


class NonFiniteState(MetagradientError, ArithmeticError):
    """Training left the finite numbers at `step`; `where` names the quantity."""

    def __init__(self, step: int, where: str):
        self.step, self.where = step, where
        super().__init__(
            f"{where} is not finite at step {step}; a metagradient needs a finite training. Lower the learning rate, "
            "set max_grad_norm, or look at the batch of this step."
        )


class StaleRun(MetagradientError):
    """The directory given as `resume` holds another run. differing: what of it is not as in this call."""

    def __init__(self, directory: str, differing: list[str]):
        self.directory, self.differing = directory, differing
        super().__init__(
            f"{directory} holds an unfinished run that differs from this call in {', '.join(differing)}. Make the same "
            "call to continue it, or name another directory (delete this one to give that run up)."
        )


class CorruptScores(MetagradientError):
    """Rows of an attribution's scores are not as they were written."""

    def __init__(self, path: str, start: int, stop: int):
        self.path, self.start, self.stop = path, start, stop
        super().__init__(
            f"rows {start} to {stop} of {path} differ from what was written there (their digest is in index.json). "
            "Delete the directory and attribute again, or restore the file."
        )


class ReplayDivergence(MetagradientError):
    """A step that was evaluated twice gave different results."""

    def __init__(self, step: int, cause: str):
        self.step, self.cause = step, cause
        super().__init__(f"step {step} did not repeat itself bit by bit: {cause}")


class NotDifferentiable(MetagradientError):
    """The Hessian-vector product of the loss meets an operator without the derivative formula it needs."""

    def __init__(self, op: str, detail: str):
        self.op = op
        super().__init__(
            f"the loss uses {op}, which has no second derivative: {detail} "
            "Replace the operator with one that torch can differentiate twice."
        )
