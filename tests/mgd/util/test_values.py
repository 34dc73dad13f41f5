"""States as tensors, and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mgd.errors import BadArgument
from mgd.util.values import from_tensors, to_bytes, to_tensors


def test_a_value_comes_back_as_it_was():
    value = {
        "numbers": [1, -2.5, 1e-323, True, None, 2**70],
        3: ("a", "\udc80", ("ü",), []),
        "nested": {"x": {0: torch.arange(3), 1: (torch.zeros(0), torch.tensor(2.0))}},
    }
    back = from_tensors(to_tensors(value))
    assert torch.equal(back["nested"]["x"].pop(0), value["nested"]["x"].pop(0))
    assert list(map(torch.equal, back["nested"]["x"].pop(1), value["nested"]["x"].pop(1))) == [True, True]
    assert back == value and [type(x) for x in back["numbers"]] == [type(x) for x in value["numbers"]]
    assert from_tensors(to_tensors([np.float64(0.1), torch.Size([2])])) == [0.1, (2,)], "as their plain kinds"
    infinite = from_tensors(to_tensors([math.inf, -math.inf, math.nan]))
    assert infinite[:2] == [math.inf, -math.inf] and math.isnan(infinite[2])


def test_complex_tensors_and_views_come_back():
    z = torch.tensor([1 + 2j, 3 - 1j]).conj()
    strided = torch.arange(6).view(2, 3).T
    back = from_tensors(to_tensors([z, strided]))
    assert torch.equal(back[0], z) and back[0].dtype == z.dtype and torch.equal(back[1], strided)


@pytest.mark.parametrize("value", [object(), {1, 2}, {"x": lambda: None}, {(1, 2): 3}, {"x": b"bytes"}])
def test_other_values_are_refused(value):
    with pytest.raises(BadArgument, match="which a directory can hold; got"):
        to_tensors(value)


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [torch.ones(2)],
        [to_bytes("not JSON")],
        [to_bytes('{"tensor": 0}')],
        [to_bytes('{"tensor": "a"}'), torch.ones(1)],
        [to_bytes('{"code": "x"}')],
        [to_bytes('{"dict": [1]}')],
        [to_bytes('{"a": 1, "b": 2}')],
        [to_bytes('{"tuple": 1}')],
        [to_bytes('{"complex": 0}'), torch.ones(3)],
        [to_bytes("[" * 100_000)],
        [torch.full((3,), 255, dtype=torch.uint8)],
    ],
)
def test_tensors_of_something_else_are_a_value_error(tensors):
    with pytest.raises(ValueError):
        from_tensors(tensors)
