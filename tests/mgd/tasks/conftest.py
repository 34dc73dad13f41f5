"""Fixtures of this folder."""

from __future__ import annotations

import pytest
import task_cases

from mgd.autodiff.batched import StepsAtOnce
from mgd.tasks.account import Account
from mgd.tasks.group import Group


@pytest.fixture(params=[True, None], ids=["asked", "default"])
def trace(request, monkeypatch):
    """`trace=` of the tasks. By default they run together as if that paid at once."""

    def pays(self, size, left):
        self.bought = True
        return not self.refused

    if request.param is None:
        monkeypatch.setattr(Account, "pays", pays)
        monkeypatch.setattr(Account, "part", lambda self, count, left: (count, True))
    monkeypatch.setattr(task_cases, "TRACE", [request.param])
    return request.param


@pytest.fixture
def groups(monkeypatch):
    """The sizes of the groups that ran, and whether their steps went at once."""
    found = []
    train = Group.train

    def noted(self, keep):
        result = train(self, keep)
        at_once = all(isinstance(left.runner, StepsAtOnce) for left in result[1]) if keep else None
        found.append((self.size, at_once))
        return result

    monkeypatch.setattr(Group, "train", noted)
    return found
