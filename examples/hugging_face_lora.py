"""A Trainer of transformers, with LoRA by peft: which training texts help?

A tiny Llama is made from a configuration. Texts count upwards, some by one and some at random; held-out texts count by
one. One metagradient with respect to the weight of every text tells them apart, and the training is repeated without
those that harm.

Run: python examples/hugging_face_lora.py (a few seconds; needs transformers, peft and accelerate)
"""

from __future__ import annotations

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mgd.integrations.transformers import load_into, training_function

VOCABULARY, LENGTH = 32, 12


def texts(n: int, spoiled: int) -> list[dict[str, list[int]]]:
    """Sequences that count by one; the first `spoiled` of them are random."""
    counting = (torch.randint(VOCABULARY, (n, 1)) + torch.arange(LENGTH)) % VOCABULARY
    counting[:spoiled] = torch.randint(VOCABULARY, (spoiled, LENGTH))
    return [{"input_ids": row, "labels": row} for row in counting.tolist()]


def main(n: int = 96, epochs: int = 6) -> dict[str, float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=VOCABULARY
    )
    lora = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], r=4, modules_to_save=["lm_head"])
    model = get_peft_model(LlamaForCausalLM(config), lora)
    spoiled = n // 3
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            report_to=[],
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=texts(n, spoiled), eval_dataset=texts(64, 0))
        f = training_function(trainer, eps_root=1e-8)

    result = f.metagradient({"weights": torch.ones(n)})
    harm = result.grads["weights"]
    found = (harm.topk(spoiled).indices < spoiled).float().mean().item()
    print(f"{found:.0%} of the {spoiled} most harmful texts are random (chance: 33%)")

    helpful = (harm < 0).float()
    before, after = result.value.item(), f.value({"weights": helpful * n / helpful.sum()}).item()
    print(f"held-out loss {before:.3f} with all texts, {after:.3f} with the {int(helpful.sum())} that help")
    load_into(model, f.train({"weights": helpful * n / helpful.sum()}))  # the model, trained on those
    return {"found": found, "before": before, "after": after}


if __name__ == "__main__":
    main()
