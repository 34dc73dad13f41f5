"""Cross-entropy without logits: several strips and columns, in float64, frozen layers, tied embeddings, memory."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from operator_cases import EPS, LINEAR_LOSSES, derivatives, linear_loss, plain_linear_loss
from peak import growth
from torch import _C
from torch.utils._python_dispatch import TorchDispatchMode

from mgd_kernels.errors import BadArgument
from mgd_kernels.functional import linear_loss_strips as module


@pytest.fixture
def short_strips(monkeypatch):
    """Several strips, of which the last is short, and several products for each."""
    monkeypatch.setattr(module, "_LEAST_ROWS", 16)
    monkeypatch.setattr(module, "_STRIP", 1)
    monkeypatch.setattr(module, "_COLUMNS", 23)


def problem(n=70, width=11, vocabulary=53, bias=True):
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=g) for shape in ((n, width), (vocabulary, width), (vocabulary,))]
    target = torch.randint(vocabulary, (n,), generator=g)
    target[[3, 11]] = 7
    return inputs[: 2 + bias], target


def pair(target, **options):
    return [lambda h, w, b=None, f=f: f(h, w, target, b, **options) for f in (linear_loss, plain_linear_loss)]


@pytest.mark.parametrize(("name", "bias"), list(product(LINEAR_LOSSES, (True, False))))
def test_strips_in_float64(short_strips, name, bias):
    inputs, target = problem(bias=bias)
    mine, theirs = (derivatives(f, inputs, torch.float64) for f in pair(target, ignore_index=7, **LINEAR_LOSSES[name]))
    for got, value in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, value, rtol=0, atol=1e-12 * (1 + float(value.abs().max())))


@pytest.mark.parametrize("name", LINEAR_LOSSES)
def test_strips_in_float32(short_strips, name):
    inputs, target = problem()
    mine, theirs = pair(target, **LINEAR_LOSSES[name])
    exact, plain = derivatives(theirs, inputs, torch.float64), derivatives(theirs, inputs)
    for got, torchs, value in zip(derivatives(mine, inputs), plain, exact, strict=True):
        error, allowed = ((x - value).abs().max() / value.abs().max() for x in (got, torchs))
        assert error <= max(2 * allowed, 100 * EPS)


@pytest.mark.parametrize(("name", "dtype"), list(product(("mean", "all"), (torch.float32, torch.float64))))
def test_bits_do_not_depend_on_threads(short_strips, name, dtype):
    inputs, target = problem(n=77, width=33, vocabulary=1001)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(derivatives(pair(target, **LINEAR_LOSSES[name])[0], inputs, dtype))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


def test_shapes_of_a_language_model_and_weights_of_tokens(short_strips):
    (h, weight, _), target = problem()
    h, target = h.view(7, 10, -1).double().requires_grad_(), target.view(7, 10)
    importance = torch.rand(7, 10, dtype=torch.float64, requires_grad=True)
    losses = linear_loss(h, weight.double(), target, reduction="none")
    logits = h @ weight.double().t()
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(7, 10)
    torch.testing.assert_close(losses, expected)
    results = []
    for x in (losses, expected):
        (gh,) = torch.autograd.grad((importance * x).sum(), h, create_graph=True)
        results.append(torch.autograd.grad(gh.square().sum(), importance)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_frozen_layers(short_strips, trained):
    """What is not trained has no gradient, and costs no product."""
    inputs, target = problem()
    found = []
    for f in pair(target):
        x = [p.double().requires_grad_(i in trained) for i, p in enumerate(inputs)]
        wanted = [x[i] for i in trained]
        first = torch.autograd.grad(f(*x), wanted, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted)])
    torch.testing.assert_close(*found)


class Products(TorchDispatchMode):
    """Counts the matrix products inside of the operators, in units of one that gives all logits."""

    def __init__(self, unit: int):
        super().__init__()
        self.unit, self.flops = unit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mgd_kernels":
            with self:
                return func.redispatch(_C.DispatchKeySet(_C.DispatchKey.CPU), *args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::matmul", "aten::addmm", "aten::addmm_"):
            a, b = args[-2:]
            self.flops += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))

    def taken(self) -> float:
        """Since it was last asked."""
        flops, self.flops = self.flops, 0
        return flops / self.unit


@pytest.mark.parametrize(
    ("reduction", "trained", "expected"),
    [
        ("mean", (0, 1, 2), (1, 3, 7)),
        ("sum", (0, 1), (1, 3, 7)),
        ("sum", (0,), (1, 2, 3)),
        ("none", (0, 1), (1, 4, 7)),
        ("none", (0,), (1, 3, 3)),
    ],
)
def test_products(short_strips, reduction, trained, expected):
    """Of the value alone; of value and gradient; of the second derivatives in a direction."""
    inputs, target = problem()
    (n, width), vocabulary = inputs[0].shape, len(inputs[1])
    x = [p.requires_grad_(i in trained) for i, p in enumerate(inputs)]
    wanted = [x[i] for i in trained]
    with Products(n * width * vocabulary) as products:
        with torch.no_grad():
            linear_loss(x[0], x[1], target, x[2], reduction=reduction)
        found = [products.taken()]
        value = linear_loss(x[0], x[1], target, x[2], reduction=reduction).sum()
        first = torch.autograd.grad(value, wanted, create_graph=True)
        found.append(products.taken())
        torch.autograd.grad(first, wanted, [torch.ones_like(p) for p in wanted])
        found.append(products.taken())
    assert tuple(found) == expected


@pytest.mark.parametrize("name", ["mean", "sum", "z-loss"])
def test_the_loss_in_other_places(short_strips, name):
    """Scaled by what is differentiated, differentiated itself a second time, and a third."""
    inputs, target = problem()
    found = []
    for f in pair(target, ignore_index=7, **LINEAR_LOSSES[name]):
        x = [p.double().requires_grad_() for p in inputs]
        scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        loss = scale * f(*x).square()
        first = torch.autograd.grad(loss, [*x, scale], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first) + loss, [*x, scale], create_graph=True)
        found.append([*first, *second, *torch.autograd.grad(sum(g.square().sum() for g in second), [*x, scale])])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_tied_embeddings(short_strips):
    """The weight is read twice, and has one gradient."""
    (_, weight, _), target = problem()
    found = []
    for f in (linear_loss, plain_linear_loss):
        w = weight.double().requires_grad_()
        (gw,) = torch.autograd.grad(f(torch.tanh(w[target.roll(1)]), w, target), w, create_graph=True)
        found.append([gw, *torch.autograd.grad(gw.square().sum(), w)])
    torch.testing.assert_close(*found)


def test_gradcheck(short_strips):
    inputs, target = problem(n=18, width=3, vocabulary=5)
    target = target % 5
    x = [p.double().requires_grad_() for p in inputs]
    function = lambda h, w, b: linear_loss(h, w, target, b, z_loss=0.1, softcap=3.0, label_smoothing=0.1)
    assert torch.autograd.gradcheck(function, x) and torch.autograd.gradgradcheck(function, x)


def test_elsewhere_torchs_operators():
    (h, weight, bias), target = problem()
    expected = plain_linear_loss(h, weight, target, bias)
    torch.testing.assert_close(torch.func.grad(lambda h: linear_loss(h, weight, target, bias))(h).shape, h.shape)
    assert linear_loss(*(x.bfloat16() for x in (h, weight)), target).dtype is torch.bfloat16
    torch.testing.assert_close(torch.func.functional_call(torch.nn.Identity(), {}, expected), expected)


def test_large_logits_and_nothing_to_learn():
    h, weight = torch.tensor([[1e4, -1e4]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9999, 0.0]])
    target = torch.tensor([2])
    torch.testing.assert_close(linear_loss(h, weight, target), F.cross_entropy(h @ weight.t(), target))
    ignored = torch.tensor([-100])
    assert linear_loss(h, weight, ignored).isnan() and linear_loss(h, weight, ignored, reduction="sum") == 0
    loss = linear_loss(h.requires_grad_(), weight, ignored)
    assert loss.isnan() and torch.autograd.grad(loss, h)[0].count_nonzero() == 0  # as F.cross_entropy


def test_what_it_refuses():
    (h, weight, bias), target = problem()
    for options, words in (
        (dict(target=target[:-1]), "class indices"),
        (dict(weight=weight[:, :-1]), r"input \[..., 10\]"),
        (dict(bias=bias[:-1]), r"bias \[53\]"),
        (dict(reduction="avg"), "reduction"),
        (dict(label_smoothing=2.0), "label_smoothing"),
        (dict(softcap=0.0), "softcap"),
        (dict(z_loss=-1.0), "z_loss"),
    ):
        with pytest.raises(BadArgument, match=words):
            linear_loss(**{"input": h, "weight": weight, "target": target, "bias": bias} | options)
    for x in (h, h.double()):
        with pytest.raises(IndexError, match="Target 53 is out of bounds"):
            linear_loss(x, weight.to(x.dtype), target.clamp(min=53))


_PEAK = """
import torch
from mgd_kernels.functional import linear_cross_entropy
from peak import peak
n, d, V = 1024, 32, 50000
h, w = torch.randn(n, d, requires_grad=True), (torch.randn(V, d) / 6).requires_grad_()
target, before = torch.arange(n), peak()
first = torch.autograd.grad(linear_cross_entropy(h, w, target), [h, w], create_graph=True)
torch.autograd.grad(first, [h, w], [h.detach(), w.detach()])
print(peak() - before)
"""


@pytest.mark.long
def test_memory_of_a_language_model():
    """1,024 tokens of a vocabulary of 50,000, whose logits would take 205 MB at a time, 1.4 GB in all: three gradients
    of the weight take 19 MB, two strips 102 MB. In a process of its own, since a peak is one of a process."""
    assert 90 < growth(_PEAK) < 200
