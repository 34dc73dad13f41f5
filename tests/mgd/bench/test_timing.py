"""How the benchmarks take times: in alternation, on one core."""

from __future__ import annotations

import os

import pytest
import torch

from mgd.bench import timing
from mgd.errors import BadArgument


def test_ratios_are_to_the_trainings_just_before_and_after(monkeypatch):
    seconds = iter([1.0, 6.0, 2.0, 9.0, 1.0, 8.0, 3.0, 2.0, 1.0])  # training, a, training, b, training; b, ...
    called = []
    monkeypatch.setattr(timing, "seconds_of", lambda work, *rest: called.append(work()) or next(seconds))
    trainings, found = timing.alternate(2, lambda: "train", {"a": lambda: "a", "b": lambda: "b"})
    assert called == ["train", "a", "train", "b", "train", "b", "train", "a", "train"]
    assert found["a"].ratios == [4.0, 1.0] and found["b"].ratios == [6.0, 4.0]
    assert trainings == [1.0, 2.0, 1.0, 3.0, 1.0]
    assert timing.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx({"median": 3.5, "q20": 2.0, "q80": 5.0})


def test_pinning_ends_with_the_block():
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with timing.pinned(-1) as done:
        assert os.sched_getaffinity(0) == {max(before)} and done == {"threads": 1, "core": max(before)}
    assert os.sched_getaffinity(0) == before and torch.get_num_threads() == threads
    with pytest.raises(BadArgument, match="a core among"), timing.pinned(9999):
        pass
    assert os.sched_getaffinity(0) == before
