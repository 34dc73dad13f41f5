"""Stock models of transformers, tiny and in float64, in every mode, against unrolled autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pattern import Training, seeded
from reference import reference
from torch import Tensor, nn

import mgd
from mgd_kernels import SGD

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

MODES = {"eager": False, "captured": True, "default": None}
STEPS, EXAMPLES, LENGTH, WORDS = 3, 3, 6, 13
# Norms, router probabilities and rotary embeddings are computed in float32 whatever the model's dtype.
TOLERANCE = 1e-6

# Traced in the ordinary suite; the others are traced where slow tests run.
CORE = ("gpt2_dropout", "llama", "t5")
KNOWN: dict[str, dict[str, str]] = {}

SIZES = {"vocab_size": WORDS, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
HEADS = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}


def gpt2(dropout: float) -> nn.Module:
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = transformers.GPT2Config(vocab_size=WORDS, n_embd=8, n_layer=1, n_head=2, n_positions=16, **rates)
    return transformers.GPT2LMHeadModel(config)


def llama(dropout: float) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**HEADS, attention_dropout=dropout))


def qwen2_lora(dropout: float) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**HEADS, attention_dropout=dropout))
    config = peft.LoraConfig(r=2, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def mixtral(dropout: float, experts: str = "eager") -> nn.Module:
    sizes = HEADS | {"num_local_experts": 3, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(**sizes, attention_dropout=dropout, experts_implementation=experts)
    return transformers.MixtralForCausalLM(config)


def mixtral_batched(dropout: float) -> nn.Module:
    """The default, "grouped_mm", takes no float64 in torch."""
    return mixtral(dropout, "batched_mm")


def bert(dropout: float) -> nn.Module:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = transformers.BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=16, **rates)
    return transformers.BertForMaskedLM(config)


def t5(dropout: float) -> nn.Module:
    sizes = {"vocab_size": WORDS, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, dropout_rate=dropout)
    return transformers.T5ForConditionalGeneration(config)


def vit(dropout: float) -> nn.Module:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {"num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3, **rates)
    return transformers.ViTForImageClassification(config)


def resnet(dropout: float) -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def texts(make: Callable[[float], nn.Module], dropout: float) -> Training:
    """Language modelling of padded texts, weighted by example; one batch of three has no padding."""

    def loss(m: nn.Module, b: dict[str, Tensor], z: dict[str, Tensor]) -> Tensor:
        labels = {"labels": b["input_ids"]} if make is t5 else {}
        logits = m(input_ids=b["input_ids"], attention_mask=b["attention_mask"], **labels).logits
        targets = b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets[:, 1:], reduction="none").mean(1)
        return (z["w"] * each).mean()

    g = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, WORDS, (EXAMPLES, LENGTH), generator=g) for _ in range(STEPS + 1)]
    masks = [torch.arange(LENGTH) < torch.tensor([[6], [6 - t], [6]]) for t in range(STEPS + 1)]
    batches = [{"input_ids": i, "attention_mask": m.long()} for i, m in zip(ids, masks, strict=True)]
    return training(seeded(make, dropout), loss, batches)


def images(make: Callable[[float], nn.Module], dropout: float) -> Training:
    def loss(m: nn.Module, b: dict[str, Tensor], z: dict[str, Tensor]) -> Tensor:
        each = F.cross_entropy(m(pixel_values=b["x"]).logits, b["y"], reduction="none")
        return (z["w"] * each).mean()

    g = torch.Generator().manual_seed(3)
    x = torch.randn(STEPS + 1, EXAMPLES, 3, 8, 8, generator=g, dtype=torch.float64)
    y = torch.randint(3, (STEPS + 1, EXAMPLES), generator=g)
    return training(seeded(make, dropout), loss, [{"x": a, "y": c} for a, c in zip(x, y, strict=True)])


def training(model: nn.Module, loss: Callable[..., Tensor], batches: list[dict[str, Tensor]]) -> Training:
    """The objective is the loss of the last batch, in training mode as before."""
    model.train()
    *rest, held = batches
    ones = {"w": torch.ones(EXAMPLES, dtype=torch.float64)}
    z = {"lr": torch.full((STEPS,), 0.1, dtype=torch.float64), "w": torch.linspace(0.5, 1.5, EXAMPLES).double()}
    return Training(model, loss, rest, lambda m: loss(m, held, ones), z, SGD(lr=0.1))


MODELS = {
    f"{make.__name__}{suffix}": functools.partial(images if make in (vit, resnet) else texts, make, dropout)
    for make in (gpt2, llama, qwen2_lora, mixtral, mixtral_batched, bert, t5, vit, resnet)
    for dropout, suffix in ((0.0, ""), (0.1, "_dropout"))
    if make is not resnet or dropout == 0.0
}


@pytest.fixture(autouse=True)
def at_the_first_chance(monkeypatch: pytest.MonkeyPatch):
    """The default captures as soon as it may, however short the training is."""
    monkeypatch.setattr(mgd.autodiff.payoff, "CAUTION", 0.0)


@functools.cache
def right(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    return reference(MODELS[name])


def cases() -> list:
    cases = []
    for name in MODELS:
        for mode in MODES:
            slow = [pytest.mark.slow] if mode != "eager" and name not in CORE else []
            reason = KNOWN.get(name, {}).get(mode)
            marks = slow + ([pytest.mark.xfail(strict=True, reason=reason)] if reason else [])
            cases.append(pytest.param(name, mode, id=f"{name}-{mode}", marks=marks))
    return cases


@pytest.mark.parametrize("name, mode", cases())
def test_right(name: str, mode: str):
    value, grads = right(name)
    assert all(g.norm() > 1e-6 for g in grads.values())
    t = MODELS[name]()
    f = mgd.TrainingFunction(
        t.model,
        t.loss,
        t.batches,
        optimizer=t.optimizer,
        objective=t.objective,
        objective_mode="train",
        trace=MODES[mode],
    )
    result = f.metagradient(t.z)
    for got, expected in [(result.value, value), *((result.grads[key], g) for key, g in grads.items())]:
        assert (got - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize("mode", MODES)
def test_default_experts_in_float32(mode: str):
    """Against the experts of `mixtral`, which are a loop, in float64."""
    value, grads = right("mixtral")
    t = texts(functools.partial(mixtral, experts="grouped_mm"), 0.0)
    z = {key: entry.float() for key, entry in t.z.items()}
    f = mgd.TrainingFunction(
        t.model.float(),
        t.loss,
        t.batches,
        optimizer=t.optimizer,
        objective=t.objective,
        objective_mode="train",
        trace=MODES[mode],
    )
    result = f.metagradient(z)
    assert result.report.execution == ("eager" if mode == "eager" else "captured")
    for got, expected in [(result.value, value), *((result.grads[key], g) for key, g in grads.items())]:
        assert (got - expected).norm() <= 1e-5 * expected.norm()  # of float32; measured 6e-7
