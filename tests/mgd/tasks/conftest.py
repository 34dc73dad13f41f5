"""Fixtures of this folder."""

from __future__ import annotations

import pytest

from mgd.autodiff.batched import StepsAtOnce
from mgd.tasks.group import Group


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
