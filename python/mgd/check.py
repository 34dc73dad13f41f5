"""Is the metagradient right? Finite differences and Taylor remainders of the whole training, in float64."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from mgd.errors import BadArgument, BadMetaparameter
from mgd.step.batches import to_dtype
from mgd.util.progress import Progress
from mgd.util.text import table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mgd.function import Metagradient, TrainingFunction

#: If two first losses differ by more than this (relative), the trainings differ, not just their precision.
SAME_TRAINING = 1e-3

#: The least order at which remainders converge. Below, that some difference agrees is luck: f is not smooth there.
CONVERGING = 0.9

#: Relative, of a metagradient in reverse and in forward mode, both in float64.
SAME = 1e-8

#: The relative rounding error of a float64 training's value: 1e-16, grown over a few hundred well-conditioned steps.
ROUNDING = 1e-14


@dataclass(frozen=True)
class KeyCheck:
    """The result for one key of z, along a direction v.

    analytic: <∇f, v> in float64. finite_difference: (f(z+hv) - f(z-hv)) / 2h at the best step size, `h`.
    relative_error: the relative difference of the two. order: the power of h with which the remainder
    |f(z+hv) - f(z) - h<∇f, v>| falls, 2 if the gradient is right; None if the remainder is lost in rounding.
    float32_error: |g - g64| / |g64| over the whole key, where g is the metagradient in the function's own precision;
    None if the two trainings differ from the first step on. forward: the relative difference of `analytic` and what
    forward mode (`TrainingFunction.jvp`) gives in float64. errors, remainders: one per step size.
    """

    analytic: float
    finite_difference: float
    relative_error: float
    h: float
    order: float | None
    float32_error: float | None
    forward: float
    errors: tuple[float, ...]
    remainders: tuple[float, ...]


@dataclass(frozen=True)
class CheckResult:
    """The result of `check`. `print` shows it as a table.

    keys: the result for each key of z. value: f(z) in float64. steps: the step sizes. trainings: how many trainings ran
    in float64, including the metagradient's. seconds: of the whole check. `passed`: every key holds, that is, its
    relative error is within `tolerance`, its float32 error within `float32_tolerance`, forward mode gives the same to
    1e-8, and the remainders converge, or are lost in rounding. Where they do not, the verdict is "unclear": f is not
    smooth at these step sizes. Kinks (ReLU) lower the order somewhat even if the gradient is right.
    """

    keys: dict[str, KeyCheck]
    value: float
    steps: tuple[float, ...]
    trainings: int
    seconds: float
    tolerance: float
    float32_tolerance: float
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(self.verdict(name) == "holds" for name in self.keys)

    def verdict(self, name: str) -> str:
        """ "holds", "FAILS" or "unclear", for a key of z."""
        key = self.keys[name]
        # The comparisons are written so that NaN fails them.
        exact = key.float32_error is None or key.float32_error <= self.float32_tolerance
        if not (key.relative_error <= self.tolerance and exact and key.forward <= SAME):
            return "FAILS"
        return "holds" if key.order is None or key.order >= CONVERGING else "unclear"

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    def __str__(self) -> str:
        head = ["", "analytic", "finite difference", "rel. error", "order", "forward mode", "float32", ""]
        rows = [
            [
                name,
                f"{key.analytic:.10e}",
                f"{key.finite_difference:.10e}",
                f"{key.relative_error:.1e}",
                "-" if key.order is None else f"{key.order:.2f}",
                f"{key.forward:.1e}",
                "-" if key.float32_error is None else f"{key.float32_error:.1e}",
                self.verdict(name),
            ]
            for name, key in self.keys.items()
        ]
        footer = f"{self.trainings} trainings in float64, {self.seconds:.1f} s"
        notes = list(self.notes)
        if any(self.verdict(name) == "unclear" for name in self.keys):
            notes.append("unclear: the remainders do not fall with the step size: f is not smooth there (order 2 is)")
        return "\n".join([*table(head, rows), footer, *notes])


def check(
    f: TrainingFunction,
    z: Mapping[str, Any],
    *,
    keys: Sequence[str] | None = None,
    steps: Sequence[float] = (1e-2, 3e-4, 1e-5),
    seed: int = 0,
    tolerance: float = 1e-5,
    float32_tolerance: float = 1e-2,
    metagradient: Metagradient | None = None,
    progress: bool = False,
) -> CheckResult:
    """Compare the metagradient of `f` at `z` with finite differences of `f` itself, in float64.

    The training is copied to float64: model, batches and z. Floats that the loss or the objective feeds to the model
    are cast on the way in. The metagradient of the copy is computed once. Then each key gets one random direction v:
    normal, each leaf scaled by the root mean square of that leaf of z (by 1 if that is 0). The objective is evaluated
    at z ± hv for every h in `steps`, and forward mode gives the derivative along v. If f has k objectives, a random
    combination of them is checked.

    Cost: one metagradient in float64, `2 len(steps)` trainings and a forward mode (about three) in float64 per key, and
    one metagradient of `f` unless it is passed as `metagradient`.

    keys: which keys of z to check; all by default. steps: relative step sizes, falling. seed: that of the directions.
    tolerance, float32_tolerance: the largest errors with which the result passes (see `CheckResult`).

    Raises BadArgument for unknown keys, and for step sizes that are not positive and falling.
    """
    names = list(z) if keys is None else list(keys)
    if unknown := [name for name in names if name not in z]:
        raise BadArgument(f"expected keys of z, {list(z)}; got {unknown}")
    if not steps or list(steps) != sorted(steps, reverse=True) or min(steps) <= 0:
        raise BadArgument(f"expected positive, falling step sizes; got {list(steps)}")
    start = time.perf_counter()
    own = f.metagradient(z, progress=progress) if metagradient is None else metagradient
    z64 = to_dtype(dict(z), torch.float64)
    double = in_double(f).anchored(z64)
    exact = double.metagradient(z64, progress=progress)
    generator = torch.Generator().manual_seed(seed)
    mix = (
        torch.randn(exact.value.shape, generator=generator, dtype=torch.float64, device="cpu")
        if exact.value.ndim
        else torch.ones((), dtype=torch.float64, device="cpu")
    )
    mix = mix.to(exact.value.device)
    same = math.isclose(float(own.losses[0]), float(exact.losses[0]), rel_tol=SAME_TRAINING)
    notes = [] if same else ["the first loss differs in float64: the model draws other random numbers there"]

    def value(moved: Any) -> float:
        bar.tick("check")
        try:
            return float((double.value({**z64, **moved}).double() * mix).sum())
        except BadMetaparameter:  # too far: beyond the range of a hyperparameter, say beta2 = 1
            return math.nan

    def examine(name: str) -> KeyCheck:
        direction = tree_map(lambda leaf: _direction(leaf, generator), z64[name])
        gradient = tree_map(lambda g: torch.tensordot(mix, g.double(), dims=mix.ndim), exact.grads[name])
        analytic = _inner(gradient, direction)
        forward = float((double.jvp(z64, {name: direction}).tangent.double() * mix).sum())
        differences, remainders = [], []
        for h in steps:
            plus, minus = (value({name: _moved(z64[name], direction, s * h)}) for s in (1, -1))
            differences.append((plus - minus) / (2 * h))
            remainders.append(abs(plus - base - h * analytic))
        errors = [_relative(difference, analytic) for difference in differences]
        best = min(range(len(steps)), key=errors.__getitem__)
        return KeyCheck(
            analytic=analytic,
            finite_difference=differences[best],
            relative_error=errors[best],
            h=steps[best],
            order=_order(steps, remainders, base),
            forward=_relative(forward, analytic),
            float32_error=distance(own.grads[name], exact.grads[name]) if same else None,
            errors=tuple(errors),
            remainders=tuple(remainders),
        )

    base = float((exact.value.double() * mix).sum())
    with Progress(2 * len(steps) * len(names), progress) as bar:
        results = {name: examine(name) for name in names}
    return CheckResult(
        keys=results,
        value=base,
        steps=tuple(steps),
        trainings=1 + 2 * len(steps) * len(names),
        seconds=time.perf_counter() - start,
        tolerance=tolerance,
        float32_tolerance=float32_tolerance,
        notes=notes,
    )


def in_double(f: TrainingFunction) -> TrainingFunction:
    """The same training in float64: with a copy of the model, and batches that are cast as they are read."""
    model = copy.deepcopy(f.model).double()

    def cast(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return to_dtype(args, torch.float64), to_dtype(kwargs, torch.float64)

    # On every module, since the loss and the objective may call parts of the model.
    for module in model.modules():
        module.register_forward_pre_hook(cast, with_kwargs=True)

    def loss(*arguments: Any) -> Tensor:
        with _CastsToDouble():
            return f.loss(*arguments)

    def objective(model: nn.Module) -> Tensor:
        with _CastsToDouble():
            return f.objective(model)

    return f.replaced(model=model, loss=loss, objective=objective, batches=_Double(f.batches), autocast=None)


_NARROW = (torch.float32, torch.bfloat16, torch.float16)


class _CastsToDouble(TorchFunctionMode):
    """Casts to a narrower type go to float64: many models compute norms and losses in float32 whatever their dtype."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        kwargs = {key: _widened(value) for key, value in (kwargs or {}).items()}
        return func(*(map(_widened, args) if func in (Tensor.to, Tensor.type) else args), **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


class _Double(Sequence):
    """Batches whose floating-point tensors are float64."""

    def __init__(self, batches: Sequence[Any]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, t: Any) -> Any:
        return to_dtype(self.batches[t], torch.float64)


def _direction(leaf: Any, generator: torch.Generator) -> Tensor:
    leaf = torch.as_tensor(leaf, dtype=torch.float64)
    scale = leaf.square().mean().sqrt()
    noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64, device="cpu").to(leaf.device)
    return noise * (scale if scale > 0 else 1.0)


def _moved(value: Any, direction: Any, h: float) -> Any:
    return tree_map(lambda x, v: x + h * v, value, direction)


def _inner(x: Any, y: Any) -> float:
    return sum(float((a * b).sum()) for a, b in zip(tree_flatten(x)[0], tree_flatten(y)[0], strict=True))


def _relative(x: float, reference: float) -> float:
    if math.isnan(x):
        return math.inf
    difference = abs(x - reference)
    return difference / max(abs(x), abs(reference)) if difference else 0.0


def distance(x: Any, reference: Any) -> float:
    """|x - reference| / |reference| over all leaves."""
    pairs = list(zip(tree_flatten(x)[0], tree_flatten(reference)[0], strict=True))
    difference = math.sqrt(sum(float((a.double() - b).square().sum()) for a, b in pairs))
    norm = math.sqrt(sum(float(b.square().sum()) for _, b in pairs))
    return difference / norm if norm else math.inf if difference else 0.0


def _order(steps: Sequence[float], remainders: Sequence[float], value: float) -> float | None:
    """The slope of log remainder against log h, between the two smallest step sizes with remainders above rounding."""
    floor = ROUNDING * abs(value)
    points = [(h, r) for h, r in zip(steps, remainders, strict=True) if r > floor]
    if len(points) < 2:
        return None
    (h0, r0), (h1, r1) = points[-2:]
    return math.log(r0 / r1) / math.log(h0 / h1)


def metasmoothness(f: TrainingFunction, z: Mapping[str, Any], direction: Mapping[str, Any], h: float) -> float:
    """The empirical metasmoothness (arXiv 2503.13751) of a training at `z` along `direction`, in [-1, 1].

    Let A be the map from metaparameters to trained parameters, and Δ(z) = (A(z + h v) - A(z)) / h. Each trained
    parameter votes on whether Δ keeps its sign from z to z + h v, weighted by how far it moves over both steps:
    S = sign(Δ(z))ᵀ diag(d / |d|₁) sign(Δ(z + h v)), with d = |A(z + 2 h v) - A(z)|. If S is near 1, a metagradient
    predicts what a step of size h does. Costs three trainings.

    direction: tensors for some keys of `z`, of the same shapes; the other keys stay as they are. h: the step size, > 0.

    Raises BadArgument if the direction does not fit `z`, or if no parameter moves.
    """
    if not h > 0:
        raise BadArgument(f"expected h > 0; got {h}")
    unknown = sorted(set(direction) - set(z))
    if unknown or not direction:
        raise BadArgument(f"expected a direction for some keys of z, {list(z)}; got {unknown or 'none'}")
    z, direction = (tree_map(_tensor, dict(each)) for each in (z, direction))
    for key in direction:
        shapes = [[x.shape for x in tree_flatten(tree)[0]] for tree in (z[key], direction[key])]
        if shapes[0] != shapes[1]:
            raise BadArgument(
                f"expected direction[{key!r}] of the shape of z[{key!r}]; got {shapes[1]} for {shapes[0]}"
            )

    f = f.anchored(z)

    def trained(steps: int) -> Tensor:
        point = {key: tree_map(lambda x, v: x + steps * h * v, z[key], direction[key]) for key in direction}
        parameters = f.train({**z, **point}).parameters.values()
        return torch.cat([p.reshape(-1).double() for p in parameters])

    return agreement(trained(0), trained(1), trained(2))


def _tensor(x: Any) -> Any:
    """A Python number as `metagradient` takes it."""
    return torch.tensor(float(x), dtype=torch.float64) if isinstance(x, int | float) else x


def agreement(start: Tensor, middle: Tensor, end: Tensor) -> float:
    """The metasmoothness of a training, from its trained parameters `[n]` at z, z + h v and z + 2 h v.

    Raises BadArgument if no parameter moves.
    """
    weight = (end - start).abs()
    total = weight.sum()
    if total == 0:
        raise BadArgument("no trained parameter moves along this direction: give a larger h, or another direction")
    return float((torch.sign(middle - start) * weight * torch.sign(end - middle)).sum() / total)
