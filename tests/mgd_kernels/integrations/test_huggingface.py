"""The loss of language models without logits, beside the one that transformers computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mgd_kernels.errors import BadArgument
from mgd_kernels.integrations.huggingface import causal_lm_loss

transformers = pytest.importorskip("transformers")

_SMALL = dict(
    vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: transformers.LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**_SMALL, final_logit_softcapping=0.5),
    "qwen2": lambda: transformers.Qwen2Config(**_SMALL),
}


def model(name, **changes):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.loss_type = "ForCausalLM"
    for key, value in changes.items():
        setattr(config, key, value)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()


def text():
    ids = torch.randint(60, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = -100
    return ids, labels


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_and_its_gradient(name):
    net, (ids, labels) = model(name), text()
    mask = torch.ones_like(ids)
    parameters = [p for p in net.parameters() if p.requires_grad]
    mine = causal_lm_loss(net, labels, input_ids=ids, attention_mask=mask)
    value = net(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(mine, value, check_dtype=False)
    for got, expected in zip(*(torch.autograd.grad(x, parameters) for x in (mine, value)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)  # transformers casts logits to float32


def test_a_loss_for_each_token():
    net, (ids, labels) = model("llama"), text()
    losses = causal_lm_loss(net, labels, dict(reduction="none"), input_ids=ids)
    logits = net(input_ids=ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(3, 11)
    torch.testing.assert_close(losses, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # in peft
def test_adapters_in_the_body():
    peft = pytest.importorskip("peft")
    net, (ids, labels) = model("llama"), text()
    plain = causal_lm_loss(net, labels, input_ids=ids)
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    mine = causal_lm_loss(adapted.double(), labels, input_ids=ids)
    torch.testing.assert_close(mine, adapted(input_ids=ids, labels=labels).loss, check_dtype=False)
    assert not torch.allclose(mine, plain)


def test_what_it_refuses():
    ids, labels = text()
    for changes in (dict(logit_scale=0.5), dict(output_router_logits=True)):
        with pytest.raises(BadArgument, match=next(iter(changes))):
            causal_lm_loss(model("llama", **changes), labels, input_ids=ids)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, is_decoder=True
    )
    bert = transformers.BertLMHeadModel(config)
    for other in (bert, torch.nn.Linear(2, 2)):
        with pytest.raises(BadArgument, match=r"lm_head is an nn\.Linear"):
            causal_lm_loss(other, labels, input_ids=ids)
