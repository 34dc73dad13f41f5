"""Projections onto the constraints give the nearest point."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mgd

entries = st.floats(-1e3, 1e3, allow_subnormal=False)
vectors = st.lists(entries, min_size=1, max_size=12).map(lambda x: torch.tensor(x, dtype=torch.float64))


@settings(deadline=None)
@given(vectors, st.floats(1e-3, 1e3))
def test_the_simplex_gives_the_nearest_point(x, total):
    """p is the nearest point of a convex set iff (x - p)·(y - p) <= 0 for all its points y; here, for its vertices."""
    p = mgd.Simplex(total).project(x)
    assert bool((p >= 0).all()) and float(p.sum()) == pytest.approx(total, rel=1e-9)
    tolerance = 1e-10 * (total + float(x.abs().max())) ** 2  # some 1e6 roundings of the products
    for vertex in total * torch.eye(len(x), dtype=torch.float64):
        assert float((x - p) @ (vertex - p)) <= tolerance
    torch.testing.assert_close(mgd.Simplex(total).project(p), p, rtol=1e-9, atol=1e-9 * total)


@settings(deadline=None)
@given(vectors, st.data())
def test_the_box_gives_the_nearest_point(x, data):
    """Entry by entry: x itself where it is inside, else the bound that it crossed."""
    bounds = data.draw(st.lists(st.tuples(entries, entries), min_size=len(x), max_size=len(x)))
    low, high = (torch.tensor([pick(pair) for pair in bounds], dtype=x.dtype) for pick in (min, max))
    p = mgd.Box(low, high).project(x)
    for value, below, above, found in zip(x.tolist(), low.tolist(), high.tolist(), p.tolist(), strict=True):
        assert found == (below if value < below else above if value > above else value)
    assert torch.equal(mgd.Box(low).project(x), torch.maximum(x, low))
    assert torch.equal(mgd.Box(None, high).project(x), torch.minimum(x, high))
    assert torch.equal(mgd.Box().project(x), x)


def test_projections_keep_shape_and_dtype_and_bear_large_entries():
    x = torch.tensor([[1e20, -1e20], [1e20, 0.0]])
    p = mgd.Simplex(1.0).project(x)
    assert p.dtype == torch.float32 and torch.equal(p, torch.tensor([[0.5, 0.0], [0.5, 0.0]]))
    assert mgd.Box(0.0, torch.tensor([1.0, 2.0])).project(x).tolist() == [[1.0, 0.0], [1.0, 0.0]]
