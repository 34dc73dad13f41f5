"""Stock models as workloads: tiny and in float64, their metagradients are those of unrolled autograd."""

from __future__ import annotations

import sys

import pytest
import torch

from mgd.bench import baselines, methods
from mgd.bench.workload import Workload
from mgd.bench.workloads_stock import IGNORED, NAMES, PAD, STOCK, Size, stock
from mgd.errors import MissingPackage

pytestmark = pytest.mark.filterwarnings("ignore")

TINY = Size(layers=2, width=16, heads=2, vocabulary=20, length=8, side=32, batch=3, examples=5)
# Norms, router probabilities and rotary embeddings are computed in float32 whatever the model's dtype.
CLOSE = 1e-6


def tiny(name: str, **options) -> Workload:
    for package in ("transformers", *["peft"] * (name == "llama-lora")):
        pytest.importorskip(package)
    return stock(name, steps=3, size=TINY, **options)


def in_float64(name: str, **options) -> Workload:
    workload = tiny(name, **options)
    if name == "mixtral":  # torch's grouped_mm takes no float64
        workload.model.set_experts_implementation("batched_mm")
    workload.model.double()
    if name in ("vit", "resnet"):
        for batch in (workload.held_out, *workload.batches):
            batch["pixel_values"] = batch["pixel_values"].double()
    return workload


def assert_unrolled_agrees(name: str, dropout: bool, mode: str) -> None:
    workload = in_float64(name, dropout=dropout)
    z = {key: value.double() for key, value in workload.z().items()}
    function = workload.function(trace=mode == "captured")
    value, wanted = baselines.unrolled(function, z)
    assert all(float(g.norm()) > 0 for g in wanted.values())
    found = function.metagradient(z)
    assert found.report.execution == mode
    torch.testing.assert_close(found.value, value, rtol=CLOSE, atol=0)
    assert max(methods.differences(found.grads, wanted).values()) < CLOSE


CASES = [(name, True) for name in STOCK] + [(name, False) for name, of in STOCK.items() if of.dropout]
every_model = pytest.mark.parametrize("name, dropout", CASES)


@every_model
def test_metagradients_are_those_of_unrolled_autograd(name, dropout):
    assert_unrolled_agrees(name, dropout, "eager")


@every_model
def test_captured_metagradients_are_those_of_unrolled_autograd(name, dropout):
    assert_unrolled_agrees(name, dropout, "captured")


def test_dropout_is_the_architectures_own_or_off():
    pytest.importorskip("transformers")
    for name, random in (("gpt2", True), ("gpt2-no-dropout", False), ("llama", False)):
        workload = NAMES[name](steps=1, size=TINY)
        with torch.no_grad():
            first, second = workload.objective(workload.model), workload.objective(workload.model)
        assert bool(first != second) is random, name


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_padding_has_no_loss(name):
    workload = tiny(name, dropout=False)
    for batch in workload.batches:
        labels, padding = batch["labels"], batch["input_ids"] == PAD
        assert (labels != IGNORED).any(1).all()
        assert padding.equal(batch["attention_mask"] == 0)
        if name != "t5":  # whose labels are another text
            assert (labels[padding] == IGNORED).all()
    batch = next(b for b in workload.batches if (b["attention_mask"] == 0).any())
    before = workload.losses(workload.model, batch)
    batch["input_ids"][batch["attention_mask"] == 0] = 7
    torch.testing.assert_close(workload.losses(workload.model, batch), before)


def test_many_objectives_have_the_mean_of_one():
    workload = tiny("llama")
    each = workload.objectives(5)(workload.model)
    assert each.shape == (5,)
    torch.testing.assert_close(each.mean(), workload.objective(workload.model))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackage, match=r"need transformers.*pip install 'mgd-kernels\[test\]'"):
        stock("gpt2", steps=1, size=TINY)
