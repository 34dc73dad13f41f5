"""Every pattern in every mode: the right value and metagradient, or where it may be refused, an error of mgd.errors.

`KNOWN` holds what fails today. It is strict: whoever makes a pattern right removes its entry.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from _pytest.mark import ParameterSet
from pattern import PURE, Pattern, Training
from patterns import PATTERNS
from reference import differences, reference, slope
from torch import Tensor

import mgd
from mgd.errors import KernelError, MetagradientError

# A mode may serve a step in another way than the one that was asked for, and say so in a warning.
pytestmark = pytest.mark.filterwarnings("ignore")

# "default" goes over to graphs as soon as it may, in the middle of the training.
MODES = {"eager": False, "captured": True, "default": None}
TOLERANCE = 1e-9
BY_DIFFERENCES = 1e-6

# In the ordinary suite the modes that trace run on these alone, and so does the test of the reference. A loss that
# reads nothing but its batch goes without the default there: the other two modes serve each of its steps.
BY_STEP = """
mask_mean two_masks_broadcast mask_down_to_nothing token_into_mask experts_by_index divided_by_number_of_classes
tolist numpy_in_loss packed_gru string_in_batch float_in_batch_to_the_backward activation_checkpoint
once_differentiable_function attention_with_mask_if_needed
""".split()
CORE = (
    """
plain branch_on_batch loop_count_from_batch cached_mask logging_by_item dropout branch_on_buffer differentiable_buffer
reversal_of_two_phases detached_for_first_calls metaparameter_detached_for_first_steps tensor_hook_that_grows
random_detach tensor_changed_in_place cyclic_annealing
""".split()
    + BY_STEP
)

WRONG, RAISES, REFUSED = "another number", "a raw error", "an error, and no reason for one"
KNOWN: dict[str, dict[str, str]] = {}


def cases() -> Iterator[ParameterSet]:
    for name, p in PATTERNS.items():
        for mode in MODES:
            marks = slow(name, mode)
            yield pytest.param(p, mode, id=f"{name}-{mode}", marks=marks + known(KNOWN.get(name, {}).get(mode)))


def slow(name: str, mode: str = "captured") -> list[pytest.MarkDecorator]:
    left_out = name not in CORE or (mode == "default" and name in BY_STEP)
    return [pytest.mark.slow] if mode != "eager" and left_out else []


def known(reason: str | None) -> list[pytest.MarkDecorator]:
    return [pytest.mark.xfail(strict=True, reason=reason)] if reason else []


@pytest.fixture(autouse=True)
def at_the_first_chance(monkeypatch: pytest.MonkeyPatch):
    """The default captures as soon as it may, however short the training is."""
    monkeypatch.setattr(mgd.autodiff.payoff, "CAUTION", 0.0)


@functools.cache
def right(p: Pattern) -> tuple[Tensor, dict[str, Tensor]]:
    return (differences if p.differences else reference)(p.plain)


@pytest.mark.parametrize("p, mode", list(cases()))
def test_right_or_refused(p: Pattern, mode: str):
    expected = right(p)
    judge(p, p.build(), MODES[mode], expected)  # built last: a builder may seed a global generator


def judge(p: Pattern, t: Training, trace: bool | str | None, expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    task = {"optimizer": t.optimizer, "objective": t.objective, "objective_mode": "train"}  # as in the reference
    f = mgd.TrainingFunction(t.model, t.loss, t.batches, **task, trace=trace)
    try:
        result = f.metagradient(t.z)
    except (MetagradientError, KernelError) as error:
        if p.kind is PURE:
            raise AssertionError(f"refused: {type(error).__name__}: {error}") from error
        return
    value, grads = expected
    distances = {"value": distance(result.value, value)} | {k: distance(result.grads[k], g) for k, g in grads.items()}
    tolerance = BY_DIFFERENCES if p.differences else TOLERANCE
    assert all(d <= tolerance for d in distances.values()), distances


def distance(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("p", [pytest.param(p, id=n, marks=slow(n)) for n, p in PATTERNS.items()])
def test_reference(p: Pattern):
    """No case is vacuous; and where nothing is hidden from autograd, finite differences confirm the reference."""
    value, grads = right(p)
    assert value.isfinite() and all(1e-5 < g.norm() < 1e3 for g in grads.values())
    if p.honest and not p.differences:
        for key, g in grads.items():
            direction = {k: torch.zeros_like(v) for k, v in grads.items()} | {key: g / g.norm()}
            assert slope(p.plain, direction) == pytest.approx(g.norm().item(), rel=BY_DIFFERENCES)
