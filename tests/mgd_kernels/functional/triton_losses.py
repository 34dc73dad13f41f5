"""Cross-entropy without logits on a GPU, against torch in float64; `test_triton_operators.py` runs this file.

On a GPU where there is one, else in Triton's interpreter, as `triton_operators.py`.
"""

from __future__ import annotations

import pytest
import quick_interpreter  # noqa: F401
import torch
import torch.nn.functional as F
from operator_cases import EPS, LINEAR_LOSSES, derivatives, linear_loss, plain_linear_loss
from torch import Tensor

from mgd_kernels.backends import triton_loss, triton_loss_kernels
from mgd_kernels.functional import _library
from mgd_kernels.functional import linear_loss_strips as strips

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
WIDE = triton_loss_kernels.BLOCK + 77


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> list[str]:
    """The passes as they are called; strips of 4 tokens, of which the last is short."""
    found: list[str] = []
    if not GPU:
        monkeypatch.setattr(_library, "on_gpu", lambda x: True)
    monkeypatch.setattr(strips, "_STRIP_OF_GPU", 1)
    monkeypatch.setattr(strips, "_LEAST_ROWS", 4)
    for name in ("forward", "backward", "forward_backward", "double_backward"):
        real = getattr(triton_loss.TritonRows, name)
        call = lambda *args, name=name, real=real: (found.append(name), real(*args))[1]
        monkeypatch.setattr(triton_loss.TritonRows, name, call)
    return found


def problem(vocabulary: int, bias: bool = True, n: int = 9, width: int = 5) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=g) for shape in ((n, width), (vocabulary, width), (vocabulary,))]
    target = torch.randint(vocabulary, (n,), generator=g)
    target[[3, 5]], target[7] = 7, vocabulary - 1
    return [x.to(DEVICE) for x in inputs[: 2 + bias]], target.to(DEVICE)


def check(inputs: list[Tensor], target: Tensor, **options) -> None:
    """At most twice the error of torch's own float32, or 100 roundings: the products add up in another order."""
    mine, plain = (lambda h, w, b=None, f=f: f(h, w, target, b, **options) for f in (linear_loss, plain_linear_loss))
    exact, torchs = derivatives(plain, inputs, torch.float64), derivatives(plain, inputs)
    for got, theirs, value in zip(derivatives(mine, inputs), torchs, exact, strict=True):
        error, allowed = ((x - value).abs().max() / value.abs().max() for x in (got, theirs))
        assert got.dtype is torch.float32 and error <= max(2 * allowed, 100 * EPS)


def torchs_rows(z, tangent, gl, target, options) -> list[Tensor]:
    """losses, gz; ggl, the cotangent of z: by autograd."""
    ignored, smoothing, z_loss, cap = options
    z, gl = z.detach().requires_grad_(), gl.detach().requires_grad_()
    capped = cap * torch.tanh(z / cap) if cap else z
    losses = F.cross_entropy(capped, target, ignore_index=ignored, reduction="none", label_smoothing=smoothing)
    losses = losses + z_loss * capped.logsumexp(-1).square() * (target != ignored)
    (gz,) = torch.autograd.grad(losses, z, gl, create_graph=True)
    return [x.detach() for x in (losses, gz, *torch.autograd.grad(gz, [gl, z], tangent))]


@pytest.mark.parametrize(
    ("vocabulary", "options"),
    [(WIDE, (7, 0.0, 0.0, 0.0)), (WIDE, (7, 0.1, 0.02, 3.0)), (53, (7, 0.1, 0.02, 0.0)), (53, (7, 0.0, 0.0, 3.0))],
)
def test_rows(vocabulary, options):
    """What is computed between the products: at most twice torch's error, or 8 roundings of what is largest."""
    g = torch.Generator().manual_seed(0)
    z, tangent = (2 * torch.randn(9, vocabulary, generator=g).to(DEVICE) for _ in range(2))
    gl, target = torch.rand(9, generator=g).to(DEVICE), problem(vocabulary)[1]
    exact = torchs_rows(*(x.double() for x in (z, tangent, gl)), target, options)
    allowed = torchs_rows(z, tangent, gl, target, options)
    rows, every = triton_loss.TritonRows(target, vocabulary, *options), slice(0, 9)
    losses, statistics = torch.empty_like(gl), z.new_empty(9, 2)
    value, both, gz = z.clone(), z.clone(), z.clone()
    rows.forward(every, value, losses, statistics)
    assert torch.equal(value, z)
    rows.backward(every, gz, gl, statistics)
    again, other = torch.full_like(losses, torch.nan), torch.full_like(statistics, torch.nan)
    rows.forward_backward(every, both, gl, again, other)
    assert torch.equal(both, gz) and torch.equal(again, losses) and torch.equal(other, statistics)
    cotangent, second = z.clone(), tangent.clone()
    ggl = rows.double_backward(every, cotangent, second, gl, statistics)
    torch.testing.assert_close(second, gz, rtol=0, atol=2 * EPS)
    for got, torchs, wanted in zip((losses, gz, ggl, cotangent), allowed, exact, strict=True):
        error, most = ((x - wanted).abs().max() / wanted.abs().max() for x in (got, torchs))
        assert error <= max(2 * most, 8 * EPS)


@pytest.mark.parametrize("name", LINEAR_LOSSES)
def test_every_option(name, launches):
    inputs, target = problem(53)
    check(inputs, target, ignore_index=7, **LINEAR_LOSSES[name])
    assert "double_backward" in launches


def test_no_bias_and_what_is_frozen(launches):
    inputs, target = problem(53, bias=False)
    check(inputs, target)
    found = []
    for f in (linear_loss, plain_linear_loss):
        h = inputs[0].detach().requires_grad_()
        (gh,) = torch.autograd.grad(f(h, inputs[1], target), h, create_graph=True)
        found.append((gh, *torch.autograd.grad(gh.square().sum(), h)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_ignored_rows_are_zero_whatever_they_hold():
    (h, w), target = problem(53, bias=False)
    h[3] = torch.nan
    h = h.requires_grad_()
    loss = linear_loss(h, w, target, ignore_index=7)
    (gh,) = torch.autograd.grad(loss, h, create_graph=True)
    (again,) = torch.autograd.grad(gh[:3].square().sum(), h)
    for x in (loss, gh, again):
        assert x.isfinite().all()
    assert not gh[3].any() and not gh[5].any() and gh[:3].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of what is looked for
def test_large_and_hidden_logits():
    """A bias of minus infinity hides a class, here a whole block of them."""
    (h, w, b), target = problem(WIDE)
    b[: triton_loss_kernels.BLOCK] = -torch.inf
    target = target.clamp(min=triton_loss_kernels.BLOCK)
    h = h * 100
    torch.testing.assert_close(linear_loss(h, w, target, b), F.cross_entropy(F.linear(h, w, b), target))
    h[2] = torch.nan
    assert linear_loss(h, w, target, b).isnan()


def test_the_same_bits_twice():
    inputs, target = problem(53)
    found = [derivatives(lambda h, w, b: linear_loss(h, w, target, b), inputs) for _ in range(2)]
    assert all(map(torch.equal, *found))


def test_targets_that_are_no_class():
    if GPU:
        pytest.skip("it stops the device")
    inputs, target = problem(53)
    with pytest.raises(RuntimeError, match=r"targets in \[0, 53\)"):
        linear_loss(*inputs[:2], target.fill_(53))
