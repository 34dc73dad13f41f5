"""Loaders that fill one piece of memory again and again: what steps kept is not read with another batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import mlp, supervised, weighted


class Ring:
    """Batches in one piece of memory that NumPy writes again and again."""

    def __init__(self, batches):
        self.batches, self.memory = batches, tuple(np.zeros_like(x.numpy()) for x in batches[0])

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, t):
        for mine, x in zip(self.memory, self.batches[t], strict=True):
            mine[...] = x.numpy()
        return tuple(torch.from_numpy(x) for x in self.memory)


def scaled(model, batch, z):
    loss = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return loss.mean() + z["c"] * (batch[0][:, 0] * loss).mean()


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize(
    ("loss", "z"),
    [(weighted, {"data_weights": torch.ones(20)}), (scaled, {"c": torch.zeros(())})],
    ids=["weights that are equal", "a factor of 0"],
)
def test_memory_that_is_written_again_past_autograd_is_read_again(loss, z, trace):
    """Neither the loss nor the gradient shows it."""
    case = supervised(mlp(), (5,)).but(z=z, loss=loss).to(torch.float64)
    f = case.but(batches=Ring(case.batches)).function(trace=trace)
    for _ in range(2):  # the second time a small training stays in memory as a whole
        found, expected = f.metagradient(case.z), case.metagradient(trace=trace)
        assert all(torch.allclose(found.grads[key], expected.grads[key], rtol=1e-9) for key in case.z)
