"""What a sweep did and what it cost."""

from __future__ import annotations

from torch import Tensor

from mgd.results import Report
from mgd.sweep.sweep import Sweep
from mgd_kernels.fused import FusedOptimizer


def report_of(sweep: Sweep) -> Report:
    optimizer, timings, storage = sweep.optimizer, sweep.timings, sweep.storage
    backend = "torch"
    if isinstance(optimizer, FusedOptimizer):
        backend = optimizer.backend(sweep.state.params, sweep.state.params).__name__.rpartition(".")[2]
    return Report(
        steps=sweep.length,
        objectives=len(sweep.adjoints),
        seconds=dict(timings.seconds),
        counts=dict(timings.counts),
        execution=sweep.step.evaluator.describe(),
        backend=backend,
        plan=storage.plan.to_dict() if storage.plan else {},
        measured_seconds=dict(timings.phases),
        store=storage.stats,
        kept_bytes=storage.residuals.peak,
        adjoint_norms=_norms(sweep),
    )


def _norms(sweep: Sweep) -> Tensor | None:
    """Of the adjoints, `[T]`, or `[k, T]` for k objectives."""
    norms = sweep.adjoint_norms
    return norms[0] if norms is not None and sweep.value is not None and sweep.value.ndim == 0 else norms
