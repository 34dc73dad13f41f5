"""Whenever the process of a resumable metagradient dies, the same call afterwards gives the right number."""

from __future__ import annotations

import random
import shutil
import signal

import pytest

QUICK = 8  # moments


def right(answer: dict) -> bool:
    return answer["outcome"] == "right"


@pytest.mark.parametrize("schedule", ["auto", "revolve"])
def test_killed_before_each_call_that_changes_the_disk(tmp_path, victim, full, schedule):
    """From the first directory that is made to the last file of the finished run that is removed."""
    whole = victim.run(tmp_path / "whole", schedule=schedule)
    assert right(whole) and whole["changes"] > 100
    moments = list(range(1, whole["changes"] + 1))
    if not full:  # from all over the run, and more of its end
        moments = sorted({*random.Random(schedule).sample(moments, QUICK // 2), *moments[-QUICK // 2 :: 2]})
    died = 0
    for n in moments:
        directory = tmp_path / str(n)
        died += victim.run(directory, schedule=schedule, kill=n)["signal"] == signal.SIGKILL
        if full:  # and once more where it continues
            victim.run(directory, schedule=schedule, kill=random.Random(n).randrange(1, 60))
        assert right(answer := victim.run(directory, schedule=schedule)), (n, answer)
        assert sorted(p.name for p in directory.iterdir()) == ["LOCK", "MGD_STORE"], n
        shutil.rmtree(directory)
    assert died >= 0.9 * len(moments), "threads shift the last calls by a few; most must have been met"


def test_killed_again_and_again(tmp_path, victim, full):
    rng = random.Random(0)
    for i in range(40 if full else 2):
        kills = 0
        while not right(answer := victim.run(tmp_path / str(i), kill=rng.randrange(1, 150))):
            assert answer["signal"] == signal.SIGKILL, answer
            kills += 1
        assert kills > 0 or full


def test_a_power_failure_finds_what_the_next_call_needs(tmp_path, victim):
    """Data is on the medium before it gets its name; names are, before a checkpoint refers to them, and the checkpoint
    or the cleared marker is, before anything older is removed."""
    answer = victim.run(tmp_path / "run", fault=["recorded", 1, 1 << 40])
    assert right(answer)
    unwritten, unnamed, removed = set(), set(), 0
    for call, *names in map(str.split, answer["record"]):
        if call in ("create", "write", "reserve"):
            unwritten.add(names[0])
        elif call == "sync":
            unwritten.discard(names[0])
            if names[0] == "run":
                unnamed.clear()
        elif call == "rename" and names[1].endswith(".tmp"):
            removed += 1
            assert not unnamed & {"text-checkpoint.mgd", "MGD_STORE"}
        elif call == "rename":
            assert names[0] not in unwritten
            assert not unnamed or names[1] != "text-checkpoint.mgd"
            unnamed.add(names[1])
    assert removed > 5 and not unnamed
