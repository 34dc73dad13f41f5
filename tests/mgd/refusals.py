"""Calls that must be refused, and what their errors must say."""

import pytest
from cases import mlp, supervised

from mgd import errors

STEPS = 6
CALLS = ["metagradient", "value", "train", "__call__"]


def base(**options):
    return supervised(mlp(), (5,), STEPS, **options)


def refused(kind, *parts, case=None, step=None, call="metagradient", **changes):
    """The call raises exactly this class, and its text has these parts."""
    case = (case or base()).but(**changes)
    with pytest.raises(errors.MetagradientError if kind is None else kind) as caught:
        getattr(case.function(), call)(case.z)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert all(part in text for part in parts), text
    if step is not None:
        assert f"step {step}" in text, text
        assert getattr(caught.value, "step", step) == step
    return caught.value
