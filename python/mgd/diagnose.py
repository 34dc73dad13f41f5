"""Can this metagradient be followed? What stands in the way, and what to change, by its measured effect."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mgd.check import distance, in_double, metasmoothness
from mgd.errors import BadArgument, BadMetaparameter, MetagradientError
from mgd.function import TrainingFunction
from mgd.step.batches import to_dtype
from mgd.sweep.growth import GROWTH, STEEP, growth
from mgd.util.text import table
from mgd_kernels import Adam

ROUGH = 0.5  # metasmoothness below which a step of descent is luck
NOISY = 1e-2  # relative error of a metagradient from which it is worth a change
# Averages and small constants: a step of a few percent would leave their range, or mean nothing.
STILL = ("momentum", "beta1", "beta2", "eps", "eps_root")


@dataclass(frozen=True)
class Measured:
    """A training and its metagradient.

    smoothness: the metasmoothness along a step of sign descent (`mgd.metasmoothness`); NaN where there is none. growth,
    steepest: the largest factor by which the adjoint grows on its way back, in all and in one step. start, stop: the
    step from which it grows steeply, and the one until which. error: |g - g64| / |g64|, the worst of any key, where g64
    is the metagradient in float64. zeros: the share of entries that are exactly 0, by key.
    """

    smoothness: float
    growth: float
    steepest: float
    start: int
    stop: int
    error: float
    zeros: dict[str, float]

    @property
    def unstable(self) -> bool:
        return self.growth >= GROWTH and self.steepest >= STEEP

    @property
    def rough(self) -> bool:
        return self.unstable or self.smoothness < ROUGH

    @property
    def noisy(self) -> bool:
        return not self.error <= NOISY  # also NaN


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`; `print` shows it.

    found: the training as it is. changes: what each change makes of it, the most effective first; a change with which
    the training fails has the reason. Empty where nothing is wrong. h: the size of the step that smoothness is about.
    notes: what can be told without measuring.
    """

    found: Measured
    changes: dict[str, Measured | str]
    h: float
    notes: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Nothing stands in the way of following the metagradient."""
        return not (self.found.rough or self.found.noisy or 1.0 in self.found.zeros.values())

    def to_dict(self) -> dict[str, Any]:
        changes = {name: x if isinstance(x, str) else asdict(x) for name, x in self.changes.items()}
        return {"healthy": self.healthy, "h": self.h, "found": asdict(self.found), "changes": changes} | {
            "notes": self.notes
        }

    def __str__(self) -> str:
        rows = [_row("as it is", self.found)]
        for name, measured in self.changes.items():
            rows.append([name, measured, "", ""] if isinstance(measured, str) else _row(name, measured))
        head = ["training", "smoothness", "adjoint grows", "error in its own precision"]
        return "\n".join([*self._words(), *self.notes, "", *table(head, rows)])

    def _words(self) -> list[str]:
        x, words = self.found, []
        if x.unstable:
            words.append(
                f"HUGE: the adjoint grows {x.growth:.3g}-fold from step {x.start} back to step {x.stop}, up to "
                f"{x.steepest:.2g}-fold in one step: the learning rate is too high for the curvature there."
            )
        if x.smoothness < ROUGH:
            words.append(
                f"ROUGH: of a step of {self.h:.0%} along it, the second half moves the model elsewhere than the first "
                f"(smoothness {x.smoothness:.2f}; it can be followed near 1)."
            )
        if x.noisy:
            words.append(f"NOISE: in float64 it is another one, by {x.error:.1%} of its length.")
        for key, share in x.zeros.items():
            if share:
                words.append(f"ZERO: {share:.0%} of the entries of {key!r} are exactly 0.")
        if self.healthy:
            if math.isnan(x.smoothness):
                words.append(
                    "The metagradient is precise. Whether it can be followed was not measured: no step of it moves a "
                    "parameter and stays in the range of z."
                )
            else:
                words.append("It can be followed: the training is smooth here, and the metagradient precise.")
        return words


def diagnose(f: TrainingFunction, z: Mapping[str, Any], *, h: float = 0.05) -> Diagnosis:
    """What stands in the way of following the metagradient of `f` at `z`, and what to change.

    Measures metasmoothness along a step of sign descent, the growth of the adjoint, and the distance from the
    metagradient in float64. Where one of them is bad, the same is measured with a lower learning rate, clipping, a
    larger `eps_root` (Adam), the last quarter of the steps alone (`since`), and without autocast, as far as they apply;
    the changes come in the order of what they improve.

    h: the size of the step, relative to the root mean square of each tensor of z (to 1 where that is 0).
    Cost: about a dozen trainings, and as many for every change.

    Raises BadArgument unless h > 0.
    """
    if not isinstance(h, Real) or not 0 < h < math.inf:
        raise BadArgument(f"expected h > 0 and finite; got {h!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # they are what is measured here
        found = _measured(f, z, h)
        changes: dict[str, Measured | str] = {}
        if found.rough or found.noisy:
            for name, changed, at in _changes(f, z):
                try:
                    changes[name] = _measured(changed, at, h)
                except MetagradientError as error:
                    changes[name] = type(error).__name__
    return Diagnosis(found, dict(sorted(changes.items(), key=lambda pair: _rank(found, pair[1]))), h, _notes(f))


def _measured(f: TrainingFunction, z: Mapping[str, Any], h: float) -> Measured:
    result, z64 = f.metagradient(z), to_dtype(dict(z), torch.float64)
    exact = in_double(f).anchored(z64).metagradient(z64)
    norms = result.report.adjoint_norms
    assert norms is not None
    factor, steepest, start, stop = max(growth(row) for row in norms.reshape(-1, len(f)).tolist())
    leaves = {key: tree_leaves(tree) for key, tree in result.grads.items()}
    return Measured(
        smoothness=_smoothness(f, z, result.grads, result.value.ndim, h),
        growth=factor,
        steepest=steepest,
        start=start,
        stop=stop,
        error=max((distance(result.grads[key], exact.grads[key]) for key in z), default=0.0),
        zeros={key: _zeros(xs) for key, xs in leaves.items()},
    )


def _smoothness(f: TrainingFunction, z: Mapping[str, Any], grads: Mapping[str, Any], ndim: int, h: float) -> float:
    """Along the step of sign descent of the objective, or of the mean of several."""

    def step(g: Tensor, x: Tensor) -> Tensor:
        x = torch.as_tensor(x, dtype=g.dtype)
        scale = x.double().square().mean().sqrt().to(g.dtype)
        return -(g.mean(0) if ndim else g).sign() * torch.where(scale > 0, scale, 1)

    direction = {key: tree_map(step, grads[key], z[key]) for key in z if key not in STILL}
    try:
        return metasmoothness(f, z, direction, h) if direction else math.nan
    except (BadArgument, BadMetaparameter):  # no parameter moves, or a bound is in the way
        return math.nan


def _zeros(leaves: list[Tensor]) -> float:
    entries = sum(x.numel() for x in leaves)
    return sum(int((x == 0).sum()) for x in leaves) / entries if entries else 0.0


def _changes(f: TrainingFunction, z: Mapping[str, Any]) -> Iterator[tuple[str, TrainingFunction, Mapping[str, Any]]]:
    """What may help, with the training that it makes, and its z."""
    for name, factor in (("half the learning rate", 0.5), ("a tenth of the learning rate", 0.1)):
        if "lr" in f.optimizer.hyper_names:
            yield name, *_with_hyper(f, z, "lr", lambda rates, factor=factor: factor * rates)
    if isinstance(f.optimizer, Adam):
        yield "eps_root larger", *_with_hyper(f, z, "eps_root", lambda x: torch.where(x > 0, 100 * x, 1e-8))
    if f.max_grad_norm is None:
        yield "max_grad_norm=1", f.replaced(max_grad_norm=1.0), z
    if f.since is None and len(f) >= 8 and "init" not in z:
        yield f"since={len(f) // 4}", f.replaced(since=len(f) // 4), z
    if f.autocast is not None:
        yield "autocast=None", f.replaced(autocast=None), z


def _with_hyper(f: TrainingFunction, z: Mapping[str, Any], name: str, change: Any) -> tuple[Any, Mapping[str, Any]]:
    """With other values of a hyperparameter: in z where it is there, else fixed."""
    if name in z:
        return f, {**z, name: change(torch.as_tensor(z[name]))}
    table = f.optimizer.tables(len(f))[:, :, f.optimizer.column(name)]
    values = torch.as_tensor(f.fixed.get(name, table), dtype=torch.float64)
    return f.replaced(fixed={**f.fixed, name: change(values)}), z


def _rank(found: Measured, measured: Measured | str) -> tuple[float, float]:
    """The most effective first: by smoothness where the training is rough, else by precision."""
    if isinstance(measured, str):
        return math.inf, math.inf
    smoothness = -1.0 if math.isnan(measured.smoothness) else measured.smoothness
    error = math.inf if math.isnan(measured.error) else measured.error
    return (-smoothness, error) if found.rough else (error, -smoothness)


def _notes(f: TrainingFunction) -> list[str]:
    halves = {str(p.dtype) for p in f.model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if not halves:
        return []
    return [f"The model is in {', '.join(sorted(halves))}: keep its parameters in float32, and give autocast= instead."]


def _row(name: str, x: Measured) -> list[str]:
    smoothness = "-" if math.isnan(x.smoothness) else f"{x.smoothness:.3f}"
    return [name, smoothness, f"{x.growth:.3g}-fold", f"{x.error:.1e}"]
