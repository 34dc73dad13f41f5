"""Every pattern in every mode: the right value and metagradient, or where it may be refused, an error of mgd.errors.

`KNOWN` holds what fails today. It is strict: whoever makes a pattern right removes its entry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from _pytest.mark import ParameterSet
from pattern import PURE, Pattern, Training
from patterns import PATTERNS
from reference import differences, reference, slope
from torch import Tensor

import mgd
from mgd.errors import MetagradientError

# A mode may serve a step in another way than the one that was asked for, and say so in a warning.
pytestmark = pytest.mark.filterwarnings("ignore")

MODES = {"eager": False, "traced": True, "default": None, "joint": "joint"}
TOLERANCE = 1e-9
BY_DIFFERENCES = 1e-6

# In the ordinary suite the modes that trace run on these alone, and so does the test of the reference.
CORE = """
plain mask_mean two_masks_broadcast mask_down_to_nothing token_into_mask experts_by_index divided_by_number_of_classes
branch_on_batch loop_count_from_batch tolist numpy_in_loss packed_gru string_in_batch float_in_batch_to_the_backward
cached_mask logging_by_item dropout branch_on_buffer differentiable_buffer activation_checkpoint
once_differentiable_function attention_with_mask_if_needed reversal_of_two_phases detached_for_first_calls
metaparameter_detached_for_first_steps tensor_hook_that_grows random_detach tensor_changed_in_place cyclic_annealing
""".split()

# The default mode may choose by the length of the training.
LONG = ["mask_mean", "experts_by_index", "divided_by_number_of_classes", "tolist", "reversal_of_two_phases"]

WRONG, RAISES, REFUSED = "another number", "a raw error", "an error, and no reason for one"
KNOWN: dict[str, dict[str, str]] = {
    "reentrant_checkpoint": dict.fromkeys(MODES, RAISES),
    "gradient_penalty_through_layer_norm": dict.fromkeys(MODES, WRONG),
    "gradient_penalty_through_batch_norm": dict.fromkeys(MODES, WRONG),
    "gradient_penalty_through_instance_norm": dict.fromkeys(MODES, WRONG),
    "once_differentiable_function": {"traced": WRONG},
    "sparse_adjacency": {"joint": RAISES},
    "tolist": {"joint": REFUSED},
    "numpy_in_loss": {"joint": REFUSED},
    "mask_mean": {"traced": WRONG, "joint": RAISES},
    "mask_mean_of_varying_count": {"traced": RAISES, "joint": RAISES},
    "two_masks_broadcast": {"traced": RAISES, "joint": RAISES},
    "mask_down_to_one": {"traced": RAISES, "joint": RAISES},
    "mask_down_to_nothing": {"traced": RAISES, "joint": RAISES},
    "outer_product_of_masked": {"traced": RAISES, "joint": RAISES},
    "softmax_of_masked": {"traced": RAISES, "joint": RAISES},
    "first_of_masked": {"traced": RAISES, "joint": RAISES},
    "layer_norm_of_masked": {"traced": RAISES, "joint": RAISES},
    "reshaped_masked": {"traced": RAISES, "joint": RAISES},
    "token_into_mask": {"traced": RAISES, "joint": RAISES},
    "masked_select": {"traced": RAISES, "joint": RAISES},
    "mask_from_parameters": {"traced": RAISES, "joint": RAISES},
    "hard_examples_by_numpy": {"joint": REFUSED},
    "online_triplets": {"traced": RAISES, "joint": RAISES},
    "mean_of_each_class_by_unique": {"joint": RAISES},
    "divided_by_number_of_classes": {"joint": WRONG},
    "experts_by_index": {"traced": RAISES, "joint": RAISES},
    "experts_by_sorting": {"joint": REFUSED},
    "reversal_that_grows": dict.fromkeys(MODES, WRONG),
    "reversal_that_grows_trained_critic": dict.fromkeys(MODES, WRONG),
    "reversal_of_two_phases": dict.fromkeys(MODES, WRONG),
    "reversal_every_other_call": dict.fromkeys(MODES, WRONG),
    "detached_for_first_calls": dict.fromkeys(MODES, WRONG),
    "detached_after_first_calls": dict.fromkeys(MODES, WRONG),
    "metaparameter_detached_for_first_steps": dict.fromkeys(MODES, WRONG),
    "tensor_hook_that_grows": dict.fromkeys(MODES, WRONG),
    "tensor_hook_on_hidden_that_grows": dict.fromkeys(MODES, WRONG),
    "parameter_hook": dict.fromkeys(MODES, WRONG),
    "random_detach": dict.fromkeys(MODES, WRONG),
    "stochastic_depth_by_random": {"joint": WRONG},
    "eval_mode_after_some_calls": {"joint": WRONG},
    "consistency_with_last_step": {"joint": WRONG},
    "gradual_unfreezing": dict.fromkeys(MODES, RAISES),
    "module_backward_hook_that_grows": dict.fromkeys(MODES, WRONG),
}
KNOWN_LONG = {"mask_mean": WRONG, "experts_by_index": RAISES, "reversal_of_two_phases": WRONG}


def cases() -> Iterator[ParameterSet]:
    for name, p in PATTERNS.items():
        for mode in MODES:
            marks = slow(name) if mode in ("traced", "joint") else []
            yield pytest.param(p, mode, id=f"{name}-{mode}", marks=marks + known(KNOWN.get(name, {}).get(mode)))


def slow(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in CORE else [pytest.mark.slow]


def known(reason: str | None) -> list[pytest.MarkDecorator]:
    return [pytest.mark.xfail(strict=True, reason=reason)] if reason else []


@functools.cache
def right(p: Pattern) -> tuple[Tensor, dict[str, Tensor]]:
    return (differences if p.differences else reference)(p.plain)


@pytest.mark.parametrize("p, mode", list(cases()))
def test_right_or_refused(p: Pattern, mode: str):
    expected = right(p)
    judge(p, p.build(), MODES[mode], expected)  # built last: a builder may seed a global generator


@pytest.mark.parametrize("name", [pytest.param(n, marks=known(KNOWN_LONG.get(n))) for n in LONG])
def test_default_of_a_long_training(name: str):
    p = PATTERNS[name]
    expected = reference(lambda: repeated(p.plain))
    judge(p, repeated(p.build), None, expected)


def repeated(build: Callable[[], Training], times: int = 5) -> Training:
    t = build()
    return replace(t, batches=[*t.batches] * times, z=t.z | {"lr": t.z["lr"].repeat(times)})


def judge(p: Pattern, t: Training, trace: bool | str | None, expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    f = mgd.TrainingFunction(t.model, t.loss, t.batches, optimizer=t.optimizer, objective=t.objective, trace=trace)
    try:
        result = f.metagradient(t.z)
    except MetagradientError as error:
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
