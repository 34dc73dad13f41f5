"""Batches as they come."""

from __future__ import annotations

import pytest
import torch
from cases import mlp, supervised


class Parts:
    """A batch that loads parts of itself."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch[0])

    def load(self, start, stop):
        return tuple(x[start:stop] for x in self.batch)


@pytest.mark.parametrize("made", [tuple, list, Parts, lambda batch: {"inputs": batch}])
@pytest.mark.parametrize("options", [{"trace": False}, {"trace": True}, {"trace": False, "microbatches": 2}], ids=str)
def test_batches_of_inference_mode_are_as_others(made, options):
    """As features are that a frozen model computed."""
    case = supervised(mlp(), (5,), steps=3)
    inner = case.loss
    case.loss = lambda model, batch, z: inner(model, batch["inputs"] if isinstance(batch, dict) else batch, z)
    expected = case.but(batches=[made(batch) for batch in case.batches]).metagradient(**options)
    with torch.inference_mode():
        case.batches = [made(tuple(x.clone() for x in batch)) for batch in case.batches]
    found = case.metagradient(**options)
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-12, atol=1e-15)  # copies may be aligned otherwise
