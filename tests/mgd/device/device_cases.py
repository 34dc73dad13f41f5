"""The trainings of `cases`, moved to a device."""

from __future__ import annotations

import copy
import os

import cases
import pretended
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

DEVICE = os.environ.get("MGD_DEVICE", "pretend:0")  # `make bench-gpu` names a GPU
if DEVICE.startswith("pretend"):
    pretended.load()
PRETENDED = torch.device(DEVICE)
PRETENDS = PRETENDED.type == "pretend"
torch.backends.cudnn.allow_tf32 &= PRETENDS  # it rounds more coarsely than float32
pretended_only = pytest.mark.skipif(not PRETENDS, reason="looks at what the pretended device counts")


def moved(x, device):
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, x)


def on(case: cases.Case, device: torch.device | str) -> cases.Case:
    """The same training there; its objective reads the first batches."""
    batches, z = moved(case.batches, device), moved(case.z, device)

    def objective(model):
        return torch.stack([case.loss(model, batch, z) for batch in batches[:2]]).sum()

    model = copy.deepcopy(case.model).to(device)
    return case.but(model=model, batches=batches, objective=objective).but(z)


def mlp(steps: int = 8, dropout: float = 0.1 * PRETENDS, **options) -> cases.Case:
    """With dropout where the device draws the CPU's random numbers."""
    case = cases.supervised(cases.mlp(dropout), (5,), steps=steps, **options)
    return case.but({"data_weights": cases.weights()}, loss=cases.weighted).to(torch.float32)


def convnet(**options) -> cases.Case:
    """With running statistics, which its steps change."""
    case = cases.supervised(cases.convnet(), (1, 6, 6), steps=5, **options)
    return case.but({"data_weights": cases.weights()}, loss=cases.weighted).to(torch.float32)


def gpt(**options) -> cases.Case:
    """Without dropout: masks follow the layout of activations, which the CPU's own attention gives another one."""
    return cases.language(steps=4, **options).but(model=cases.gpt(0.0)).to(torch.float32)


def same(found, expected, tolerance: float = 1e-5 if PRETENDS else 1e-3) -> None:
    """A metagradient of the device and one of the CPU, whose operators are the same and whose optimizer is not."""
    ours, theirs = ({"value": x.value, **x.grads, "losses": x.losses} for x in (found, expected))
    errors = {key: cases.relative_error(moved(ours[key], "cpu"), moved(theirs[key], "cpu")) for key in theirs}
    assert all(error <= tolerance for error in errors.values()), errors
