"""Convolutions with second derivatives of their own against torch's: the same values, gradients and formulas."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from mgd_kernels import functional

SETTINGS = {
    "plain": {},
    "padding": {"padding": 1},
    "stride": {"stride": 2, "padding": 1},  # 7 + 2 pixels: the last one is read by no window
    "dilation": {"dilation": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "stride": 2},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
every_function = pytest.mark.parametrize(
    "name", ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]
)


def inputs(name: str, settings: dict, dtype=torch.float64, size: int = 6) -> list[torch.Tensor]:
    """Input [2, 4, size, ...], weights of 3 pixels with 8 output channels, bias."""
    g = torch.Generator().manual_seed(0)
    n, groups = int(name[-2]), settings.get("groups", 1)
    shape = [4, 8 // groups] if "transpose" in name else [8, 4 // groups]
    shapes = [2, 4, *[size] * n], [*shape, *[3] * n], [8]
    return [torch.randn(*shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


def derivatives(function, tensors):
    """Values, gradients, and the gradient of a sum of squares of those, with respect to everything."""
    y = function(*tensors)
    gy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).requires_grad_()
    first = torch.autograd.grad(y, tensors, gy, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    return [y, *first, *torch.autograd.grad(penalty, [gy, *tensors], materialize_grads=True)]


@every_function
@every_setting
def test_derivatives_are_torchs(name, settings):
    given = inputs(name, settings)
    mine, torchs = (
        derivatives(lambda *t, f=f: f(*t, **settings), given) for f in (getattr(functional, name), getattr(F, name))
    )
    for i, (x, y) in enumerate(zip(mine, torchs, strict=True)):
        if i < 4:  # the value and three gradients come from the same kernels
            assert torch.equal(x, y)
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("missing", range(3))
def test_second_derivatives_of_some_inputs(missing):
    """Where an input needs no derivative, or has no cotangent, the others' are as with it."""
    given = inputs("conv2d", {})
    given[missing] = given[missing].detach()
    wanted = [x for x in given if x.requires_grad]
    found = []
    for function in (functional.conv2d, F.conv2d):
        y = function(*given, padding=1)
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        for g in first:
            found.append(torch.autograd.grad(g.square().sum(), wanted, retain_graph=True, materialize_grads=True))
    half = len(found) // 2
    for mine, torchs in zip(found[:half], found[half:], strict=True):
        for x, y in zip(mine, torchs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_third_derivatives():
    given = [x[:, :2].detach().requires_grad_() if x.ndim > 1 else x for x in inputs("conv1d", {})]
    first = lambda *t: torch.autograd.grad(functional.conv1d(*t).sin().sum(), t, create_graph=True)
    assert torch.autograd.gradgradcheck(first, given)


def test_no_kernel_as_large_as_an_image():
    """Why they exist: the weights' part of the second derivatives is a weight gradient."""
    x, w, b = inputs("conv2d", {}, torch.float32, size=16)

    def second(x, w):
        loss = functional.conv2d(x, w, b, padding=1).square().sum()
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        return torch.autograd.grad(g, [x, w], torch.ones_like(g))

    graph = make_fx(second)(x, w).graph
    kernels = [n.args[1].meta["val"].shape for n in graph.nodes if n.target is torch.ops.aten.convolution.default]
    assert set(kernels) == {torch.Size([8, 4, 3, 3])}
    assert Counter(n.target for n in graph.nodes)[torch.ops.aten.convolution_backward.default] > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, at the first dual number
def test_what_is_left_to_torch():
    x, w, b = (t.detach() for t in inputs("conv2d", {}, torch.float32))
    assert functional.conv2d(x, w, b).grad_fn is None  # nobody asks for a derivative
    w.requires_grad_()
    name = lambda y: type(y.grad_fn).__name__
    assert name(functional.conv2d(x, w, b)) == "_ConvolutionBackward"
    assert name(functional.conv2d(x, w, b, padding="same")) == "ConvolutionBackward0"
    assert name(functional.conv2d(x[0], w, b)) == "SqueezeBackward1"
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.conv2d(x, w, b).dtype is torch.bfloat16
    with fwAD.dual_level():
        dual = fwAD.make_dual(x, torch.ones_like(x))
        assert fwAD.unpack_dual(functional.conv2d(dual, w, b)).tangent is not None
    second = torch.func.grad(lambda w: torch.func.grad(lambda v: functional.conv2d(x, v, b).square().sum())(w).sum())
    torch.testing.assert_close(
        second(w.detach()),
        torch.func.grad(lambda w: torch.func.grad(lambda v: F.conv2d(x, v, b).square().sum())(w).sum())(w.detach()),
    )


def test_batched_cotangents():
    given = inputs("conv2d", {})
    y = functional.conv2d(*given)
    (g,) = torch.autograd.grad(y.square().sum(), given[1], create_graph=True)
    u = torch.randn(3, *g.shape, dtype=g.dtype)
    batched = torch.autograd.grad(g, given[:2], u, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for x, single in zip(batched, torch.autograd.grad(g, given[:2], u[i], retain_graph=True), strict=True):
            torch.testing.assert_close(x[i], single, rtol=1e-12, atol=1e-12)
