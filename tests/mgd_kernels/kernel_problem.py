"""Random problems for the kernels of a backend, and the measure of their errors against the float64 specification.

How errors are measured. Tensors: the largest and the root-mean-square difference from the float64 reference, run on the
same inputs, may be at most twice that of the torch reference in the tensor's own dtype, plus one ulp of the tensor's
largest (or rms) value. Sums over elements (the hyperparameter cotangents): as the terms of a sum carry independent
rounding errors, at most twice the error of the torch reference plus 8 ulps of the root of the sum of the squared terms,
plus one float64 ulp of the sum of their magnitudes (the additions). In float64 the specification is itself rounded,
and the floor is 8 ulps: an element takes a dozen roundings on either side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgd_kernels.arena import Segments
from mgd_kernels.backends import reference
from mgd_kernels.rules import ADAM, SGD_MOMENTUM, SGD_NESTEROV, SGD_PLAIN, Rule

# No hyperparameter has a value that would hide a missing term.
HYPER = {
    "adam": [0.013, 0.07, 0.031, 0.83, 0.971, 3e-4, 2e-5],
    "sgd": [0.13, 0.07, 0.031, 0.83, 0.21],
}
RULES = {"adam": ADAM, "sgd": SGD_PLAIN, "momentum": SGD_MOMENTUM, "nesterov": SGD_NESTEROV}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.float64, torch.bfloat16),
    (torch.float64, torch.float16),
]


class Problem:
    """Inputs of one step and its VJP, every one of them random and nonzero."""

    def __init__(self, rule: Rule, dtype=torch.float32, grad_dtype=None, n=2100, k=10, seed=0, groups=1):
        self.rule, self.k, self.n = rule, k, n
        random = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(n, generator=random, dtype=torch.float64)

        self.state = [normal().to(dtype) for _ in range(1 + len(rule.slots))]
        if rule is ADAM:
            self.state[2] = self.state[2].square()
        self.grad = normal().to(grad_dtype or dtype)
        self.adjoint = [normal().to(dtype) for _ in self.state]
        self.hyper = torch.tensor([HYPER[rule.name]], dtype=torch.float64).repeat(groups, 1)
        self.hyper *= 1 + 0.01 * torch.arange(groups)[:, None]
        self.segments = Segments.single(n)
        self.scale = 0.73

    def step(self, backend, dtype=None) -> list[Tensor]:
        state = [x.to(dtype or x.dtype, copy=True) for x in self.state]
        backend.step_(self.rule, state[0], state[1:], self.grad, self.hyper, self.k, self.segments, self.scale)
        return state

    def vjp(self, backend, dtype=None) -> tuple[list[Tensor], Tensor]:
        """The adjoints and u, and the hyperparameter cotangents."""
        state = [x.to(dtype or x.dtype, copy=True) for x in self.state]
        adjoint = [x.to(dtype or x.dtype, copy=True) for x in self.adjoint]
        u = torch.full_like(state[0], torch.nan)
        out = backend.vjp_(
            self.rule, state[0], state[1:], self.grad, self.hyper, self.k, self.segments,
            adjoint[0], adjoint[1:], u, self.scale,
        )  # fmt: skip
        assert same_bits(state, [x.to(dtype or x.dtype) for x in self.state]), "the VJP changed the state"
        return [*adjoint, u], out

    def terms(self, monkeypatch) -> Tensor:
        """What each element adds to each hyperparameter cotangent, float64 `[H + 1, n]` (one group)."""
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_sum", lambda x, y=None: x if y is None else x * y)
            raw, state = self.grad.double(), [x.double() for x in self.state]
            u, _, dh = reference.vjp(
                self.rule, state[0], state[1:], raw * self.scale, self.hyper[0].tolist(), self.k,
                [x.double() for x in self.adjoint],
            )  # fmt: skip
        return torch.stack([x.expand(self.n) for x in dh] + [u * raw])


class Directions(Problem):
    """A problem with tangents along `directions`, all random; the last leaves the hyperparameters as they are."""

    def __init__(self, rule, *arguments, directions=2, **options):
        super().__init__(rule, *arguments, **options)
        if rule is ADAM:
            self.state[2] += 0.05  # or one element with the least v would decide which error is larger
        random = torch.Generator().manual_seed(7)

        def draw() -> Tensor:
            return torch.randn(self.n, generator=random, dtype=torch.float64).to(self.state[0].dtype)

        self.tangents = [[draw() for _ in self.state] for _ in range(directions)]
        self.moved = [draw() for _ in range(directions)]
        shape = (directions, *self.hyper.shape)
        self.hyper_tangents = torch.randn(shape, generator=random, dtype=torch.float64) * self.hyper
        self.hyper_tangents[-1] = 0.0

    def jvp(self, backend, dtype=None, advance=False, device="cpu") -> tuple[list[Tensor], list[Tensor]]:
        """The tangents, direction by direction, and the state."""

        def copied(tensors) -> list[Tensor]:
            return [x.to(device, dtype or x.dtype, copy=True) for x in tensors]

        state, tangents, moved = copied(self.state), [copied(x) for x in self.tangents], copied(self.moved)
        backend.jvp_(
            self.rule, state[0], state[1:], self.grad.to(device), self.hyper, self.k, self.segments, tangents, moved,
            self.hyper_tangents, self.scale, advance,
        )  # fmt: skip
        return [x.cpu() for tangent in tangents for x in tangent], [x.cpu() for x in state]


def same_bits(a, b) -> bool:
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.numpy().tobytes() == y.numpy().tobytes()
        for x, y in zip(a, b, strict=True)
    )


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def assert_close_to_float64(ours, torchs, exact, dtype) -> None:
    ulp = torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 1)
    for name, a, b, e in zip(("p", "s1", "s2", "u"), ours, torchs, exact, strict=False):
        assert a.isfinite().all(), f"{name} has values that are not finite"
        mine, theirs = (a.double() - e).abs(), (b.double() - e).abs()
        assert mine.max() <= 2 * theirs.max() + ulp * e.abs().max(), f"largest error of {name}"
        assert rms(mine) <= 2 * rms(theirs) + ulp * rms(e), f"rms error of {name}"


def assert_sums_close(ours: Tensor, torchs: Tensor, exact: Tensor, terms: Tensor, dtype) -> None:
    size = terms.square().sum(1).sqrt()
    mine, theirs = (ours - exact)[0].abs(), (torchs - exact)[0].abs()
    additions = torch.finfo(torch.float64).eps * terms.abs().sum(1)
    assert (mine <= 2 * theirs + 8 * torch.finfo(dtype).eps * size + additions).all(), (ours, exact)


def everything(problem: Problem, backend) -> list[Tensor]:
    """All that a backend's kernels compute for a problem."""
    tensors, out = problem.vjp(backend)
    return [*problem.step(backend), *tensors, out, backend.dot(problem.grad, problem.adjoint[0])]
