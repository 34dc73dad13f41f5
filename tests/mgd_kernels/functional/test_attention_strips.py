"""Attention by strips of queries: every option, in both dtypes, threads, large common parts, memory."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from operator_cases import EPS
from peak import growth
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from mgd_kernels import functional
from mgd_kernels.functional import attention as whole
from mgd_kernels.functional import attention_strips as strips
from mgd_kernels.functional.attention_strips import attention, plain_attention

SHAPES = [(37, 53), (53, 37), (40, 40)]
MASKS = ["none", "boolean", "padding", "added", "for each head", "for each key", "triangle"]


@pytest.fixture(autouse=True)
def short_strips(monkeypatch):
    """Several strips, of which the last is short, for matrices of any size."""
    monkeypatch.setattr(strips, "_ROWS", 16)
    monkeypatch.setattr(whole, "LARGE", 0)


def problem(queries, keys, mask="none", group=1, common=0.0):
    """q, k, v, and the mask if there is one. The boolean ones leave queries that see nothing."""
    g = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    heads = 2 * group
    q, k, v = random(2, heads, queries, 8), random(2, 2, keys, 8) + common, random(2, 2, keys, 5)
    masks = {
        "boolean": lambda: (torch.rand(2, 1, queries, keys, generator=g) > 0.3).index_fill(2, torch.tensor(3), False),
        "padding": lambda: (torch.rand(2, 1, 1, keys, generator=g) > 0.3).index_fill(0, torch.tensor(1), False),
        "added": lambda: random(2, heads, queries, keys),
        "for each head": lambda: random(1, heads, queries, keys),
        "triangle": lambda: torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(-2),
        "for each key": lambda: random(1, 1, 1, keys).index_fill(3, torch.tensor(2), -torch.inf),
    }
    return [q, k, v] if mask == "none" else [q, k, v, masks[mask]()]


def derivatives(function, inputs: list[Tensor], dtype) -> list[Tensor]:
    inputs = [x.to(dtype).detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    g = torch.Generator().manual_seed(1)
    random = lambda x: torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype)
    smooth = [x for x in inputs if x.requires_grad]
    o = function(*inputs)
    cotangent = random(o).requires_grad_()
    first = torch.autograd.grad(o, smooth, cotangent, create_graph=True)
    second = torch.autograd.grad(first, [cotangent, *smooth], [random(x) for x in first])
    return [x.detach() for x in (o, *first, *second)]


def pair(offset, dropout=0.0):
    seed = torch.tensor(1 << 61 | 7) if dropout else None
    functions = attention, plain_attention
    return [lambda q, k, v, m=None, f=f: f(q, k, v, m, 0.4, offset, seed, dropout) for f in functions]


def error(found, exact) -> float:
    return max(float((x - y).abs().max() / (1 + y.abs().max())) for x, y in zip(found, exact, strict=True) if x.numel())


@pytest.mark.parametrize(("shape", "group"), [*product(SHAPES, [3]), (SHAPES[0], 1)])
@pytest.mark.parametrize("mask", MASKS)
def test_every_option(shape, mask, group):
    for offset in (None, 0, shape[1] - shape[0]):
        inputs = problem(*shape, mask, group)
        mine, plain = pair(offset)
        assert error(derivatives(mine, inputs, torch.float64), derivatives(plain, inputs, torch.float64)) < 1e-12
        rounded = [x.float() if x.is_floating_point() else x for x in inputs]
        exact = derivatives(plain, rounded, torch.float64)
        allowed = error(derivatives(plain, rounded, torch.float32), exact)
        assert error(derivatives(mine, rounded, torch.float32), exact) <= max(2 * allowed, 8 * EPS)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("offset", [None, 0, -13])
def test_dropout(mask, offset):
    inputs = problem(53, 40, mask, 3)
    mine, plain = pair(offset, 0.3)
    assert error(derivatives(mine, inputs, torch.float64), derivatives(plain, inputs, torch.float64)) < 1e-12
    rounded = [x.float() if x.is_floating_point() else x for x in inputs]
    exact = derivatives(plain, rounded, torch.float64)
    allowed = error(derivatives(plain, rounded, torch.float32), exact)
    assert error(derivatives(mine, rounded, torch.float32), exact) <= max(2 * allowed, 8 * EPS)


def test_dropout_drops_its_share_of_every_matrix_anew_and_keeps_the_mean():
    q, k = torch.zeros(2, 4, 300, 8), torch.zeros(2, 4, 300, 8)
    v = torch.eye(300).expand(2, 4, 300, 300).contiguous()
    torch.manual_seed(0)
    first, second = (300 * functional.scaled_dot_product_attention(q, k, v, dropout_p=0.2) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(first, 300 * functional.scaled_dot_product_attention(q, k, v, dropout_p=0.2))
    torch.testing.assert_close(first.unique(), torch.tensor([0.0, 1.25]))
    assert float(first.mean(-1).sub(1).abs().max()) < 6 * 0.5 / 300**0.5
    matrices = torch.cat([x.flatten(0, 1) for x in (first, second)]) > 0
    matrices = torch.cat(matrices[:, :288].unflatten(1, (18, 16)).flatten(0, 1).unsqueeze(0).unbind())
    share = (matrices.sum((1, 2)) / matrices[0].numel()).double()
    assert float((share - 0.8).abs().max()) < 6 * 0.4 / matrices[0].numel() ** 0.5
    flat = matrices.flatten(1).float() - 0.8  # of strips: no two drop alike
    correlation = (flat @ flat.T / flat.shape[1] / 0.16).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / flat.shape[1] ** 0.5


def test_keys_with_a_common_part():
    """30 standard deviations: two digits of the second derivative would go to rounding."""
    inputs = [x.float() for x in problem(64, 200, common=30.0)]
    mine, plain = pair(None)
    exact = derivatives(plain, inputs, torch.float64)
    assert error(derivatives(mine, inputs, torch.float32), exact) < 1e-6
    assert error(derivatives(plain, inputs, torch.float32), exact) > 5e-6


def test_keys_that_no_query_sees_may_hold_anything():
    q, k, v, mask = problem(20, 30, "padding")
    mask = torch.arange(30).expand(2, 1, 1, 30) < 21
    filled = k.index_fill(2, torch.arange(21, 30), 1e20)
    mine, plain = pair(None)
    exact = derivatives(plain, [q, k, v, mask], torch.float64)
    found = derivatives(mine, [q, filled, v, mask], torch.float32)
    assert error(found[:2], exact[:2]) < 1e-6 and all(x.isfinite().all() for x in found)


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.0), (torch.float32, 0.3), (torch.float64, 0.0)])
@pytest.mark.parametrize("mask", MASKS)
def test_bits_do_not_depend_on_threads(mask, dtype, dropout):
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(derivatives(pair(None, dropout)[0], problem(77, 101, mask, 3), dtype))
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


@pytest.mark.parametrize("absent", ["q", "k", "v"])
def test_absent_cotangents(absent):
    """As in a layer of which one projection is frozen."""
    inputs, found = problem(37, 53), []
    for function in pair(0):
        x = [p.clone().requires_grad_(name != absent) for name, p in zip("qkv", inputs, strict=True)]
        wanted = [p for p in x if p.requires_grad]
        first = torch.autograd.grad(function(*x).square().sum(), wanted, create_graph=True)
        found.append(torch.autograd.grad(first[0].square().sum(), wanted))
    assert error(*found) < 1e-12


def test_gradcheck():
    inputs = [x[:1, :, :, :2].clone() for x in problem(2, 3, group=2)]
    for mask in (None, torch.zeros(1, 1, 2, 3, dtype=torch.float64)):
        x = [p.requires_grad_() for p in (*inputs, *([] if mask is None else [mask]))]
        for dropout in (0.0, 0.3):
            function = pair(0, dropout)[0]
            assert torch.autograd.gradcheck(function, x) and torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mask", ["none", "boolean", "added"])
def test_third_derivatives(mask, dropout):
    found, inputs = [], problem(17, 21, mask, 2)
    for function in pair(0, dropout):
        x = [p.clone().requires_grad_() if p.is_floating_point() else p for p in inputs]
        smooth = [p for p in x if p.requires_grad]
        first = torch.autograd.grad(function(*x).square().sum(), smooth, create_graph=True)
        second = torch.autograd.grad(sum(p.square().sum() for p in first), smooth, create_graph=True)
        found.append(torch.autograd.grad(sum(p.square().sum() for p in second), smooth))
    assert error(*found) < 1e-10


def torchs_and_ours(*args, **options):
    outputs = [f(*args, **options) for f in (functional.scaled_dot_product_attention, F.scaled_dot_product_attention)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    return outputs[0]


def test_it_is_called_as_torchs(monkeypatch):
    called = []
    monkeypatch.setattr(whole, "attention", lambda *args: called.append(args) or attention(*args))
    q, k, v = problem(20, 30)
    grouped, *_ = problem(20, 30, group=3)
    boolean, added = torch.rand(20, 30) > 0.3, torch.randn(2, 1, 20, 30, dtype=torch.float64)
    torchs_and_ours(q, k, v, is_causal=True)
    torchs_and_ours(q, k, v, boolean, scale=0.3)
    torchs_and_ours(q, k, v, added)
    torchs_and_ours(grouped, k, v, is_causal=True, enable_gqa=True)
    torchs_and_ours(q[0], k[0], v[0], boolean)
    for bias in (causal_lower_right(20, 30), causal_upper_left(20, 30)):
        torchs_and_ours(q, k, v, bias)
    assert len(called) == 7


def test_what_it_leaves_to_torch(monkeypatch):
    monkeypatch.setattr(whole, "attention", lambda *_: pytest.fail("by strips"))
    q, k, v = problem(20, 30)
    assert not functional.scaled_dot_product_attention(q, k, v, dropout_p=1.0).any()
    with pytest.raises(RuntimeError, match="dropout"):
        functional.scaled_dot_product_attention(q, k, v, dropout_p=1.5)
    torchs_and_ours(q.expand(3, *q.shape), k.expand(3, *k.shape), v.expand(3, *v.shape))
    for fine in (q.half(), k.half(), v.half()), (q, k[:1], v[:1]):
        assert functional.scaled_dot_product_attention(*fine).shape[2:] == (20, 5)
    grouped, *_ = problem(20, 30, group=3)
    with pytest.raises(RuntimeError):
        functional.scaled_dot_product_attention(grouped, k, v)
    monkeypatch.setattr(whole, "LARGE", 601)
    torchs_and_ours(q, k, v)


_PEAK = """
import sys, torch
from torch import nn
from peak import peak
from mgd_kernels.functional import scaled_dot_product_attention as attention
length = int(sys.argv[1])
torch.manual_seed(0)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        q = self.q(x).view(1, -1, 4, 16).transpose(1, 2)
        k, v = self.kv(x).view(1, -1, 2, 2, 16).permute(2, 0, 3, 1, 4)
        o = attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.out(o.transpose(1, 2).flatten(2))

model = nn.Sequential(Block(), Block())
parameters, x = list(model.parameters()), torch.randn(1, length, 64)
before = peak()
gradient = torch.autograd.grad(model(x).square().mean(), parameters, create_graph=True)
second = torch.autograd.grad(gradient, parameters, [torch.randn_like(p) for p in parameters])
assert all(p.isfinite().all() for p in second)
print(peak() - before)
"""


@pytest.mark.long
@pytest.mark.parametrize(("length", "megabytes"), [(4096, 300), pytest.param(16384, 1000, marks=pytest.mark.slow)])
def test_memory_of_long_sequences(length, megabytes):
    """Second derivatives of a two-layer model, whose matrices would take 1.9 GB, and 31 GB. In a process of its own,
    since a peak is one of a process."""
    assert 10 < growth(_PEAK, str(length)) < megabytes
