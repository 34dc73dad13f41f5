"""SmolLM2: its real weights where they are installed, and the setting and the workload on small models of its kind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mgd.bench import baselines, methods, workloads_smollm2
from mgd.errors import BadData
from mgd.plan.budget import Budget
from mgd.recipes.attribute import Training, run
from mgd.recipes.attribute import report as recipe_report
from mgd.recipes.attribute.command import ONE_TRAINING
from mgd.recipes.attribute.judging import OURS
from mgd.recipes.attribute.texts import smollm2_task
from mgd.recipes.models import smollm2

pytest.importorskip("transformers")

TINY = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 128,
}


class Bytes:
    """A tokenizer whose tokens are characters of ASCII."""

    def __call__(self, words):
        return {"input_ids": list(words.encode())}

    def decode(self, tokens):
        return bytes(tokens.tolist()).decode()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The setting and the workload have a small model of the kind, and their log in a folder of the test."""
    monkeypatch.setattr(smollm2, "installed", lambda: True)
    monkeypatch.setattr(smollm2, "pretrained", lambda: (smollm2.untrained(**TINY), Bytes()))
    kept = {"budget": Budget(host="200KB", disk=(tmp_path, "1GB"))}
    within = smollm2.within_memory
    monkeypatch.setattr(smollm2, "within_memory", lambda batch: within(batch) | kept)
    torch.manual_seed(0)
    return tmp_path


def test_the_setting_is_checked_by_a_difference_of_its_training(small):
    training = Training(examples=8, batch=2, epochs=1, rate=1e-3, eps_root=1e-6)
    task = smollm2_task(training, 12, 2, seed=0, domain="pydoc")
    assert task.texts[3].encode() == bytes([*task.x[3].tolist(), int(task.y[3, -1])])
    found = run(task, None, ONE_TRAINING)
    ours, difference = found.smooth.difference
    assert abs(ours) > 1e-6 and difference == pytest.approx(ours, rel=2e-3)
    assert list(found.smooth.scores) == [OURS] and found.to_dict()["smooth"]["lds"] == {OURS: {}}
    page = recipe_report.page(found)
    titles = [section.title for section in page.sections()]
    assert titles[0].startswith("Test text 1") and titles[-2:] == ["Is the derivative right?", "What it cost"]
    assert "two more trainings" in page.verdict and [title for title, _ in page.tables] == ["What it cost"]


def test_the_workload_has_the_metagradient_of_unrolled_autograd_and_logs_on_disk(small):
    workload = workloads_smollm2.smollm2(steps=3, size=2, length=10)
    workload.model.double()
    z = {key: value.double() for key, value in workload.z().items()}
    function = workload.function(trace=True)
    value, wanted = baselines.unrolled(function, z)
    found = function.metagradient(z)
    assert found.report.execution == "captured" and found.report.plan["peak"]["disk"] > 0
    torch.testing.assert_close(found.value, value)
    # RMSNorm and rotary embeddings are computed in float32 whatever the model's dtype.
    assert max(methods.differences(found.grads, wanted).values()) < 1e-6


def test_without_the_weights_random_ones_of_the_same_kind_stand_in(monkeypatch, tmp_path):
    monkeypatch.setenv("MGD_DATA", str(tmp_path))
    monkeypatch.setattr(smollm2, "SHAPE", smollm2.SHAPE | TINY)
    workload = workloads_smollm2.smollm2(steps=2, size=2, length=5)
    assert "make data" in workload.note and workload.batches[0][0].shape == (2, 5)
    assert workload.losses(workload.model, workload.held_out).shape == (2,)
    with pytest.raises(BadData, match="make data"):
        smollm2.pretrained()


def test_passages_do_not_overlap_and_a_short_text_is_refused(monkeypatch):
    monkeypatch.setattr(smollm2.text, "read", lambda domain: bytes(range(100)))
    found = smollm2.passages(Bytes(), "any", 10, 10, seed=0)
    assert sorted(found.flatten().tolist()) == list(range(100))
    with pytest.raises(BadData, match="at least 110 tokens of any; there are 100"):
        smollm2.passages(Bytes(), "any", 11, 10, seed=0)


@pytest.mark.skipif(not smollm2.installed(), reason="the weights come with make data")
def test_the_real_weights_know_english():
    """Queries and keys in another order of the rotary pairs give a loss of 5 and more."""
    pytest.importorskip("gguf")
    model, tokenizer = smollm2.pretrained()
    inner = model.model
    assert inner.lm_head.weight is inner.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {key: getattr(inner.config, key) for key in smollm2.SHAPE} == smollm2.SHAPE
    tokens = smollm2.passages(tokenizer, "pydoc", 1, 97, seed=0)
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:])
    assert float(loss) < 3.8
