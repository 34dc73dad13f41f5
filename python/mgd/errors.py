"""Errors of the metagradient layer, one class per violated promise, and warnings.

Every text says what was expected, what was found (and at which step), and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping

from mgd_kernels.errors import (
    BadArgument,
    CorruptState,
    ForeignEntry,
    KernelError,
    StoreBusy,
    StoreFull,
    StoreIOError,
    UnknownFormat,
)

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
    "ForeignEntry",
    "KernelError",
    "MetagradientError",
    "MissingPackage",
    "NonFiniteState",
    "NotDeterministic",
    "NotDifferentiable",
    "ParametersModified",
    "RankFailed",
    "RanksDisagree",
    "ReplayDivergence",
    "StaleRun",
    "StoreBusy",
    "StoreFull",
    "StoreIOError",
    "UnknownFormat",
    "UnstableTraining",
]


class MetagradientError(RuntimeError):
    """Base class of the errors of this package."""


class BadMetaparameter(MetagradientError, ValueError):
    """A metaparameter is unknown, missing, or of the wrong shape, dtype or device."""


class BadBatch(MetagradientError, ValueError):
    """A batch cannot be used: it has no tensors, no common length, or too few examples for the microbatches."""


class BadData(MetagradientError, ValueError):
    """A data set is missing, or its files are not in the expected format."""


class BadLoss(MetagradientError, ValueError):
    """The loss of a step is not a floating-point scalar, or does not depend on the parameters."""


class BadObjective(MetagradientError, ValueError):
    """The objective is not a scalar or a vector, or does not depend on the trained parameters."""


class BudgetTooSmall(MetagradientError, ValueError):
    """No plan fits the budget.

    `needs`: bytes, the least that would work. `has`: bytes, what was given. Both are numbers, or mappings from tier to
    number. Each entry of the mapping `needs` is enough on its own, with the other tiers as given.
    """

    def __init__(self, needs: Mapping[str, int] | int, has: Mapping[str, int] | int, advice: str = ""):
        self.needs, self.has, self.advice = needs, has, advice

        def words(sizes: Mapping[str, int] | int, separator: str) -> str:
            parts = sizes.items() if isinstance(sizes, Mapping) else [("", sizes)]
            return separator.join(f"{tier} {size:,} bytes".strip() for tier, size in parts)

        super().__init__(
            f"expected at least {words(needs, ' or ')}, the least budget that works; got {words(has, ', ')}. "
            f"{advice}".rstrip()
        )


class ParametersModified(MetagradientError):
    """The loss changed parameters, or metaparameters, in place."""

    def __init__(self, step: int, what: str = "parameters"):
        self.step = step
        super().__init__(
            f"expected the loss to only read {what}; at step {step} it changed {what} in place. "
            "Let the optimizer change the parameters, and keep running averages in buffers."
        )


class MissingPackage(MetagradientError, ImportError):
    """The call needs an optional package that is not installed."""

    def __init__(self, purpose: str, package: str, extra: str):
        super().__init__(
            f"{purpose} need {package}, which is not installed: pip install 'mgd-kernels[{extra}]', or in a checkout "
            f"pip install '.[{extra}]'"
        )


class NonFiniteState(MetagradientError, ArithmeticError):
    """A quantity, named by `where`, became infinite or NaN at training step `step`."""

    def __init__(self, step: int, where: str):
        self.step, self.where = step, where
        super().__init__(
            f"expected finite numbers throughout the training; {where} is not finite at step {step}. Lower the "
            "learning rate, set max_grad_norm, or look at the batch of this step."
        )


class StaleRun(MetagradientError):
    """The directory of a run to continue holds another run. differing: what differs from this call."""

    def __init__(self, directory: str, differing: list[str]):
        self.directory, self.differing = directory, differing
        super().__init__(
            f"expected {directory} to hold a run of this same call; its run differs in {', '.join(differing)}. Repeat "
            "the call that began it, name another directory, or delete this one to discard its run."
        )


class CorruptScores(MetagradientError):
    """Rows of an attribution's scores are no longer what was written."""

    def __init__(self, path: str, start: int, stop: int):
        self.path, self.start, self.stop = path, start, stop
        super().__init__(
            f"expected rows {start} to {stop} of {path} as they were written; got other bytes, another "
            "size, or no file. Restore the file from a copy, or delete the directory and attribute again."
        )


class RanksDisagree(MetagradientError, ValueError):
    """Processes of one training were given different things. differing: their names."""

    def __init__(self, differing: list[str], found: str):
        self.differing = differing
        super().__init__(
            f"expected every process to make the same call; they differ in {', '.join(differing)}: {found}. Give all "
            "of them the same arguments, from the same seeds, with the same version of the code."
        )


class RankFailed(MetagradientError):
    """Another process of the training failed, died or stalled.

    silent: ranks that did not answer. reasons: what the others say of their failure, by rank.
    """

    def __init__(self, silent: list[int], reasons: Mapping[int, str], seen: str):
        self.silent, self.reasons = silent, dict(reasons)
        found = [f"rank {rank} raised {text}" for rank, text in self.reasons.items()]
        if silent and not found:
            ranks = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
            found.append(f"{ranks} died, stalled or made no such call")
        super().__init__(
            f"expected every process to finish the call; {'; '.join(found) or 'the connection to one was lost'}. Look "
            f"at the output of that process, and make the call again in all of them (seen here: {seen})."
        )


class ReplayDivergence(MetagradientError):
    """A step that was evaluated twice gave different results."""

    def __init__(self, step: int, cause: str):
        self.step, self.cause = step, cause
        super().__init__(f"expected step {step} to repeat itself bit by bit; {cause}")


class NotDeterministic(MetagradientError):
    """An operator of the loss or the objective gives other bits each time on this device."""

    def __init__(self, op: str):
        self.op = op
        super().__init__(
            f"expected operators that repeat themselves bit by bit, since steps are replayed; got {op}, which has no "
            "deterministic implementation on this device. Replace this operator, or train on the CPU."
        )


class NotDifferentiable(MetagradientError):
    """The Hessian-vector product of the loss needs a derivative that an operator does not have."""

    def __init__(self, op: str, detail: str):
        self.op = op
        super().__init__(
            f"expected operators that torch can differentiate twice; the loss uses {op}, which has no second "
            f"derivative: {detail} Replace this operator."
        )


class UnstableTraining(RuntimeWarning):
    """The adjoint of a training grows as that of a chaotic one does: its metagradient is right, and of little use.

    Such a training overshoots: at some steps its learning rate times the curvature of its loss is above 2. See
    docs/how-to/debugging.md.
    """


class RoughEstimate(UserWarning):
    """Scores that were estimated from combinations of the queries (`mgd.attribute(combine=)`) have a large error."""
