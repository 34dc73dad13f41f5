"""Stock models of transformers and peft, from their configurations with random weights: what people train.

Every loss is a user's: logits of the model, cross-entropy by `torch.nn.functional`, its mean over an example's tokens
that are no padding, weighted by example. Sizes are such that a training step takes about 0.1 s on one core.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd.bench.workload import Workload, choices
from mgd.errors import MissingPackage
from mgd_kernels import SGD, AdamW, Optimizer

PAD, MASK, WORDS = 0, 1, 2  # tokens; those from WORDS on are words
IGNORED = -100  # the label of what has no loss, as in transformers and torch
CLASSES = 10  # of images
HELD_OUT = 16  # examples of the objective


@dataclass(frozen=True)
class Size:
    """layers, width, heads: of the model; a layer of a ResNet is a stage. length: tokens of a text. side: of a square
    image, in pixels. batch, examples: numbers of examples in a batch and in all."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    vocabulary: int = 1000
    length: int = 64
    side: int = 32
    batch: int = 8
    examples: int = 128


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage("workloads of stock models", name, "test") from error


# --- models of a size; rates: of dropout, where they are not the architecture's defaults ----------------------------


def _layers(s: Size) -> dict[str, int]:
    return {
        "hidden_size": s.width,
        "intermediate_size": 4 * s.width,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
    }


def _decoder(s: Size) -> dict[str, int]:
    """Of a decoder as Llama's: a feed-forward layer has three matrices, two heads of queries share their keys."""
    own = {"intermediate_size": 2 * s.width, "num_key_value_heads": s.heads // 2}
    return _layers(s) | own | {"vocab_size": s.vocabulary, "max_position_embeddings": s.length}


def gpt2(s: Size, **rates: float) -> nn.Module:
    t = _library("transformers")
    sizes = {"n_embd": s.width, "n_layer": s.layers, "n_head": s.heads, "n_positions": s.length}
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=s.vocabulary, **sizes, **rates))


def bert(s: Size, **rates: float) -> nn.Module:
    t = _library("transformers")
    sizes = _layers(s) | {"vocab_size": s.vocabulary, "max_position_embeddings": s.length}
    return t.BertForMaskedLM(t.BertConfig(**sizes, **rates))


def t5(s: Size, **rates: float) -> nn.Module:
    """Half of the layers in the encoder, half in the decoder."""
    t = _library("transformers")
    sizes = {"d_model": s.width, "d_kv": s.width // s.heads, "d_ff": 4 * s.width, "num_heads": s.heads}
    tokens = {"vocab_size": s.vocabulary, "decoder_start_token_id": PAD, "pad_token_id": PAD}
    return t.T5ForConditionalGeneration(t.T5Config(**sizes, **tokens, num_layers=max(1, s.layers // 2), **rates))


def llama(s: Size) -> nn.Module:
    t = _library("transformers")
    return t.LlamaForCausalLM(t.LlamaConfig(**_decoder(s)))


def llama_lora(s: Size) -> nn.Module:
    """LoRA of rank 8 on the four projections of every attention; the rest is frozen."""
    peft = _library("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return peft.get_peft_model(llama(s), peft.LoraConfig(r=8, target_modules=targets))


def mixtral(s: Size) -> nn.Module:
    """Of 4 experts each token visits 2."""
    t = _library("transformers")
    return t.MixtralForCausalLM(t.MixtralConfig(**_decoder(s), num_local_experts=4, num_experts_per_tok=2))


def vit(s: Size) -> nn.Module:
    t = _library("transformers")
    return t.ViTForImageClassification(
        t.ViTConfig(**_layers(s), image_size=s.side, patch_size=s.side // 8, num_labels=CLASSES)
    )


def resnet(s: Size) -> nn.Module:
    """Stages of one block each, the last of the given width."""
    t = _library("transformers")
    widths = [s.width >> i for i in reversed(range(s.layers))]
    config = t.ResNetConfig(
        embedding_size=widths[0], hidden_sizes=widths, depths=[1] * s.layers, layer_type="basic", num_labels=CLASSES
    )
    return t.ResNetForImageClassification(config)


# --- data: of all examples, the inputs of the model and the labels of its logits -------------------------------------

Data = dict[str, Tensor]


def _padded(s: Size, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random texts from half to all of the length, padded at the right: tokens, and the mask of what is no padding."""
    tokens = torch.randint(WORDS, s.vocabulary, (s.examples, s.length), generator=g)
    lengths = torch.randint(s.length // 2, s.length + 1, (s.examples, 1), generator=g)
    mask = torch.arange(s.length) < lengths
    return tokens.masked_fill(~mask, PAD), mask


def continued(s: Size, g: torch.Generator) -> Data:
    """Each token's label is the next one."""
    tokens, mask = _padded(s, g)
    following = tokens.masked_fill(~mask, IGNORED).roll(-1, 1)
    following[:, -1] = IGNORED
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": following}


def masked(s: Size, g: torch.Generator) -> Data:
    """Of each text the first token and about 15% of the others are masked, and to be found."""
    tokens, mask = _padded(s, g)
    hidden = mask & (torch.rand(mask.shape, generator=g) < 0.15)
    hidden[:, 0] = True
    labels = tokens.masked_fill(~hidden, IGNORED)
    return {"input_ids": tokens.masked_fill(hidden, MASK), "attention_mask": mask.long(), "labels": labels}


def translated(s: Size, g: torch.Generator) -> Data:
    """Another text of the same lengths is to be written, each token after those before it."""
    (tokens, mask), (others, kept) = _padded(s, g), _padded(s, g)
    before = others.roll(1, 1)
    before[:, 0] = PAD
    return {
        "input_ids": tokens,
        "attention_mask": mask.long(),
        "decoder_input_ids": before,
        "labels": others.masked_fill(~kept, IGNORED),
    }


def images(s: Size, g: torch.Generator) -> Data:
    pixels = torch.randn(s.examples, 3, s.side, s.side, generator=g)
    return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (s.examples,), generator=g)}


# --- workloads -------------------------------------------------------------------------------------------------------


def _losses(model: nn.Module, batch: Data) -> Tensor:
    """The losses `[B]` of a batch; tokens of one example are averaged."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "index")}
    labels = batch["labels"]
    logits = model(**inputs).logits
    each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(len(labels), -1)
    return each.sum(1) / (labels != IGNORED).view(len(labels), -1).sum(1)


_ADAMW = partial(AdamW, lr=1e-3, eps_root=1e-8, weight_decay=0.01)
# LoRA's first matrices have no gradient at first: a larger eps_root keeps rounding small there.
_LORA = partial(AdamW, lr=1e-3, eps_root=1e-6, weight_decay=0.01)
# At ten times this rate float32 metagradients are far from float64, by plain torch as well (3% after 5 steps).
_SGD = partial(SGD, lr=0.005, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class Stock:
    """model, data: see above. dropout: the arguments of the model that are rates of dropout. size: of the benchmark.
    optimizer: makes it."""

    model: Callable[..., nn.Module]
    data: Callable[[Size, torch.Generator], Data]
    dropout: tuple[str, ...] = ()
    size: Size = Size()
    optimizer: Callable[[], Optimizer] = _ADAMW


STOCK: dict[str, Stock] = {
    "gpt2": Stock(gpt2, continued, ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
    "llama": Stock(llama, continued),
    "bert": Stock(bert, masked, ("hidden_dropout_prob", "attention_probs_dropout_prob")),
    "t5": Stock(t5, translated, ("dropout_rate",)),
    "vit": Stock(vit, images),
    "resnet": Stock(resnet, images, size=Size(side=64, batch=32), optimizer=_SGD),
    "llama-lora": Stock(llama_lora, continued, optimizer=_LORA),
    "mixtral": Stock(mixtral, continued),
}


def stock(name: str, dropout: bool = True, steps: int = 40, seed: int = 0, size: Size | None = None) -> Workload:
    """The stock model `name` of STOCK. dropout: as the architecture has it by default (False: none)."""
    of = STOCK[name]
    s = size or of.size
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = of.model(s, **({} if dropout else dict.fromkeys(of.dropout, 0.0))).train()
    data = of.data(s, g) | {"index": torch.arange(s.examples)}
    chosen = [torch.arange(min(HELD_OUT, s.examples)), *choices(s.examples, s.batch, steps, g)]
    held_out, *batches = [{key: tensor[i] for key, tensor in data.items()} for i in chosen]
    return Workload(name, model, batches, _losses, lambda batch: batch["index"], held_out, of.optimizer(), s.examples)


NAMES: dict[str, Callable[..., Workload]] = {
    **{name: partial(stock, name) for name in STOCK},
    **{f"{name}-no-dropout": partial(stock, name, False) for name, of in STOCK.items() if of.dropout},
}
