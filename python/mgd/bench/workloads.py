"""The workloads of every benchmark: float32, metaparameters lr [T], weight decay, data weights [n].

Data is random: the time of dense training does not depend on it, and a benchmark must run anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from mgd.bench import workloads_stock
from mgd.bench.workload import Workload, build
from mgd.recipes.models.gpt import GPT
from mgd.recipes.models.resnet import resnet9
from mgd_kernels import SGD, AdamW


def adamw() -> AdamW:
    return AdamW(lr=1e-3, eps_root=1e-8, weight_decay=0.01)


def mlp(steps: int = 64, seed: int = 0) -> Workload:
    """(a) 784-512-512-10 with GELU, batch 128, AdamW."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10))
    x, y = torch.randn(2048, 784, generator=g), torch.randint(10, (2048,), generator=g)
    return build("mlp", model, x, y, 128, steps, adamw(), g)


def convnet(norm: str = "group", steps: int = 32, width: int = 16, seed: int = 0) -> Workload:
    """(b) ResNet-9-style network for 32x32x3 images, batch 64, SGD with momentum."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(1024, 3, 32, 32, generator=g), torch.randint(10, (1024,), generator=g)
    optimizer = SGD(lr=0.05, momentum=0.9, weight_decay=5e-4)
    return build(f"convnet-{norm}", resnet9(norm, width), x, y, 64, steps, optimizer, g)


def gpt(steps: int = 32, seed: int = 0) -> Workload:
    """(c) GPT, 4 layers, width 128, 4 heads, sequence 64, batch 16, vocabulary 256, AdamW."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, (512, 65), generator=g)
    return build("gpt", GPT(), tokens[:, :-1], tokens[:, 1:].contiguous(), 16, steps, adamw(), g)


def lora(steps: int = 24, seed: int = 0) -> Workload:
    """(d) LoRA of a sentence encoder: see `mgd.bench.workloads_lora`."""
    from mgd.bench.workloads_lora import lora

    return lora(steps, seed)


def smollm2(steps: int = 16, seed: int = 0) -> Workload:
    """(e) Full fine-tuning of SmolLM2-135M: see `mgd.bench.workloads_smollm2`."""
    from mgd.bench.workloads_smollm2 import smollm2

    return smollm2(steps, seed)


def small(steps: int = 64, seed: int = 0) -> Workload:
    """64-128-128-10 with GELU, batch 32, AdamW: steps of a millisecond, for long trainings."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    x, y = torch.randn(1024, 64, generator=g), torch.randint(10, (1024,), generator=g)
    return build("small", model, x, y, 32, steps, adamw(), g)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "mlp": mlp,
    "convnet-group": partial(convnet, "group"),
    "convnet-batch": partial(convnet, "batch"),
    "gpt": gpt,
    "lora": lora,
    "smollm2": smollm2,
    "small": small,
    **workloads_stock.NAMES,
}
