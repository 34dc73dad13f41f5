"""Scores of many queries from few reverse sweeps: an estimate, and how far off it is.

The scores of k queries are S = G A, with G `[k, P]` the gradients of their losses at the trained parameters, which
cost a backward pass each, and A `[P, n]` the derivative of the training, which is what costs. Queries of one model have
gradients that are nearly combinations of a few. So the c principal directions V `[P, c]` of the unit gradients take the
queries' place: one sweep gives each row of V^T A, and the scores are estimated as (G V)(V^T A). What lies outside these
directions is left out, and nothing else: S is exact where the gradients have rank c.

Forward mode says how far off that is. Along random signs of the examples' weights, one `jvp` gives the change of every
query's loss, exactly. The mean square of its difference from the estimated change is, in expectation, that of the
query's row of scores (Hutchinson 1990). No direction was chosen by what these passes say.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mgd.attribution.repeating import Objectives, objective_of, repeated
from mgd.attribution.result import AttributionReport, Estimate
from mgd.errors import BadArgument, NonFiniteState, RoughEstimate
from mgd.function import TrainingFunction
from mgd.results import Trained
from mgd.step.model import Binding, differentiable
from mgd.step.rng import seed_generators, seed_of
from mgd.step.turn import turn
from mgd.sweep.adjoint import TrainedObjective

SKETCH = 1 << 14  # coordinates to which a longer gradient is hashed, to find the directions; any others are exact
ROUGH = 0.5  # the relative error of a query's scores from which on it is told: a correlation of 0.87


def check(f: TrainingFunction, queries: int, combine: int, probes: int, others: Mapping[str, Any]) -> None:
    """Raise BadArgument for arguments that do not fit. others: by name, those that have no meaning here, if given."""
    if not isinstance(combine, int) or isinstance(combine, bool) or not 1 <= combine < queries:
        raise BadArgument(
            f"expected combine to be a number of sweeps from 1 to {queries - 1}, fewer than the {queries} queries; got "
            f"{combine!r}. Without it the scores are exact, at one sweep per query."
        )
    if not isinstance(probes, int) or isinstance(probes, bool) or probes < 2:
        raise BadArgument(f"expected probes >= 2, the forward passes that measure the error; got {probes!r}")
    if given := [name for name, value in others.items() if value]:
        raise BadArgument(
            f"expected combine= without {given[0]}=: estimated scores are computed in one go, and kept in memory"
        )
    if not f.gather:
        raise BadArgument("expected gather=True with combine=: the queries' gradients are combined as a whole")


class Gradients:
    """The gradients of the queries' losses at the trained parameters, one at a time: together they may not fit in
    memory. sketches: `[k, d]`, each in at most SKETCH coordinates (the count sketch of Charikar et al. 2002)."""

    def __init__(self, f: TrainingFunction, trained: Trained, objectives: Objectives, numbers: list[int]):
        self._f, self._trained, self._objectives, self._numbers = f, trained, objectives, numbers
        floats = differentiable(trained.buffers)
        self.shapes = {n: x.shape for n, x in trained.parameters.items()} | {
            n: trained.buffers[n].shape for n in floats
        }
        self._moved = frozenset(floats)
        length = sum(shape.numel() for shape in self.shapes.values())
        self._bucket = self._sign = None
        if length > SKETCH:
            generator = torch.Generator().manual_seed(0)
            device = next(iter(trained.parameters.values())).device
            self._bucket = torch.randint(SKETCH, (length,), generator=generator).to(device)
            self._sign = (torch.randint(2, (length,), generator=generator, dtype=torch.int8) * 2 - 1).to(device)
        self.sketches = torch.stack([self._sketch(gradient).cpu() for gradient in self])

    def __iter__(self) -> Iterator[Tensor]:
        """Each gradient, flat `[P]`, in float32 or the wider dtype of the parameters."""
        f, trained = self._f, self._trained
        with turn(f.model), torch.inference_mode(False), torch.enable_grad():
            binding = Binding(f.model)
            device = next(iter(trained.parameters.values())).device
            for number in self._numbers:
                seed_generators(seed_of(f.seed, trained.optimizer_state["step"]), device)
                objective = objective_of(self._objectives, [number])
                end = TrainedObjective(binding, objective, trained, len(f), f.objective_mode, self._moved)
                found = end.gradients()[1][0]
                zeros = (torch.zeros(shape, device=device) for shape in self.shapes.values())
                parts = [found.get(name, zero) for name, zero in zip(self.shapes, zeros, strict=True)]
                flat = torch.cat([part.detach().reshape(-1) for part in parts])
                flat = flat.float() if flat.dtype.itemsize < 4 else flat
                if not bool(flat.isfinite().all()):
                    raise NonFiniteState(len(f), f"the gradient of the loss of query {number}")
                yield flat

    def _sketch(self, gradient: Tensor) -> Tensor:
        if self._bucket is None or self._sign is None:
            return gradient
        return gradient.new_zeros(SKETCH).index_add_(0, self._bucket, gradient * self._sign)

    def combined(self, mix: Tensor) -> Callable[[nn.Module], Tensor]:
        """An objective with one linear function of the trained state for each row of `mix` `[c, k]`, whose gradient is
        that combination of the queries' gradients. A sweep backward needs no more of an objective."""
        total = None
        for gradient, column in zip(self, mix.T, strict=True):
            part = column.to(gradient)[:, None] * gradient
            total = part if total is None else total.add_(part)
        assert total is not None

        def objective(model: nn.Module) -> Tensor:
            state = dict(model.named_parameters()) | dict(model.named_buffers())
            flat = torch.cat([state[name].reshape(-1).to(total.dtype) for name in self.shapes])
            return torch.stack([(row * flat).sum() for row in total])

        return objective


def directions(sketches: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The principal directions of unit gradients: as combinations of the queries `[c, k]`, and the queries' shares of
    them `[k, c]`, float64. Fewer than `count` where the gradients have a lower rank.

    Unit, because a query's scores are compared with each other: one with a large gradient counts no more.
    """
    largest = sketches.double().abs().amax(1, keepdim=True)  # squares of what is very large or small are no numbers
    norms = (sketches.double() / torch.where(largest > 0, largest, torch.ones_like(largest))).norm(dim=1, keepdim=True)
    scale = torch.where(norms > 0, norms * largest, torch.ones_like(norms))
    unit = sketches.double() / scale
    values, vectors = torch.linalg.eigh(unit @ unit.T)
    noise = len(values) * torch.finfo(sketches.dtype).eps * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    chosen = vectors[:, values > noise].flip(1)[:, :count]
    return (chosen / scale).T, chosen * scale


def estimated(
    f: TrainingFunction,
    z: Mapping[str, Any],
    numbers: list[int],
    objectives: Objectives,
    weights: str,
    combine: int,
    probes: int,
    report: AttributionReport,
    rehearsal: Trained,
    progress: Callable[[int], Any],
) -> tuple[Tensor, Tensor, Estimate]:
    """Scores `[k, n]` on the CPU, losses float64 `[k]`, and the estimate's own error. progress: is told of sweeps."""
    start = time.perf_counter()
    gradients = Gradients(f, rehearsal, objectives, numbers)
    mix, share = directions(gradients.sketches, combine)
    report.seconds["directions"] = time.perf_counter() - start

    rows = []
    for part in mix.split(report.chunk) if len(mix) else ():  # no query has a gradient
        start = time.perf_counter()
        own = f.replaced(objective=gradients.combined(part))
        report.seconds["directions"] += time.perf_counter() - start
        result = repeated(own, z, None, rehearsal, False)
        report.add(result)
        rows.append(result.grads[weights].cpu())
        progress(len(part))
    weight = z[weights]
    scores = (
        share.to(weight.dtype) @ torch.cat(rows) if rows else torch.zeros(len(numbers), len(weight)).to(weight.cpu())
    )

    start = time.perf_counter()
    generator = torch.Generator().manual_seed(f.seed)
    signs = torch.randint(2, (probes, len(weight)), generator=generator).to(weight.dtype) * 2 - 1
    own = f.replaced(objective=objective_of(objectives, numbers))
    along = own.jvp(z, [{weights: row.to(weight.device)} for row in signs])
    true, guess = along.tangent.double().cpu(), (scores @ signs.T).T.double()
    report.seconds["probes"] = time.perf_counter() - start
    estimate = Estimate.of(true, guess, len(mix))
    if rough := int((estimate.errors > ROUGH).sum()):
        warnings.warn(
            f"the scores of {rough} of {len(numbers)} queries are estimated with a relative error above {ROUGH:g} (of "
            f"all: {estimate.error:.2g}). Raise combine={combine}, or attribute these alone, exactly: "
            "`found.estimate.errors` names them.",
            RoughEstimate,
            stacklevel=3,
        )
    return scores, along.value.double().cpu(), estimate
