"""Batches as they come: tensors of inference mode, containers with attributes, nested tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import mlp, supervised

from mgd.errors import BadBatch


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


class Scaled(dict):
    scale = 1.0


@pytest.mark.parametrize("options", [{"trace": False}, {"trace": False, "microbatches": 2}], ids=str)
def test_attributes_of_a_container_stay(options):
    case = supervised(mlp(), (5,), steps=3)

    def batch(x, y, scale):
        made = Scaled(x=x / scale, y=y)
        made.scale = scale
        return made

    case.loss = lambda model, batch, z: F.cross_entropy(model(batch["x"] * batch.scale), batch["y"])
    batches = [(x, y) for x, y, *_ in case.batches]
    expected = case.but(batches=[batch(x, y, 1.0) for x, y in batches]).metagradient(**options)
    case.batches = [batch(x, y, 2.0) for x, y in batches]
    found, f = case.metagradient(**options), case.function(**options)
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-12, atol=1e-15)
    assert torch.equal(f.jvp(case.z, case.z).value, found.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_have_no_microbatches():
    case = supervised(mlp(), (5,), steps=3)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    case.batches = [(*batch, nested) for batch in case.batches]
    assert case.metagradient(trace=False).value
    with pytest.raises(BadBatch, match="dense"):
        case.metagradient(trace=False, microbatches=2)
