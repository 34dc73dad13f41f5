"""Intervals of what recipes measure, by scipy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mgd.errors import BadArgument, MissingPackage

Interval = tuple[float, float, float]  # what was measured, and its 95% interval


def mean(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean and the interval of Student's t, of at least two values."""
    stats, array = _stats(), np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        raise BadArgument(f"expected at least 2 values for an interval; got {len(array)}")
    half = float(stats.t.ppf(0.975, len(array) - 1) * stats.sem(array))
    return float(array.mean()), float(array.mean()) - half, float(array.mean()) + half


def spearman(x: Sequence[float], y: Sequence[float], seed: int = 0) -> Interval:
    """The rank correlation of pairs, and its interval by drawing pairs again (percentiles of 2,000 draws)."""
    stats = _stats()
    if len(x) < 3 or len(x) != len(y):
        raise BadArgument(f"expected at least 3 pairs to correlate; got {len(x)} and {len(y)} values")

    def rho(a: Any, b: Any, axis: int = -1) -> Any:
        a, b = (stats.rankdata(side, axis=axis) for side in (a, b))
        a, b = (side - side.mean(axis=axis, keepdims=True) for side in (a, b))
        scale = np.sqrt((a * a).sum(axis=axis) * (b * b).sum(axis=axis))
        # Where all values of one side are equal, there is no order to agree with.
        return np.where(scale > 0, (a * b).sum(axis=axis) / np.where(scale > 0, scale, 1.0), 0.0)

    drawn = stats.bootstrap((x, y), rho, paired=True, n_resamples=2000, method="percentile", rng=seed)
    interval = drawn.confidence_interval
    return float(rho(x, y)), float(interval.low), float(interval.high)


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingPackage("intervals", "scipy", "recipes") from error
    return stats
