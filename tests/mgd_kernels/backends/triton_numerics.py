"""Numerics of the Triton kernels against the float64 specification; `test_triton.py` runs this file.

On a GPU where there is one, else in Triton's interpreter, which needs a process that sets TRITON_INTERPRET=1 before
anything imports triton.
"""

from __future__ import annotations

import pytest
import quick_interpreter  # noqa: F401
import torch
from kernel_problem import Directions
from torch import Tensor

from mgd_kernels import ops, use_backend
from mgd_kernels.arena import Segments
from mgd_kernels.backends import reference, triton
from mgd_kernels.errors import BadArgument
from mgd_kernels.rules import ADAM, SGD_MOMENTUM, SGD_NESTEROV, SGD_PLAIN, Rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = {"adam": ADAM, "plain": SGD_PLAIN, "momentum": SGD_MOMENTUM, "nesterov": SGD_NESTEROV}
# No hyperparameter at its default, none zero; groups differ in all of them.
HYPER = {"adam": [0.03, 0.1, 0.02, 0.8, 0.95, 1e-3, 1e-2], "sgd": [0.03, 0.1, 0.02, 0.8, 0.3]}
EPS = torch.finfo(torch.float32).eps
SCALE = 0.7
# Around the 512 elements of a block of the VJP and the 1024 of one of the step, and two of either and a tail.
LENGTHS = [0, 1, 17, 511, 512, 1023, 1024, 1025, 2100]
if DEVICE == "cuda":  # where accesses are vectors
    LENGTHS += [15, 16, 1026, 1027]


def layout(name: str, n: int) -> Segments:
    """single: one group. ragged: groups that start and stop anywhere, out of order, with gaps, and one empty group.
    aligned: two interleaved groups on boundaries that allow 128-bit accesses."""
    if name == "single":
        return Segments.single(n)
    if name == "ragged":
        return Segments(torch.tensor([[1, n // 3, 2], [n // 3, n // 2, 0], [n // 2 + 3, n - 1, 2]]), 4)
    half = n // 32 * 16
    return Segments(torch.tensor([[0, half, 1], [half, n // 16 * 16, 0]]), 2)


class Problem:
    """Random tensors of one rule in float32 (what every computation starts from), and runs of any backend on them."""

    def __init__(self, rule: Rule, n: int, k: int, segments: Segments, grad_dtype=torch.float32, steps: int = 1):
        generator = torch.Generator().manual_seed(1000 * n + k)

        def random(positive=False):
            x = torch.randn(n, generator=generator)
            return x.square() if positive else x

        self.rule, self.k, self.segments = rule, k, segments
        self.state = [random(), *(random(slot == "exp_avg_sq") for slot in rule.slots)]
        self.grads = [random().to(grad_dtype) for _ in range(steps)]
        self.adjoints = [random() for _ in self.state]
        factors = 1 - 0.1 * torch.arange(segments.groups, dtype=torch.float64)[:, None]
        self.hyper = factors * torch.tensor(HYPER[rule.name], dtype=torch.float64)
        self.hypers = torch.stack([self.hyper * 0.999**i for i in range(steps)])
        self.scales = [SCALE] * steps

    def _on(self, backend, dtype, tensors: list[Tensor]) -> list[Tensor]:
        device = DEVICE if backend is triton else "cpu"
        return [tensor.to(device, dtype, copy=True) for tensor in tensors]

    def step(self, backend, dtype=torch.float32, **extra) -> list[Tensor]:
        state = self._on(backend, dtype, self.state)
        (grad,) = self._on(backend, None, self.grads[:1])
        backend.step_(self.rule, state[0], state[1:], grad, self.hyper, self.k, self.segments, SCALE, **extra)
        return [tensor.cpu() for tensor in state]

    def vjp(self, backend, dtype=torch.float32, u_dtype=None) -> list[Tensor]:
        """The new adjoints, u, and the hyperparameter cotangents [G, H + 1]."""
        state = self._on(backend, dtype, self.state)
        (grad,) = self._on(backend, None, self.grads[:1])
        adjoints = self._on(backend, dtype, self.adjoints)
        u = torch.zeros_like(state[0], dtype=u_dtype)
        out = backend.vjp_(
            self.rule, state[0], state[1:], grad, self.hyper, self.k, self.segments, adjoints[0], adjoints[1:], u, SCALE
        )
        for tensor, given in zip(state, self.state, strict=True):
            assert torch.equal(tensor.cpu(), given.to(dtype)), "the state before the step must stay as it is"
        return [tensor.cpu() for tensor in (*adjoints, u, out)]

    def replay(self, backend, dtype=torch.float32, grads=None) -> list[Tensor]:
        state = self._on(backend, dtype, self.state)
        grads = self._on(backend, None, self.grads) if grads is None else grads
        backend.replay_(self.rule, state[0], state[1:], grads, self.hypers, self.k, self.segments, self.scales)
        return [tensor.cpu() for tensor in state]

    def single_steps(self) -> list[Tensor]:
        state = self._on(triton, torch.float32, self.state)
        grads = self._on(triton, None, self.grads)
        for i, grad in enumerate(grads):
            triton.step_(
                self.rule, state[0], state[1:], grad, self.hypers[i], self.k + i, self.segments, self.scales[i]
            )
        return [tensor.cpu() for tensor in state]

    def cotangent_scale(self, monkeypatch) -> Tensor:
        """For each hyperparameter cotangent, the root of the sum of squares of the terms that add up to it, [G, H + 1]:
        rounding errors of the terms, being independent, leave a few EPS of this."""
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_sum", lambda x, y=None: (x if y is None else x * y).square().sum())
            return self.vjp(reference, torch.float64)[-1].abs().sqrt()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a 16-bit dtype as the kernels round it: to nearest on a GPU (test_triton.py sees that in the generated
    code), but the interpreter truncates to bfloat16."""
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        x = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return x.to(dtype)


def assert_as_good_as_torch(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """Every tensor's largest error is at most twice that of plain torch in float32. The last rounding of the largest
    value is granted beside that, since on a few elements plain torch may have luck."""
    for x, y, z in zip(found, plain, exact, strict=True):
        if z.numel():
            error, allowed = (x.double() - z).abs().max(), 2 * (y.double() - z).abs().max() + EPS * z.abs().max()
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


cases = (
    [("adam", "single", n, torch.float32, 1 + n % 2) for n in LENGTHS]
    + [(rule, "single", n, torch.float32, k) for rule in RULES for n, k in ((17, 1), (1025, 2))]
    + [("adam", "single", 1025, dtype, 3) for dtype in (torch.bfloat16, torch.float16)]
    + [(rule, "ragged", 2100, torch.float32, 3) for rule in RULES]
    + [("nesterov", "aligned", 2100, torch.float32, k) for k in (1, 3)]
    + [("adam", "aligned", 2100, torch.float32, 1), ("adam", "single", 100, torch.float32, 1000)]
)


@pytest.mark.parametrize("rule, name, n, grad_dtype, k", cases)
def test_step(rule, name, n, grad_dtype, k):
    problem = Problem(RULES[rule], n, k, layout(name, n), grad_dtype)
    found = problem.step(triton)
    exact = problem.step(reference, torch.float64)
    assert_as_good_as_torch(found, problem.step(reference), exact)
    if n > 2:
        assert not torch.equal(found[0], problem.state[0])


@pytest.mark.parametrize("rule, name, n, grad_dtype, k", cases)
def test_vjp(rule, name, n, grad_dtype, k, monkeypatch):
    problem = Problem(RULES[rule], n, k, layout(name, n), grad_dtype)
    *found, sums = problem.vjp(triton)
    *plain, plain_sums = problem.vjp(reference)
    *exact, exact_sums = problem.vjp(reference, torch.float64)
    assert_as_good_as_torch(found, plain, exact)
    assert sums.dtype == torch.float64 and sums.shape == exact_sums.shape
    error = (sums - exact_sums).abs()
    allowed = 2 * (plain_sums - exact_sums).abs() + 4 * EPS * problem.cotangent_scale(monkeypatch)
    assert (error <= allowed).all(), f"worst {(error / allowed).nan_to_num().max():.3g} times what is allowed"
    if name == "ragged":
        assert (sums[[1, 3]] == 0).all() and (sums[2] != 0).any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name, n, k, steps", [("single", 1030, 1, 1), ("ragged", 1100, 1, 4)])
def test_replay(rule, name, n, k, steps):
    problem = Problem(RULES[rule], n, k, layout(name, n), steps=steps)
    found = problem.replay(triton)
    assert_as_good_as_torch(found, problem.replay(reference), problem.replay(reference, torch.float64))
    for x, y in zip(found, problem.single_steps(), strict=True):
        assert torch.equal(x, y), "a replay is bit-identical to its single steps"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name, n, k, grad_dtype",
    [("single", 1030, 1, torch.float16), ("ragged", 1100, 3, torch.float32), ("aligned", 1056, 1000, torch.float32)],
)
def test_jvp(rule, name, n, k, grad_dtype):
    segments = layout(name, n)
    problem = Directions(RULES[rule], grad_dtype=grad_dtype, n=n, k=k, groups=segments.groups)
    problem.segments = segments
    found, state = problem.jvp(triton, device=DEVICE)
    assert all(torch.equal(x, y) for x, y in zip(state, problem.state, strict=True))
    assert_as_good_as_torch(found, problem.jvp(reference)[0], problem.jvp(reference, torch.float64)[0])
    again, state = problem.jvp(triton, device=DEVICE, advance=True)
    assert all(torch.equal(x, y) for x, y in zip(again, found, strict=True))
    p, *slots = (x.to(DEVICE, copy=True) for x in problem.state)
    grad = problem.grad.to(DEVICE)
    triton.step_(problem.rule, p, slots, grad, problem.hyper, k, segments, problem.scale)
    assert all(torch.equal(x, y.cpu()) for x, y in zip(state, (p, *slots), strict=True)), "not the bits of the step"


def test_replay_of_hundreds_of_steps():
    problem = Problem(ADAM, 16, 5, layout("single", 16), steps=300)
    found, plain, exact = (
        problem.replay(backend, dtype)
        for backend, dtype in ((triton, torch.float32), (reference, torch.float32), (reference, torch.float64))
    )
    assert_as_good_as_torch(found, plain, exact)


def test_replay_finds_gradients_wherever_they_lie():
    """Rows of one tensor, rows at an odd pitch, tensors of their own, the same tensor twice; scales that differ; and
    a log whose dtype changes on the way."""
    problem = Problem(ADAM, 515, 2, layout("single", 515), torch.bfloat16, steps=4)
    problem.scales = [1.0, 0.5, torch.tensor(0.25, dtype=torch.float64), 2.0]
    expected = problem.single_steps()
    logged = [grad.to(DEVICE) for grad in problem.grads]
    stacked = torch.stack(logged)
    pitched = torch.zeros(4, 519, dtype=torch.bfloat16, device=DEVICE)
    pitched[:, :515] = stacked
    mixed = [logged[0], logged[1].float(), logged[2].float(), logged[3]]
    for grads in (logged, stacked, list(pitched[:, :515]), mixed, logged[::-1][::-1]):
        for x, y in zip(problem.replay(triton, grads=grads), expected, strict=True):
            assert torch.equal(x, y)
    problem.scales = [0.5, 0.25, 0.5, 0.125]
    problem.grads[3] = problem.grads[1]
    once = [grad.to(DEVICE) for grad in problem.grads[:3]]
    for x, y in zip(problem.replay(triton, grads=[*once, once[1]]), problem.single_steps(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("rule", RULES)
def test_exact_zeros_stay_zero(rule):
    """Padding, and elements that never saw a gradient, even with eps = eps_root = 0: no NaN, nothing moves."""
    problem = Problem(RULES[rule], 100, 1, layout("single", 100))
    for tensor in (*problem.state, *problem.grads, *problem.adjoints):
        tensor[10:60] = 0
    if rule == "adam":
        problem.hyper[:, 5:] = 0
    found = [*problem.step(triton), *problem.vjp(triton)[:-1]]
    exact = [*problem.step(reference, torch.float64), *problem.vjp(reference, torch.float64)[:-1]]
    for x, z in zip(found, exact, strict=True):
        assert (x[10:60] == 0).all() and (z[10:60] == 0).all()
    assert all(tensor.isfinite().all() for tensor in problem.vjp(triton))


@pytest.mark.parametrize("rule", ["adam", "nesterov"])
def test_elements_outside_every_segment_are_not_touched(rule):
    problem = Problem(RULES[rule], 1300, 3, layout("ragged", 1300))
    outside = torch.ones(1300, dtype=torch.bool)
    for start, stop, _ in problem.segments.rows():
        outside[start:stop] = False
    assert outside.sum() == 5
    for new, old in zip(problem.step(triton), problem.state, strict=True):
        assert torch.equal(new[outside], old[outside])
        assert not (new[~outside] == old[~outside]).any()
    *adjoints, u, _ = problem.vjp(triton)
    for new, old in zip(adjoints, problem.adjoints, strict=True):
        assert torch.equal(new[outside], old[outside])
    assert (u[outside] == 0).all()


def test_first_step_ignores_what_the_buffer_held():
    problem = Problem(SGD_MOMENTUM, 40, 1, layout("single", 40))
    expected = [problem.step(triton)[0], *problem.vjp(triton)]
    problem.state[1][:] = float("inf")
    for x, y in zip([problem.step(triton)[0], *problem.vjp(triton)], expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_16_bit_copy_beside_the_float32_master(low):
    problem = Problem(ADAM, 1025, 3, layout("single", 1025), low)
    copy = torch.zeros(1025, dtype=low, device=DEVICE)
    new = problem.step(triton, low=copy)
    for x, y in zip(new, problem.step(triton), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(copy.cpu(), rounded(new[0], low))


def test_16_bit_cotangent_of_the_gradient():
    problem = Problem(ADAM, 1025, 3, layout("single", 1025), torch.bfloat16)
    wide, narrow = problem.vjp(triton), problem.vjp(triton, u_dtype=torch.bfloat16)
    assert torch.equal(narrow[-2], rounded(wide[-2], torch.bfloat16))
    assert torch.equal(narrow[-1], wide[-1])


def test_step_number_and_scale_from_the_device():
    problem = Problem(ADAM, 100, 7, layout("single", 100))
    expected = [*problem.step(triton), *problem.vjp(triton)]
    problem.k = torch.tensor(7, device=DEVICE)
    for x, y in zip([*problem.step(triton), *problem.vjp(triton)], expected, strict=True):
        assert torch.equal(x, y)
    state = [tensor.to(DEVICE) for tensor in problem.state]
    scale = torch.tensor(SCALE, dtype=torch.float64, device=DEVICE)
    triton.step_(
        ADAM, state[0], state[1:], problem.grads[0].to(DEVICE), problem.hyper.to(DEVICE), 7, problem.segments, scale
    )
    for x, y in zip(state, expected, strict=False):
        assert torch.equal(x.cpu(), y)


def test_misaligned_views():
    problem = Problem(ADAM, 1025, 3, layout("single", 1025))
    expected = problem.step(triton)
    whole = [torch.cat([tensor.new_zeros(1), tensor]).to(DEVICE) for tensor in (*problem.state, problem.grads[0])]
    p, m, v, g = (tensor[1:] for tensor in whole)
    triton.step_(ADAM, p, [m, v], g, problem.hyper, 3, problem.segments, SCALE)
    for x, y in zip((p, m, v), expected, strict=True):
        assert torch.equal(x.cpu(), y)
    assert all(tensor[0] == 0 for tensor in whole)


def test_unusual_hyperparameters():
    """beta = 0 and late steps: powers are exact at both ends, and 1 - beta comes from float64."""
    problem = Problem(ADAM, 64, 1, layout("single", 64))
    problem.hyper[:, 3:5] = torch.tensor([0.0, 0.9999], dtype=torch.float64)
    for k in (1, 2, 100_000):
        problem.k = k
        plain, exact = (problem.step(reference, dtype) for dtype in (torch.float32, torch.float64))
        assert_as_good_as_torch(problem.step(triton), plain, exact)
        *plain, _ = problem.vjp(reference)
        *exact, exact_sums = problem.vjp(reference, torch.float64)
        *found, sums = problem.vjp(triton)
        assert_as_good_as_torch(found, plain, exact)
        torch.testing.assert_close(sums, exact_sums, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 511, 1025, 5000])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_dot(n, dtypes):
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, generator=generator).to(dtype) for dtype in dtypes)
    found = triton.dot(x.to(DEVICE), y.to(DEVICE))
    assert found.dtype == torch.float64 and found.shape == ()
    # Products of two float32 numbers are exact in float64; only the order of the sum differs.
    scale = (x.double() * y.double()).abs().sum()
    assert (found.cpu() - reference.dot(x, y)).abs() <= 1e-14 * scale


def test_the_partition_of_large_buffers(monkeypatch):
    """Tiles of several blocks, as buffers of millions of parameters have, give the same sums but for their order."""
    problem = Problem(ADAM, 9000, 3, layout("ragged", 9000))
    small = problem.vjp(triton)
    monkeypatch.setattr(triton._kernels(), "SMALL", 0)
    large = problem.vjp(triton)
    for x, y in zip(small[:-1], large[:-1], strict=True):
        assert torch.equal(x, y)
    torch.testing.assert_close(large[-1], small[-1], rtol=1e-10, atol=1e-10)
    assert torch.equal(problem.vjp(triton)[-1], large[-1]), "sums are deterministic"


def test_operators_reach_these_kernels(monkeypatch):
    calls = []
    for name in ("step_", "vjp_"):
        original = getattr(triton, name)
        monkeypatch.setattr(triton, name, lambda *a, f=original, n=name: (calls.append(n), f(*a))[1])
    problem = Problem(ADAM, 600, 3, layout("aligned", 600))
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (*problem.state, problem.grads[0])]
    hyper = problem.hyper.clone().requires_grad_()
    with use_backend("triton"):
        new = ops.adam_step(*leaves, hyper, 3, problem.segments.table)
        sum((x * a.to(DEVICE)).sum() for x, a in zip(new, problem.adjoints, strict=True)).backward()
    assert calls == ["step_", "vjp_"]
    problem.grads[0] = problem.grads[0] / SCALE  # what `vjp` multiplies by SCALE again
    *adjoints, u, sums = problem.vjp(reference, torch.float64)
    for leaf, expected in zip(leaves, [*adjoints, u / SCALE], strict=True):
        torch.testing.assert_close(
            leaf.grad.cpu().double(), torch.where(expected == 0, 0, expected), rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(hyper.grad, sums[:, :-1], rtol=1e-4, atol=1e-4)


def test_what_is_not_supported_is_said():
    x = torch.zeros(4, device=DEVICE)
    assert triton.unavailable() is None
    assert triton.unsupported(ADAM, x, x) is None
    assert "float32 parameters" in triton.unsupported(ADAM, x.double(), x.double())
    assert "gradient; got torch.float64" in triton.unsupported(ADAM, x, x.double())
    with pytest.raises(BadArgument, match="contiguous"):
        triton.dot(x[::2], x[::2])
    with pytest.raises(BadArgument, match=r"\[1, 1, 5\] \(steps, groups, lr,.*got \[1, 2, 5\]"):
        triton.step_(SGD_PLAIN, x, [], x.clone(), torch.zeros(2, 5, dtype=torch.float64), 1, Segments.single(4))
    with pytest.raises(BadArgument, match=r"shape \[4\]"):
        triton.step_(SGD_PLAIN, x, [], x[:3], torch.zeros(1, 5, dtype=torch.float64), 1, Segments.single(4))
    for grad, word in ((x, "apart"), (torch._neg_view(x.clone()), "negated")):
        with pytest.raises(BadArgument, match=word):
            triton.step_(SGD_PLAIN, x, [], grad, torch.zeros(1, 5, dtype=torch.float64), 1, Segments.single(4))


def test_autograd_hears_of_what_is_written():
    params, slot, ap, aslot, u, grad = (torch.ones(4, device=DEVICE) for _ in range(6))
    table, segments = torch.zeros(1, 5, dtype=torch.float64), Segments.single(4)
    triton.step_(SGD_MOMENTUM, params, [slot], grad, table, 1, segments)
    triton.vjp_(SGD_MOMENTUM, params, [slot], grad, table, 1, segments, ap, [aslot], u)
    assert [x._version for x in (params, slot, ap, aslot, u, grad)] == [1, 1, 1, 1, 1, 0]
