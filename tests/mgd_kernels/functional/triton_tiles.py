"""Attention by tiles against torch in float64; `test_triton_operators.py` runs this file.

On a GPU where there is one, else in Triton's interpreter, as `triton_operators.py`.
"""

from __future__ import annotations

import pytest
import quick_interpreter  # noqa: F401
import torch
import torch.nn.functional as F
from operator_cases import EPS
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from mgd_kernels import functional
from mgd_kernels.backends import triton_attention
from mgd_kernels.errors import BadArgument
from mgd_kernels.functional import _library
from mgd_kernels.functional import attention as whole
from mgd_kernels.functional.attention_tiles import (
    plain_tiled_attention,
    tiled_attention,
    tiled_attention_backward,
    tiled_attention_double_backward,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SEED = torch.tensor(1 << 61 | 7, device=DEVICE)


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    if not GPU:
        monkeypatch.setattr(_library, "on_gpu", lambda x: True)


def problem(queries, keys, width=9, depth=5, mask=None, group=1, common=0.0) -> list[Tensor]:
    """q, k, v in float32, and the mask if there is one: of numbers, or boolean, with queries that see nothing."""
    g = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=g)
    inputs = [random(1, group, queries, width), random(1, 1, keys, width) + common, random(1, 1, keys, depth)]
    if mask == "boolean":
        inputs.append((torch.rand(1, 1, queries, keys, generator=g) > 0.3).index_fill(2, torch.tensor(3), False))
    elif mask == "padding":
        inputs.append(torch.rand(1, 1, 1, keys, generator=g) > 0.3)
    elif mask == "hidden":
        inputs.append(torch.zeros(1, 1, 1, keys, dtype=torch.bool))
    elif mask == "added":
        inputs.append(random(1, group, queries, keys))
    elif mask == "for each key":
        inputs.append(random(1, 1, 1, keys).index_fill(3, torch.tensor(2), -torch.inf))
    return [x.to(DEVICE) for x in inputs]


def pair(offset=None, dropout=0.0):
    options = 0.4, offset, SEED if dropout else None, dropout
    mine = lambda q, k, v, m=None: tiled_attention(q, k, v, m, *options)[0]
    return mine, lambda q, k, v, m=None: plain_tiled_attention(q, k, v, m, *options)


def derivatives(function, inputs: list[Tensor], dtype=torch.float32, absent="") -> list[Tensor]:
    """Of all inputs of numbers but `absent`, which are frozen, as a layer's projections are."""
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    inputs = [
        x.detach().requires_grad_(x.is_floating_point() and name not in absent)
        for x, name in zip(inputs, "qkvm", strict=False)
    ]
    g = torch.Generator().manual_seed(1)
    random = lambda x: torch.randn(x.shape, generator=g).to(x)
    wanted = [x for x in inputs if x.requires_grad]
    o = function(*inputs)
    cotangent = random(o).requires_grad_()
    first = torch.autograd.grad(o, wanted, cotangent, create_graph=True)
    second = torch.autograd.grad(first, [cotangent, *wanted], [random(x) for x in first], allow_unused=True)
    return [torch.zeros(()) if x is None else x.detach() for x in (o, *first, *second)]


def error(found, exact) -> float:
    return max(float((x - y).abs().max() / (1 + y.abs().max())) for x, y in zip(found, exact, strict=True))


def check(inputs, absent="", **options) -> list[Tensor]:
    """At most twice the error of torch's own float32, or 8 roundings. Returns what was found."""
    mine, plain = pair(**options)
    found = derivatives(mine, inputs, absent=absent)
    exact = derivatives(plain, inputs, torch.float64, absent)
    allowed = error(derivatives(plain, inputs, absent=absent), exact)
    assert error(found, exact) <= max(2 * allowed, 8 * EPS)
    return found


SHIPPED = {
    (block, *(kernels[name][block] for name in triton_attention.KERNELS)): arch
    for arch, kernels in triton_attention.TILES.items()
    for block in triton_attention.BLOCKS
}


@pytest.mark.parametrize("tiles", SHIPPED, ids=lambda x: f"{SHIPPED[x]}-{x[0]}")
def test_every_tile_that_is_shipped(tiles, monkeypatch):
    """Queries and keys that are no multiple of a tile, several tiles of both, an edge across them."""
    if not GPU:
        monkeypatch.setattr(triton_attention, "_family", lambda device: SHIPPED[tiles])
    check(problem(66, 66, tiles[0] - 3, tiles[0] // 2 + 1, "added"), offset=0)


@pytest.mark.parametrize(
    ("mask", "offset", "dropout"),
    [
        (None, None, 0),
        (None, -9, 0),
        ("boolean", None, 0),
        ("padding", 2, 0),
        ("hidden", None, 0),
        ("added", 0, 0),
        ("for each key", None, 0),
        (None, None, 0.3),  # the plain function draws in tiles of another shape
        ("boolean", 0, 0.3),
    ],
)
def test_every_option(mask, offset, dropout):
    check(problem(21, 18, mask=mask, group=2), offset=offset, dropout=dropout)


def test_dropout_drops_its_share_of_every_matrix_anew():
    like = torch.empty(2, 1, 64, 60, device=DEVICE)
    kept, other = (triton_attention.factors(like, SEED + i, 0.2).flatten(0, 1).flatten(1) for i in range(2))
    torch.testing.assert_close(kept.unique().cpu(), torch.tensor([0.0, 1.25]))
    matrices = torch.cat([kept, other, kept.view(2, 64, 60).mT.flatten(1)]) / 1.25 - 0.8
    assert float(matrices.mean(1).abs().max()) < 6 * 0.4 / 3840**0.5
    correlation = (matrices @ matrices.T / 3840 / 0.16).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / 3840**0.5
    rows = kept.view(2, 64, 60)[0] / 1.25 - 0.8
    for x in (rows, rows.T):  # of one matrix: no two rows and no two columns drop alike
        assert float((x @ x.T / x.shape[1] / 0.16).fill_diagonal_(0).abs().max()) < 6 / x.shape[1] ** 0.5


@pytest.mark.parametrize("absent", ["q", "k", "v", "qkv", "m"])
def test_absent_cotangents(absent):
    check(problem(21, 18, mask="added"), absent)


@pytest.fixture
def broadcast(monkeypatch):
    """q, k, v of two examples and two heads, and a mask of a shape; tiles of 16, so that loops over tiles are seen."""
    monkeypatch.setitem(triton_attention.TILES["sm_90"], "mask_gradient", {32: triton_attention.Tile(16, 16, 4)})
    g = torch.Generator().manual_seed(2)
    shapes = (2, 2, 20, 5), (2, 1, 17, 5), (2, 1, 17, 6)
    return lambda *shape: [torch.randn(s, generator=g).to(DEVICE) for s in (*shapes, shape)]


@pytest.mark.parametrize("shape", [(2, 2, 20, 17), (1, 2, 20, 17), (2, 1, 1, 17), (1, 1, 20, 17)])
def test_the_gradient_of_a_mask_is_summed_over_what_it_is_broadcast_to(shape, broadcast):
    found = check(broadcast(*shape))
    assert found[4].shape == found[9].shape == shape


def test_a_mask_of_one_column_changes_nothing(broadcast):
    """Its derivatives are 0, here sums of 34 numbers that are rounded each."""
    inputs = broadcast(2, 1, 20, 1)
    mine, plain = pair()
    found = derivatives(mine, inputs)
    assert error(found, derivatives(plain, inputs, torch.float64)) < 32 * EPS
    assert max(float(found[i].abs().max()) for i in (4, 9)) < 32 * EPS


def test_a_mask_that_is_laid_out_otherwise():
    q, k, v, mask = problem(21, 18, mask="added", group=2)
    crosswise = mask.mT.contiguous().mT
    found, expected = (derivatives(pair()[0], [q, k, v, m]) for m in (crosswise, mask))
    assert all(map(torch.equal, found, expected))


def test_a_row_that_sees_nothing_is_zero_and_leaves_its_queries_without_a_gradient():
    o, dq, *_, gg, cotangent_q, _, _ = check(problem(21, 18, mask="boolean"))
    for x in (o, dq, gg, cotangent_q):
        assert not x[:, :, 3].any() and x.any()


def test_keys_and_values_that_no_query_sees_may_hold_anything():
    q, k, v, _ = problem(20, 30, mask="padding")
    mask = (torch.arange(30, device=DEVICE) < 21).expand(1, 1, 1, 30)
    hidden = torch.arange(21, 30, device=DEVICE)
    found = derivatives(pair()[0], [q, k.index_fill(2, hidden, torch.nan), v.index_fill(2, hidden, 1e20), mask])
    expected = derivatives(pair()[0], [q, k, v.index_fill(2, hidden, 0), mask])
    assert all(map(torch.equal, found, expected)) and all(x.isfinite().all() for x in found)


def test_keys_with_a_common_part():
    """30 standard deviations: two digits of the second derivative would go to rounding."""
    inputs = problem(40, 60, common=30.0)
    mine, plain = pair()
    exact = derivatives(plain, inputs, torch.float64)
    assert error(derivatives(mine, inputs), exact) < 1e-6 < 4e-6 < error(derivatives(plain, inputs), exact)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of what is looked for
def test_not_a_number_comes_through():
    q, k, v = problem(5, 6)
    q[0, 0, 2, 0] = torch.nan
    o = pair()[0](q, k, v)
    assert o[0, 0, 2].isnan().all() and o.isnan().sum() == o.shape[3]


def test_the_same_bits_twice():
    inputs = problem(21, 18, mask="added", group=2)
    found = [derivatives(pair(0, 0.3)[0], inputs) for _ in range(2)]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype):
    """Half a unit of what is largest, of values; of derivatives, whose o was rounded before, a few."""
    inputs = [x.to(dtype) for x in problem(21, 18, mask="added", group=2)]
    mine, plain = pair(0)
    found = derivatives(mine, inputs, dtype)
    g = [x.double() for x in derivatives(plain, [x.double() for x in inputs], torch.float64)]
    eps = torch.finfo(dtype).eps
    assert all(x.dtype is dtype for x in found)
    assert error(found[:1], g[:1]) < 0.6 * eps and error(found[1:], g[1:]) < 4 * eps


def test_third_derivatives():
    found, inputs = [], problem(7, 6, mask="added")
    for function, dtype in zip(pair(0, 0.3), (torch.float32, torch.float64), strict=True):
        x = [p.to(dtype).requires_grad_() for p in inputs]
        first = torch.autograd.grad(function(*x).square().sum(), x, create_graph=True)
        second = torch.autograd.grad(sum(p.square().sum() for p in first), x, create_graph=True)
        found.append(torch.autograd.grad(sum(p.square().sum() for p in second), x))
    assert error(*found) < 2e-5


# --- What is called ----------------------------------------------------------------------------------------------


def test_it_is_called_as_torchs(monkeypatch):
    called = []
    monkeypatch.setattr(whole, "tiled_attention", lambda *args: called.append(args) or tiled_attention(*args))
    q, k, v, boolean = problem(10, 12, mask="boolean")
    grouped, *_ = problem(10, 12, group=2)
    for arguments, options in (
        ((q, k, v), {"is_causal": True}),
        ((q, k, v, boolean), {"scale": 0.3}),
        ((grouped, k, v), {"enable_gqa": True}),
        ((q[0], k[0], v[0], boolean[0, 0]), {}),
        ((q, k, v, torch.rand(10, 12, device=DEVICE, requires_grad=True)), {}),
        ((q, k, v, causal_lower_right(10, 12)), {}),
        ((q.bfloat16(), k.bfloat16(), v.bfloat16()), {}),
    ):
        pair = functional.scaled_dot_product_attention, F.scaled_dot_product_attention
        ours, torchs = (f(*arguments, **options) for f in pair)
        torch.testing.assert_close(
            ours, torchs, **({} if ours.dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6})
        )
    torch.manual_seed(0)
    functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert len(called) == 8 and called[-1][6] is not None


def test_what_is_left_to_others(monkeypatch):
    monkeypatch.setattr(whole, "tiled_attention", lambda *_: pytest.fail("by tiles"))
    q, k, v = problem(10, 12)
    wide = [torch.cat([x] * 15, -1) for x in (q, k)]  # 135 elements
    for arguments in ((*wide, v), (q.double(), k.double(), v.double())):
        torch.testing.assert_close(
            functional.scaled_dot_product_attention(*arguments), F.scaled_dot_product_attention(*arguments)
        )
    with torch.autocast(DEVICE, torch.bfloat16):
        assert functional.scaled_dot_product_attention(q, k, v).dtype is torch.bfloat16


def test_operators_check_what_they_are_given(monkeypatch):
    q, k, v, mask = problem(10, 12, mask="boolean")
    with pytest.raises(BadArgument, match=r"\[1, 1, 11, 9\]"):
        tiled_attention(q, k[:, :, 1:], v, None, 1.0, None, None, 0.0)
    with pytest.raises(BadArgument, match="float64"):
        tiled_attention(q, k, v.double(), None, 1.0, None, None, 0.0)
    with pytest.raises(BadArgument, match="mask"):
        tiled_attention(q, k, v, mask[0], 1.0, None, None, 0.0)
    o, statistics = tiled_attention(q, k, v, mask, 1.0, None, None, 0.0)
    with pytest.raises(BadArgument, match="no mask that has a gradient"):
        tiled_attention_backward(o, q, k, v, mask, True, o, statistics, 1.0, None, None, 0.0)
    added, one = torch.zeros(1, 1, 10, 12, device=DEVICE), torch.zeros(1, 1, 1, 12, device=DEVICE)
    given = None, None, None, one, o, q, k, v, added, False, o, statistics
    with pytest.raises(BadArgument, match=r"\[1, 1, 10, 12\]; got \[1, 1, 1, 12\]"):
        tiled_attention_double_backward(*given, 1.0, None, None, 0.0)
    monkeypatch.setattr(_library, "on_gpu", lambda x: False)
    with pytest.raises(BadArgument, match="GPU"):
        tiled_attention(q, k, v, None, 1.0, None, None, 0.0)


def test_opcheck():
    r = lambda *shape: torch.randn(*shape, device=DEVICE, requires_grad=True)
    inputs = r(1, 2, 6, 3), r(1, 1, 5, 3), r(1, 1, 5, 2), r(1, 2, 1, 5)
    ops, options = torch.ops.mgd_kernels, (0.5, 0, None, 0.0)
    o, statistics = (x.detach() for x in ops.tiled_attention(*inputs, *options))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, arguments in (
        (ops.tiled_attention, (*inputs, *options)),
        (ops.tiled_attention_backward, (r(1, 2, 6, 2), *inputs, True, o, statistics, *options)),
        (ops.tiled_attention_backward, (r(1, 2, 6, 2), *inputs, False, o, statistics, *options)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=utilities)
