"""A diagnosis finds what is wrong, and its changes do what it says."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from cases import adamw, initial, mlp, supervised, weighted, weights

import mgd
from mgd.diagnose import _changes
from mgd.errors import BadArgument
from mgd_kernels import SGD


def case(optimizer=None, steps=24, **options):
    found = supervised(mlp(), (5,), steps=steps, optimizer=optimizer or adamw(), **options).to(torch.float32)
    found.z.clear()
    return found.but({"data_weights": weights().float()}, loss=weighted)


@pytest.fixture(scope="module")
def healthy():
    return mgd.diagnose(case().function(), case().z)


def test_a_healthy_training_needs_no_change(healthy):
    assert healthy.healthy and not healthy.changes and healthy.found.smoothness > 0.8
    assert "It can be followed" in str(healthy)


def test_an_unstable_training_is_told_and_a_lower_rate_comes_first():
    rough = case(SGD(lr=3.0))
    found = mgd.diagnose(rough.function(), rough.z)
    assert not found.healthy and found.found.unstable and "HUGE" in str(found)
    best = next(iter(found.changes))
    assert "learning rate" in best and found.changes[best].smoothness > max(0.8, found.found.smoothness)
    order = [x.smoothness for x in found.changes.values() if not isinstance(x, str)]
    assert order == sorted(order, key=lambda x: math.inf if math.isnan(x) else -x)
    json.dumps(found.to_dict())


@pytest.mark.parametrize("where", ["optimizer", "fixed", "z"])
def test_a_change_of_the_rate_is_that_of_a_training_with_this_rate(where):
    base = case(adamw(lr=0.02))
    options = {"fixed": {"lr": 0.02}} if where == "fixed" else {}
    z = base.z | ({"lr": torch.full((24,), 0.02)} if where == "z" else {})
    name, changed, at = next(_changes(base.function(**options), z))
    assert name == "half the learning rate"
    assert torch.equal(changed.value(at), case(adamw(lr=0.01)).function().value(base.z))


def test_changes_fit_the_training():
    names = [name for name, *_ in _changes(case().function(), case().z)]
    assert names[2:] == ["eps_root larger", "max_grad_norm=1", "since=6"]
    other = case(SGD(lr=0.1), steps=4).but({"init": initial(mlp().float())})
    names = [name for name, *_ in _changes(other.function(max_grad_norm=1.0, autocast="bfloat16"), other.z)]
    assert names == ["half the learning rate", "a tenth of the learning rate", "autocast=None"]


def test_noise_is_told_and_autocast_is_what_makes_it():
    cast = case(adamw(lr=0.05, eps_root=1e-8))
    found = mgd.diagnose(cast.function(autocast="bfloat16", trace=False), cast.z)
    assert found.found.noisy and "NOISE" in str(found)
    assert next(iter(found.changes)) == "autocast=None"


def test_zeros_are_told():
    some = case(steps=1)
    found = mgd.diagnose(some.function(), some.z)
    unseen = 1 - len(some.batches[0][2].unique()) / 20
    assert found.found.zeros == pytest.approx({"data_weights": unseen}) and "ZERO" in str(found)


def test_a_step_has_a_size():
    with pytest.raises(BadArgument, match="h > 0"):
        mgd.diagnose(case().function(), case().z, h=0.0)


def test_numbers_and_nothing_are_metaparameters_too():
    f, z = case().function(), case().z
    assert math.isnan(mgd.diagnose(f.replaced(loss=lambda m, b, z: m(b[0]).square().mean()), {}).found.smoothness)
    found = mgd.diagnose(f, z | {"lr": 0.01})
    assert found.found.smoothness > 0.8
    for h in (0.0, math.inf, math.nan, "a"):
        with pytest.raises(BadArgument, match="h > 0"):
            mgd.diagnose(f, z, h=h)


def test_what_was_not_measured_is_not_called_smooth(healthy):
    unmeasured = dataclasses.replace(healthy, found=dataclasses.replace(healthy.found, smoothness=math.nan))
    assert "was not measured" in str(unmeasured) and "smooth here" not in str(unmeasured)
