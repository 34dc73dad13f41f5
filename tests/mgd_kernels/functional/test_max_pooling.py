"""Max pooling to the bits of torch's: ties, NaN, infinities, layouts, windows that overlap; and what goes to torch."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from operator_cases import derivatives
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from mgd_kernels import _core, functional
from mgd_kernels.errors import BadArgument
from mgd_kernels.functional import max_pooling

WINDOWS = [(2, 2, 0), (3, 2, 1), (3, 1, 1)]
SHAPES = [(2, 3, 9, 12), (1, 2, 35, 70), (2, 18, 5, 4), (1, 1, 2, 2)]
ops = torch.ops.mgd_kernels


def image(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g)
    if kind != "plain":
        x = torch.randint(-1, 3, shape, generator=g).float()  # ties in most windows
        x[torch.rand(shape, generator=g) < 0.3] = {"ties": -0.0, "nan": torch.nan, "-inf": -torch.inf}[kind]
        x[:, :1] = -torch.inf if kind == "-inf" else x[:, :1]
    return x.to(dtype)


def indices(which: Tensor, width: int, window: tuple[int, int, int]) -> Tensor:
    """In a plane, as torch counts."""
    kernel, stride, padding = window
    rows, columns = (torch.arange(n) * stride - padding for n in which.shape[-2:])
    return (rows[:, None] + which.long() // kernel) * width + columns + which.long() % kernel


def same(mine: Tensor, torchs: Tensor) -> None:
    assert mine.dtype is torchs.dtype and mine.stride() == torchs.stride()
    same_bits = torch.int32 if mine.dtype is torch.float32 else torch.int64
    assert torch.equal(mine.isnan(), torchs.isnan())
    assert torch.equal(mine.nan_to_num().view(same_bits), torchs.nan_to_num().view(same_bits))


def compare(x: Tensor, window: tuple[int, int, int]) -> None:
    """Value, places, gradient and second derivative."""
    y, which = max_pooling.max_pool(x, *window)
    expected, places = F.max_pool2d(x, *window, return_indices=True)
    same(y, expected)
    assert torch.equal(indices(which, x.shape[-1], window), places)
    g = torch.Generator().manual_seed(1)
    gy, c = (torch.randn(t.shape, generator=g).to(t.dtype) for t in (y, x))
    found = []
    for function in (functional.max_pool2d, F.max_pool2d):
        a, b = x.detach().requires_grad_(), gy.clone().requires_grad_()
        (gx,) = torch.autograd.grad(function(a, *window), a, b, create_graph=True)
        found.append((gx.detach(), *torch.autograd.grad(gx, b, c)))
    for mine, torchs in zip(*found, strict=True):
        assert torch.equal(mine, torchs)


@pytest.mark.parametrize(("window", "kind"), list(product(WINDOWS, ("plain", "ties", "nan", "-inf"))))
def test_bits_of_torch(window, kind):
    for shape, dtype in product(SHAPES, (torch.float32, torch.float64)):
        compare(image(kind, shape, dtype), window)
    compare(image(kind, (4, 7, 8)), window)


@pytest.mark.parametrize("isa", [isa for isa in _core.isas() if isa != _core.isa()])
def test_every_instruction_set(isa):
    default = _core.isa()
    try:
        _core.use_isa(isa)
        for window, kind, dtype in product(WINDOWS, ("ties", "nan"), (torch.float32, torch.float64)):
            compare(image(kind, SHAPES[0], dtype), window)
    finally:
        _core.use_isa(default)


def test_bits_do_not_depend_on_threads():
    x, before, found = image("ties", (3, 17, 64, 64)), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(derivatives(lambda x: functional.max_pool2d(x, 3, 2, 1), [x]))
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


def test_third_derivatives_and_other_layouts():
    """Of a penalty: <gradient, gradient> of the pooled square."""
    x = image("plain", (9, 12, 2, 3)).permute(2, 3, 0, 1)
    found = []
    for function in (functional.max_pool2d, F.max_pool2d):
        a = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(a * a, 3, 2, 1).square().sum(), a, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), a, create_graph=True)
        found.append((first, second, *torch.autograd.grad(second.square().sum(), a)))
    torch.testing.assert_close(*found)


def test_each_pass_is_one_node_and_gives_the_bits_of_the_call():
    x = image("plain", (2, 3, 9, 12))
    function = lambda x: derivatives(lambda x: nn.MaxPool2d(3, 2, 1)(x), [x])
    with functional_overrides():
        module = make_fx(function)(x)
        expected = function(x)
    module.graph.eliminate_dead_code()
    own = [str(node.target) for node in module.graph.nodes if "mgd_kernels" in str(node.target)]
    forward, put, take = ("mgd_kernels.max_pool2d" + kind for kind in (".default", "_put.default", "_take.default"))
    assert sorted(own) == sorted([forward, put, take, put])
    assert all(map(torch.equal, module(x), expected))


def functional_overrides():
    class Overrides(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return functional.REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))

    return Overrides()


def test_what_goes_to_torch():
    call = lambda args, options, x: functional.max_pool2d(x, *args, **options)
    x = image("ties", (2, 3, 9, 12))
    for args, options in (
        ((3, 2, 1, 2), {}),
        ((3, 2, 0), {}),
        ((3, 2), dict(ceil_mode=True)),
        ((2, 2, 1), {}),
        (((2, 3), 2), {}),
        ((2, (1, 2)), {}),
        ((5, 2, 1), {}),
    ):
        graph = make_fx(partial(call, args, options))(x).graph
        assert not any("mgd_kernels" in str(node.target) for node in graph.nodes)
        assert torch.equal(functional.max_pool2d(x, *args, **options), F.max_pool2d(x, *args, **options))
    last = x.contiguous(memory_format=torch.channels_last)
    assert functional.max_pool2d(last, 2).stride() == F.max_pool2d(last, 2).stride() != F.max_pool2d(x, 2).stride()
    y, places = functional.max_pool2d(x, 2, return_indices=True)
    assert places.dtype is torch.int64 and torch.equal(y, functional.max_pool2d(x, (2, 2), None, [0, 0]))
    with pytest.raises(RuntimeError, match=r"[Oo]utput size"):
        functional.max_pool2d(x[..., :1], 2)


def test_operators_check_what_they_are_given():
    x, which = torch.zeros(1, 2, 4, 4), torch.full((1, 2, 2, 2), 255, dtype=torch.uint8)
    ops.max_pool2d_put(x[..., :2, :2], which, 4, 4, 2, 2, 0), ops.max_pool2d_take(x, which, 2, 2, 0)  # some number
    for call in (
        lambda: ops.max_pool2d(x, 3, 3, 0),
        lambda: ops.max_pool2d(x.half(), 2, 2, 0),
        lambda: ops.max_pool2d(x[..., :1], 2, 2, 0),
        lambda: ops.max_pool2d_put(x[..., :2, :2], which, 6, 4, 2, 2, 0),
        lambda: ops.max_pool2d_put(x[..., :2, :2], which[..., :1], 4, 4, 2, 2, 0),
        lambda: ops.max_pool2d_take(x, which.int(), 2, 2, 0),
    ):
        with pytest.raises(BadArgument, match="expected"):
            call()
