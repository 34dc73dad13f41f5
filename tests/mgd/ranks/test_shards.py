"""Sums over microbatches in a fixed order, the ranges of ranks, and what tells batches apart."""

from __future__ import annotations

from itertools import pairwise

import cases
import pytest
import torch
from torch import nn

import mgd
from mgd.errors import BadArgument, BadBatch
from mgd.ranks.blocks import Blocks, places
from mgd.ranks.ranks import Ranks
from mgd.ranks.shards import RankShards, Shards
from mgd.step.batches import fingerprints, microbatches, slices
from mgd_kernels import Arena


def tree(count, ranks):
    """How `count` microbatches are added on so many ranks, as text."""
    whole: Blocks[str] = Blocks(lambda x, y: f"({x}{y})")
    each = count // ranks
    for rank in range(ranks):
        own: Blocks[str] = Blocks(lambda x, y: f"({x}{y})")
        mine = range(rank * each, (rank + 1) * each)
        for index in reversed(mine) if rank % 2 else mine:
            own.add(index, "abcdefghijkl"[index])
        assert [place for place, _ in own.items()] == places(mine)
        for (level, index), text in own.items():
            whole.add(index, text, level)
    return whole.total()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 8, 10, 12])
def test_the_order_of_sums_does_not_depend_on_ranks(count):
    alone = tree(count, 1)
    assert all(tree(count, ranks) == alone for ranks in range(1, count + 1) if count % ranks == 0)


def test_the_order_is_pairs_of_pairs():
    assert tree(4, 2) == "((ab)(cd))" and tree(6, 1) == "(((ab)(cd))(ef))"


class OneOf(Ranks):
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranges_cover_the_buffer_once(elementwise, size):
    arena = Arena.of(nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 40)))
    kind = Shards if size == 1 else RankShards
    shards = [kind(OneOf(rank, size), arena, 4, elementwise) for rank in range(size)]
    ranges = shards[0].ranges
    assert ranges[0][0] == 0 and ranges[-1][1] == arena.numel
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    assert [i for each in shards for i in each.own] == [0, 1, 2, 3]
    pieces = [(each.start + a, each.start + b) for each in shards for a, b, _ in each.pieces]
    assert pieces == [(a, b) for a, b, _ in Shards(Ranks(), arena, 4, elementwise).pieces]
    if elementwise:
        assert max(b - a for a, b in ranges) <= 1.05 * arena.numel / size
    else:
        assert all(a in (*arena.offsets, arena.numel) for a, _ in ranges)


def test_more_pieces_than_elements():
    arena = Arena({"x": torch.zeros(1)})
    shards = Shards(Ranks(), arena, 40, True)
    x = arena.zeros() + 1
    assert shards.dots([(x, x)]) == [float(arena.numel)]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_sums_over_pieces_are_those_of_the_whole(count):
    case = cases.mlp()
    arena = Arena.of(case)
    x = arena.flatten(case)
    shards = Shards(Ranks(), arena, count, True)
    assert shards.dots([(x, x)])[0] == pytest.approx(float(x.square().sum()), rel=1e-12)


def test_fingerprints_tell_examples_and_their_microbatch_apart():
    x = torch.arange(12.0).reshape(6, 2)
    known = fingerprints((x,), 3, 0)
    assert fingerprints((x.clone(),), 3, 0) == known
    assert fingerprints((x[[1, 0, 2, 3, 4, 5]],), 3, 0) == known  # within a microbatch order is free
    assert fingerprints((x[[2, 1, 0, 3, 4, 5]],), 3, 0)[:2] != known[:2]
    assert fingerprints((x.double(),), 3, 0) != known
    assert fingerprints((torch.tensor([[1.0, 1.0]] * 2),), 1, 0) != fingerprints(
        (torch.tensor([[2.0, 2.0]] * 2),), 1, 0
    )


class Part:
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def load(self, start, stop):
        return (self.x[start:stop],)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_batch_that_loads_parts_is_cut_as_a_tensor_is(count):
    x = torch.randn(7, 2)
    for (mine, share), (theirs, other) in zip(
        microbatches(Part(x), count, 0), microbatches((x,), count, 0), strict=True
    ):
        assert torch.equal(mine[0], theirs[0]) and share == other
    assert [b - a for a, b in slices(7, count)] == [len(part) for part in x.tensor_split(count)]


def test_a_batch_that_loads_something_else_is_refused():
    class Wrong(Part):
        def load(self, start, stop):
            return (self.x,)

    with pytest.raises(BadBatch, match=r"load\(0, 2\).* with 2 examples; got \[4\]"):
        microbatches(Wrong(torch.zeros(4, 1)), 2, 0)
    with pytest.raises(BadBatch, match="at least 8 examples"):
        microbatches(Part(torch.zeros(4, 1)), 8, 0)


def test_what_is_no_process_group_is_refused():
    with pytest.raises(BadArgument, match="initialised process group"):
        cases.supervised(cases.mlp(), (5,)).function(process_group="WORLD")


def test_a_group_that_is_not_there_yet_is_told(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(RuntimeWarning, match="torchrun started 2 processes, and each makes the whole training"):
        cases.supervised(cases.mlp(), (5,)).function(process_group=torch.distributed.group.WORLD)


def test_a_wrapped_model_is_refused():
    class FSDPModule:
        __module__ = "torch.distributed.fsdp._fully_shard._fully_shard"

    class Wrapped(FSDPModule, nn.Linear):
        pass

    with pytest.raises(BadArgument, match=r"is a FSDPModule.*bare module"):
        mgd.TrainingFunction(Wrapped(2, 2), None, [1], optimizer=None, objective=None)
