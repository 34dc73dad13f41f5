"""Residuals in slabs: the same tensors, each byte once, and nothing left behind."""

import gc
import weakref

import pytest
import torch
from same_bits import cases, same

import mgd
from mgd.autodiff.joint import JointGraph
from mgd.sweep.residuals import ResidualCache
from mgd.sweep.slabs import Layout, Slab, Slabs


class Part:
    """Residuals of a microbatch."""

    metaparameters = None

    def __init__(self, tensors, given=(), held=0):
        self.tensors, self.given, self.held = list(tensors), list(given), held


@pytest.fixture
def slabs(monkeypatch):
    """Weak references to all slabs' memory."""
    made = []
    plain = Slab.__init__

    def init(self, size):
        plain(self, size)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Slab, "__init__", init)
    return made


def moved(*tensors):
    layout = Layout(tensors)
    slabs = Slabs()
    return layout, layout.copied(slabs.hold(layout.pieces, 1 << 20))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 4).t(),
        torch.randn(3, 1).expand(3, 5),
        torch.randn(8, 10)[1:7:2, 3:9:5],
        torch.arange(9, dtype=torch.int8)[5:],
        torch.empty(0, 3),
        torch.randn(3, dtype=torch.complex128),
    ],
    ids=["channels last", "transposed", "expanded", "gaps", "bytes", "empty", "complex"],
)
def test_a_copy_has_values_strides_and_place_in_a_cache_line(x):
    _, (_, copy) = moved(torch.ones(3, dtype=torch.int8), x)
    assert torch.equal(copy, x)
    assert (copy.shape, copy.stride(), copy.dtype) == (x.shape, x.stride(), x.dtype)
    if x.numel():
        assert copy.data_ptr() != x.data_ptr() and (copy.data_ptr() - x.data_ptr()) % 64 == 0


def test_shared_memory_is_copied_once_and_of_a_larger_one_its_own_bytes():
    x = torch.randn(1000, 64)
    a, b = x[10:20], x[15:30].t()
    layout, (a_copy, b_copy) = moved(a, b)
    assert layout.pieces == [20 * 64 * 4]
    assert b_copy.data_ptr() - a_copy.data_ptr() == b.data_ptr() - a.data_ptr()
    assert torch.equal(a_copy, a) and torch.equal(b_copy, b)


def test_what_is_more_than_bytes_stays_where_it_is():
    x = torch.randn(3, dtype=torch.complex64).conj()
    layout, (same, number) = moved(x, 7)
    assert same is x and number == 7 and layout.apart == [x]


def test_no_more_than_the_room_is_held_and_all_is_given_back():
    cache = ResidualCache(10_000)
    for t in range(4):
        cache.put(t, [Part([torch.full((750,), float(t))])])
    assert cache.take(3) is None
    for t in (2, 1, 0):
        (part,) = cache.take(t)
        assert part.tensors[0].eq(t).all()
    assert cache.kept == cache._beside == cache._slabs.size == 0
    assert cache.peak <= cache.room


def test_where_there_is_ample_room_nothing_is_copied(slabs):
    cache = ResidualCache(20_000, steps=3)
    x = [torch.full((800,), float(t)) for t in range(4)]
    for t in range(3):
        cache.put(t, [Part([x[t], x[t][:10]], [x[3]])])
    assert cache.peak == 4 * 3200 and not slabs
    for t in range(3):
        assert cache.take(t)[0].tensors[0] is x[t]
    assert cache._beside == 0


def test_inputs_count_once():
    shared = torch.randn(1000)
    cache = ResidualCache(7_000)
    for t in range(9):
        cache.put(t, [Part([torch.ones(100)], [shared])])
    assert cache.peak <= 7_000 and sum(cache.take(t) is not None for t in range(9)) == 6
    anew = ResidualCache(7_000)
    for t in range(9):
        anew.put(t, [Part([torch.ones(100)], [torch.randn(1000)])])
    assert sum(anew.take(t) is not None for t in range(9)) == 1


@pytest.fixture
def little_room(monkeypatch):
    monkeypatch.setattr(mgd.sweep.residuals, "FRAGMENTED", 1e9)


def test_a_step_without_room_holds_no_residuals_and_has_the_same_bits(monkeypatch):
    case, held = cases()["mlp"], []
    whole = case.metagradient(trace=True)
    forward = JointGraph.forward

    def noting(self, parameters, inputs, room=None, compared=True):
        found = forward(self, parameters, inputs, room, compared)
        held.append((room, self.residual_bytes, found[4] is not None))
        return found

    monkeypatch.setattr(JointGraph, "forward", noting)
    monkeypatch.setattr(mgd.sweep.storage, "residual_cache", lambda plan: ResidualCache(1000, plan.T))
    function = case.function(trace=True)
    assert same(function.metagradient(case.z), whole)
    steps = [(size, kept) for room, size, kept in held if room]  # not where a gradient is confirmed
    assert len(steps) == 2 * len(function) and all(size > 1000 // 2 and not kept for size, kept in steps)
    assert function._residuals == sum(size for size, _ in steps[:2])  # for the next plan


def test_slabs_go_with_the_call(slabs, little_room):
    case = cases()["mlp"]
    case.metagradient(trace=True)
    gc.collect()
    assert slabs and not any(ref() for ref in slabs)


def test_slabs_go_with_an_error(slabs, little_room):
    case = cases()["mlp"]

    def objective(model):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as error:
        case.but(objective=objective).metagradient(trace=True)
    assert slabs and not any(ref() for ref in slabs), error  # whose traceback holds the sweep


def test_what_cannot_be_copied_counts_twice():
    cache = ResidualCache(1000, 3)
    cache.put(0, [Part([], held=200)])
    assert cache.left == 600 and cache.step_bytes == 400 and cache.peak == 400
    cache.put(1, [Part([torch.zeros(10)], held=200)])
    cache.put(2, [Part([], held=200)])  # for which there is no room
    assert cache.left < 200 and cache.take(2) is None
    assert cache.take(1)[0].held == cache.take(0)[0].held == 200
    assert cache.left == 1000
