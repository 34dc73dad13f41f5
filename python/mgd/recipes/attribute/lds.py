"""The linear datamodeling score (TRAK, arXiv 2303.14186, section 2; MAGIC, arXiv 2504.16430): do scores predict what
leaving examples out does?

Training is repeated without random subsets of the examples. For every query, the changes of its loss that the scores
predict are ranked against the true ones (Spearman), and the correlations are averaged over the queries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgd.errors import BadArgument, MissingPackage


@dataclass(frozen=True)
class LDS:
    """mean: over the queries of their rank correlations, `per_query`. low, high: 95% bootstrap interval of the mean,
    which resamples queries and subsets."""

    mean: float
    low: float
    high: float
    per_query: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def linear_datamodeling_score(
    predicted: Tensor | np.ndarray, true: Tensor | np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> LDS:
    """How well predicted changes of the queries' losses rank the true ones.

    predicted, true: `[m, k]`, of k queries without each of m subsets of the training examples.
    Raises BadArgument where the shapes do not fit, a number is not finite, or a query's true change is always the same.
    """
    stats = _scipy_stats()
    p, t = (np.asarray(x, dtype=np.float64) for x in (predicted, true))
    if p.ndim != 2 or p.shape != t.shape or p.shape[0] < 3 or p.shape[1] < 1:
        raise BadArgument(
            f"expected predicted and true changes of one shape [m, k] with m >= 3 subsets and k >= 1 queries; got "
            f"{list(p.shape)} and {list(t.shape)}"
        )
    if not np.isfinite(p).all() or not np.isfinite(t).all():
        raise BadArgument("expected finite changes; there is NaN or infinity among them: did a training diverge?")
    if (constant := np.flatnonzero(np.ptp(t, axis=0) == 0)).size:
        raise BadArgument(
            f"the true change of query {int(constant[0])} is the same for every subset, so there is nothing to rank: "
            "are the subsets different, and is its loss computed in enough digits?"
        )

    def mean(queries: np.ndarray, subsets: np.ndarray) -> float:
        chosen = np.ix_(subsets, queries)
        return float(_spearman(p[chosen], t[chosen]).mean())

    each = _spearman(p, t)
    queries, subsets = np.arange(p.shape[1]), np.arange(p.shape[0])
    if len(queries) == 1:  # scipy resamples samples of two at least; then the subsets alone are resampled
        found = stats.bootstrap((subsets,), lambda s: mean(queries, s), **_BOOTSTRAP, n_resamples=resamples, rng=seed)
    else:
        found = stats.bootstrap((queries, subsets), mean, **_BOOTSTRAP, n_resamples=resamples, rng=seed)
    interval = found.confidence_interval
    return LDS(float(each.mean()), float(interval.low), float(interval.high), each.tolist())


_BOOTSTRAP: dict[str, Any] = {"vectorized": False, "method": "percentile", "confidence_level": 0.95}


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation of each column of `[m, k]`; 0 where one of the two has no order."""
    stats = _scipy_stats()
    a, b = (stats.rankdata(values, axis=0) for values in (x, y))
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return np.divide((a * b).sum(0), norm, out=np.zeros(x.shape[1]), where=norm > 0)


def subsets(n: int, fraction: float, count: int, seed: int) -> list[Tensor]:
    """`count` random subsets of `round(fraction n)` of n examples, as sorted indices."""
    size = round(fraction * n)
    if not 1 <= size < n:
        raise BadArgument(f"expected a fraction that drops at least 1 of {n} examples, and not all; got {fraction}")
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(n, generator=generator)[:size].sort().values for _ in range(count)]


def predictions(scores: np.ndarray | Tensor, dropped: list[Tensor]) -> Tensor:
    """float64 `[m, k]`: the change of every query's loss without each subset, to first order, from scores `[k, n]`."""
    table = torch.as_tensor(np.asarray(scores)).double()
    return torch.stack([-table[:, index].sum(1) for index in dropped])


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingPackage("linear datamodeling scores", "scipy", "attribution") from error
    return stats
