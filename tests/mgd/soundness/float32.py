"""A training in float32, whose operators are fused, against unrolled autograd of plain torch in float64.

A training is made in either dtype, as a dictionary of the arguments of `mgd.TrainingFunction`, and "z" with "lr", "w"
and "init".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from unrolled import unrolled

import mgd

Make = Callable[[torch.dtype], dict[str, Any]]


def initial(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def flat(grads: dict[str, Any]) -> dict[str, Tensor]:
    init = torch.cat([g.reshape(-1).double() for _, g in sorted(grads["init"].items())])
    return {"lr": grads["lr"].double(), "w": grads["w"].double(), "init": init}


def exact(make: Make) -> tuple[Tensor, dict[str, Tensor]]:
    t = make(torch.float64)
    result = unrolled(t.pop("model"), t.pop("loss"), t.pop("batches"), t.pop("z"), **t)
    return result.value, flat(result.grads)


def judge(make: Make, trace: bool | None, right: tuple[Tensor, dict[str, Tensor]], tolerance: float) -> None:
    """The value and the metagradient are right, and the model is as it was."""
    t = make(torch.float32)
    model, z = t["model"], t.pop("z")
    before = {key: x.clone() for key, x in model.state_dict().items()}
    result = mgd.TrainingFunction(**t, objective_mode="train", trace=trace).metagradient(z)
    value, grads = right
    assert (result.value - value).abs() <= tolerance * value.abs()
    for key, g in flat(result.grads).items():
        assert (g - grads[key]).norm() <= tolerance * grads[key].norm(), key
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
