"""The trainings of `cases`, moved to a device."""

from __future__ import annotations

import copy
import os

import cases
import pretended
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

DEVICE = os.environ.get("MGD_DEVICE", "pretend:0")  # `make bench-gpu` names a GPU
if DEVICE.startswith("pretend"):
    pretended.load()
PRETENDED = torch.device(DEVICE)
pretended_only = pytest.mark.skipif(PRETENDED.type != "pretend", reason="looks at what the pretended device counts")


def moved(x, device):
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, x)


def on(case: cases.Case, device: torch.device | str) -> cases.Case:
    """The same training there; its objective reads the first batches."""
    batches, z = moved(case.batches, device), moved(case.z, device)

    def objective(model):
        return torch.stack([case.loss(model, batch, z) for batch in batches[:2]]).sum()

    model, there = copy.deepcopy(case.model), {}
    for module in model.modules():  # `model.to` would part tied weights, which it does not on a GPU
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is not None and x not in there:
                    there[x] = type(x)(x.detach().to(device)) if isinstance(x, nn.Parameter) else x.to(device)
                held[name] = None if x is None else there[x]
    return case.but(model=model, batches=batches, objective=objective).but(z)


def mlp(steps: int = 8, dropout: float = 0.1, **options) -> cases.Case:
    case = cases.supervised(cases.mlp(dropout), (5,), steps=steps, **options)
    return case.but({"data_weights": cases.weights()}, loss=cases.weighted).to(torch.float32)


def convnet(**options) -> cases.Case:
    """With running statistics, which its steps change."""
    case = cases.supervised(cases.convnet(), (1, 6, 6), steps=5, **options)
    return case.but({"data_weights": cases.weights()}, loss=cases.weighted).to(torch.float32)


def gpt(**options) -> cases.Case:
    """Without dropout: masks follow the layout of activations, which the CPU's own attention gives another one."""
    return cases.language(steps=4, **options).but(model=cases.gpt(0.0)).to(torch.float32)


def same(found, expected, tolerance: float = 1e-5) -> None:
    """A metagradient of the device and one of the CPU, whose operators are the same and whose optimizer is not."""
    ours, theirs = ({"value": x.value, **x.grads, "losses": x.losses} for x in (found, expected))
    errors = {key: cases.relative_error(moved(ours[key], "cpu"), moved(theirs[key], "cpu")) for key in theirs}
    assert all(error <= tolerance for error in errors.values()), errors
