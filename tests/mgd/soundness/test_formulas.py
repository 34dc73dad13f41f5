"""Formulas as people write them, in float32 in every mode, against unrolled autograd of plain torch in float64.

Metagradients with respect to the learning rate, example weights and initial parameters.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from float32 import exact, initial, judge
from formulas import FORMULAS, TOLD_OTHERWISE, Model
from torch import Tensor
from unrolled import unrolled

import mgd
from mgd_kernels import SGD

# Dynamo does not take hooks of nodes, NumPy or subclasses: such steps are evaluated by autograd, and a warning says so.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, EXAMPLES = 3, 4
MODES = {"eager": False, "captured": True, "default": None}
# Of float32, through a norm and three steps: measured up to 5e-6.
TOLERANCE = 3e-5

# Captured in the ordinary suite; the others are where slow tests run.
CORE = """
norm_of_a_buffer norm_whose_factor_is_written_by_data norm_whose_factor_is_detached_in_place
norm_whose_factor_has_a_hook rotary_with_a_detached_half loss_with_weights_of_a_buffer running_statistics_in_both_modes
""".split()


def training(name: str, dtype: torch.dtype) -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Model(FORMULAS[name]).to(dtype)
    g = torch.Generator().manual_seed(0)
    *batches, held = (torch.randn(EXAMPLES, 6, 5, generator=g).to(dtype) for _ in range(STEPS + 1))

    def size(m: Model) -> Tensor:
        return 1e-3 * sum(p.square().sum() for p in m.parameters() if p.requires_grad)

    def loss(m: Model, x: Tensor, z: dict[str, Tensor]) -> Tensor:
        return (z["w"] * m(x).flatten(1).cos().mean(1)).mean() + size(m)

    z = {"lr": torch.linspace(0.5, 0.3, STEPS).double(), "w": torch.linspace(0.5, 1.5, EXAMPLES).to(dtype)}
    z["init"] = initial(model)
    return {
        "model": model,
        "loss": loss,
        "batches": batches,
        "z": z,
        "optimizer": SGD(lr=0.1),
        "objective": lambda m: m(held).square().mean() + size(m),
    }


@functools.cache
def right(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    return exact(functools.partial(training, name))


def modes() -> list:
    cases = [pytest.param(name, "eager", id=f"{name}-eager") for name in FORMULAS]
    for name in FORMULAS:
        for mode in ("captured", "default"):
            marks = [] if mode == "captured" and name in CORE else [pytest.mark.slow]
            cases.append(pytest.param(name, mode, id=f"{name}-{mode}", marks=marks))
    return cases


@pytest.mark.parametrize("name, mode", modes())
def test_right(name: str, mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mgd.autodiff.payoff, "CAUTION", 0.0)  # the default captures at the first chance
    judge(functools.partial(training, name), MODES[mode], right(name), TOLERANCE)


@pytest.mark.parametrize("name", [name for name in FORMULAS if name not in TOLD_OTHERWISE])
def test_reference(name: str):
    """Where nothing is hidden from autograd, finite differences confirm the reference."""
    _, grads = right(name)
    g = torch.Generator().manual_seed(7)
    direction = {"lr": torch.randn(STEPS, generator=g).double(), "w": torch.randn(EXAMPLES, generator=g).double()}
    direction["init"] = torch.randn(grads["init"].shape, generator=g).double()

    def at(h: float) -> Tensor:
        t = training(name, torch.float64)
        z = t.pop("z")
        moved = iter(direction["init"].split([z["init"][n].numel() for n in sorted(z["init"])]))
        z = {
            "lr": z["lr"] + h * direction["lr"],
            "w": z["w"] + h * direction["w"],
            "init": {n: z["init"][n] + h * next(moved).view_as(z["init"][n]) for n in sorted(z["init"])},
        }
        return unrolled(t.pop("model"), t.pop("loss"), t.pop("batches"), z, **t).value

    h = 1e-5
    slope = (at(h) - at(-h)) / (2 * h)
    assert slope.item() == pytest.approx(sum((grads[k] * direction[k]).sum() for k in grads).item(), rel=1e-5)
