"""Trainers of transformers as training functions: the training that `trainer.train()` makes, and its metagradient."""

from __future__ import annotations

import copy

import pytest
import torch

from mgd.errors import BadArgument, BadLoss
from mgd.integrations.transformers import load_into, training_function

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
N = 12


def tokens(labels=True):
    """Texts of different lengths, the first tokens of each without a label."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(N):
        ids = torch.randint(3, 50, (4 + i % 5,), generator=generator).tolist()
        rows.append(
            {"input_ids": ids, "attention_mask": [1] * len(ids)} | ({"labels": [-100] * 2 + ids[2:]} if labels else {})
        )
    return rows


def padded(rows):
    """A collator as people write it: to the right, -100 for labels."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [fill[key]] * (longest - len(row[key])) for row in rows])
        if isinstance(rows[0][key], list)
        else torch.tensor([row[key] for row in rows])
        for key in rows[0]
    }


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)), tokens()


def bert():
    config = transformers.BertConfig(**SMALL, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows = [row | {"labels": i % 3} for i, row in enumerate(tokens(False))]
    return transformers.BertForSequenceClassification(config), rows


def regression():
    config = transformers.BertConfig(**SMALL, num_labels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows = [row | {"labels": i / 4} for i, row in enumerate(tokens(False))]
    return transformers.BertForSequenceClassification(config), rows


def t5():
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config), tokens()


def lora():
    peft = pytest.importorskip("peft")
    model, rows = llama()
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=4)), rows


def trainer(make, tmp_path, **options):
    torch.manual_seed(0)
    model, rows = make()
    settings = {"per_device_train_batch_size": N, "num_train_epochs": 4, "learning_rate": 1e-2, "weight_decay": 0.1}
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **(settings | options)
    )
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:5], data_collator=padded)


@pytest.mark.parametrize("make", [llama, bert, regression, t5, lora])
def test_the_training_is_that_of_the_trainer(make, tmp_path):
    theirs = trainer(make, tmp_path, warmup_steps=2, lr_scheduler_type="cosine")
    f = training_function(theirs)
    assert len(f) == 4 and theirs.optimizer is None
    ours = f.train()
    model = copy.deepcopy(theirs.model)
    evaluated = f.value()
    theirs.train()
    for name, p in theirs.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(ours.parameters[name], p.detach(), rtol=2e-3, atol=2e-4)
    load_into(model, ours)
    trained = dict(model.named_parameters())
    assert all(torch.equal(trained[name], p) for name, p in ours.parameters.items())
    assert abs(theirs.evaluate()["eval_loss"] - float(evaluated)) < 1e-3


def test_accumulation_counts_tokens_over_the_whole_step(tmp_path):
    whole = training_function(trainer(llama, tmp_path, max_steps=3))
    parts = training_function(
        trainer(llama, tmp_path, max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    )
    assert parts.microbatches == 3 and len(parts) == 3
    a, b = (f.train().parameters for f in (whole, parts))
    for name, p in a.items():
        torch.testing.assert_close(b[name], p, rtol=1e-3, atol=1e-5)


def test_weights_have_the_derivative_of_finite_differences(tmp_path):
    theirs = trainer(bert, tmp_path, per_device_train_batch_size=5, num_train_epochs=1)  # no float32 inside
    f = training_function(theirs, eps_root=1e-6)
    f = f.replaced(model=f.model.double(), autocast=None)
    z = {"weights": torch.ones(N, dtype=torch.float64)}
    gradient = f.metagradient(z).grads["weights"]
    direction = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = 1e-4
    ahead, behind = (f.value({"weights": z["weights"] + sign * h * direction}) for sign in (1, -1))
    torch.testing.assert_close(gradient @ direction, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-9)
    assert (gradient != 0).all()


def test_what_has_no_counterpart_is_refused(tmp_path):
    with pytest.raises(BadArgument, match="label_smoothing_factor"):
        training_function(trainer(llama, tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(BadArgument, match="Adafactor"):
        training_function(trainer(llama, tmp_path, optim="adafactor"))
    without = trainer(llama, tmp_path)
    without.eval_dataset = None
    with pytest.raises(BadArgument, match="eval_dataset"):
        training_function(without)
    assert training_function(without, objective=lambda model: model.lm_head.weight.sum()).objective
    other = trainer(llama, tmp_path)
    other.model.loss_function = lambda logits, labels, **_: logits.square().mean()
    with pytest.raises(BadLoss, match="another one"):
        training_function(other)
