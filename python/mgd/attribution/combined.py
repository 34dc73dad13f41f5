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

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mgd.attribution.result import Estimate
from mgd.attribution.shared import HeldScores, SharedScores
from mgd.attribution.sweeps import Objective, Objectives, Part, Sweeps, objective_of
from mgd.errors import BadArgument, NonFiniteState, RoughEstimate
from mgd.function import TrainingFunction
from mgd.results import Trained
from mgd.step.model import Binding, differentiable
from mgd.step.rng import seed_generators, seed_of
from mgd.step.turn import turn
from mgd.sweep.adjoint import TrainedObjective
from mgd_kernels.store import Key

Scores = HeldScores | SharedScores
SKETCH = 1 << 14  # coordinates to which a longer gradient is hashed, to find the directions; any others are exact
ROUGH = 0.5  # the relative error of a query's scores from which on it is told: a correlation of 0.87


def check(queries: int, combine: int, probes: int) -> None:
    """Raise BadArgument for arguments that do not fit."""
    if not isinstance(combine, int) or isinstance(combine, bool) or not 1 <= combine < queries:
        raise BadArgument(
            f"expected combine to be a number of sweeps from 1 to {queries - 1}, fewer than the {queries} queries; got "
            f"{combine!r}. Without it the scores are exact, at one sweep per query."
        )
    if not isinstance(probes, int) or isinstance(probes, bool) or probes < 2:
        raise BadArgument(f"expected probes >= 2, the forward passes that measure the error; got {probes!r}")


class Gradients:
    """The gradients of the queries' losses at the trained parameters, one at a time: together they may not fit in
    memory. Sketches of them have at most SKETCH coordinates each (the count sketch of Charikar et al. 2002)."""

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

    def sketches(self) -> Tensor:
        """`[k, d]`."""
        return torch.stack([self._sketch(gradient).cpu() for gradient in self])

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

    def combined(self, mix: Tensor) -> Objective:
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
    return (chosen / scale).T.contiguous(), (chosen * scale).contiguous()


def estimated(sweeps: Sweeps, scores: Scores, objectives: Objectives) -> Estimate:
    """Fill the scores, and measure their error. What an interrupted call has kept there is not computed again; rows are
    computed in parts of one size, so that their bits do not depend on where they go."""
    index, report = scores.index, sweeps.report
    combine, probes = index.combine, index.probes
    assert combine is not None and probes is not None
    if (kept := scores.kept("estimate")) is not None:  # then all rows are done, too
        report.chunks_kept = -(-kept["combinations"] // index.chunk)
        return Estimate(**kept)
    f, weight = sweeps.f, sweeps.z[sweeps.weights]
    gradients = Gradients(f, sweeps.rehearsal, objectives, index.queries)

    def once(key: Key, make: Callable[[], Any]) -> Any:
        if (found := scores.kept(key)) is None:
            found = make()
            scores.keep(key, found)
        return found

    with report.timed("directions"), f.ranks.call():
        # Kept, since another machine could choose other directions, of which the rows that are kept are not.
        mix, share = once("directions", lambda: f.ranks.first(lambda: directions(gradients.sketches(), combine)))

    def objective(own: Tensor) -> Objective:
        with report.timed("directions"):
            return gradients.combined(own)

    parts: list[Part] = []
    done: dict[int, Tensor] = {}
    for first in range(0, len(mix), index.chunk):
        own = mix[first : first + index.chunk]
        parts.append(Part(first, len(own), functools.partial(objective, own)))
        if (kept := scores.kept(("sweep", first))) is not None:
            done[first] = kept

    def take(first: int, found: np.ndarray, values: Tensor) -> None:
        done[first] = torch.from_numpy(found)
        scores.keep(("sweep", first), done[first])

    sweeps.run("combinations", parts, set(done), take)
    none = torch.zeros(0, len(weight), dtype=weight.dtype, device="cpu")  # it may be that no query has a gradient
    swept = torch.cat([none, *(done[part.first] for part in parts)])

    signs = _signs(probes, len(weight), f.seed).to(weight.dtype)
    with report.timed("probes"):
        true, values = once("probes", lambda: _probed(sweeps, objective_of(objectives, index.queries), signs))
    guess = torch.zeros_like(true)
    with report.timed("scores"):
        for first in range(0, len(index.queries), index.chunk):
            place = slice(first, first + index.chunk)
            part = share[place].to(weight.dtype, copy=True) @ swept
            guess[:, place] = (part @ signs.T).T
            if first not in scores.done:
                scores.write(first, part.numpy(), values[place])
    return Estimate.of(true, guess, len(mix))


def _signs(count: int, n: int, seed: int) -> Tensor:
    """Random signs of the examples' weights, `[count, n]`."""
    return torch.randint(2, (count, n), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _probed(sweeps: Sweeps, objective: Objective, signs: Tensor) -> tuple[Tensor, Tensor]:
    """How the queries' losses change along each of `signs`, float64 `[m, k]`, and what they are, float64 `[k]`."""
    weight = sweeps.z[sweeps.weights]
    along = [{sweeps.weights: row.to(weight.device)} for row in signs]
    found = sweeps.f.replaced(objective=objective).jvp(sweeps.z, along)
    return found.tangent.double().cpu(), found.value.double().cpu()


def warn_if_rough(estimate: Estimate) -> None:
    if rough := int((estimate.errors > ROUGH).sum()):
        warnings.warn(
            f"the scores of {rough} of {len(estimate.errors)} queries are estimated with a relative error above "
            f"{ROUGH:g} (of all: {estimate.error:.2g}). Raise combine=, or attribute these alone, exactly: "
            "`found.estimate.errors` names them.",
            RoughEstimate,
            stacklevel=3,
        )
