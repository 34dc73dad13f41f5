"""Operators with fused second derivatives beside torch's own, and how their derivatives are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_kernels import functional
from mgd_kernels.functional.attention_strips import attention

EPS = torch.finfo(torch.float32).eps


@dataclass
class Case:
    """ours, theirs: functions of the inputs, one fused and one torch's. nodes: operators a call is traced to."""

    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    theirs: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]
    operator: str


def torchs_batch_norm(x, w=None, b=None):
    variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1])
    return F.batch_norm(x, None, None, w, b, True), mean, variance


def written_out_rotary(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def cases() -> dict[str, Case]:
    """Sizes that are and are not multiples of 4, 8 and 16 lanes, below one register, beyond a block of rows."""
    g = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0, shift=0.0):
        return scale * torch.randn(*shape, generator=g) + shift

    found = {}
    for n in (1, 15, 16, 1037):
        x = [random(n, scale=3)]
        found |= {
            f"gelu-{n}": Case(functional.gelu, F.gelu, x, "activation"),
            f"gelu_tanh-{n}": Case(
                lambda x: functional.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), x, "activation"
            ),
            f"silu-{n}": Case(functional.silu, F.silu, x, "activation"),
            f"tanh-{n}": Case(functional.tanh, torch.tanh, x, "activation"),
            f"sigmoid-{n}": Case(functional.sigmoid, torch.sigmoid, x, "activation"),
        }
    for shape, inner in (((5, 3), 1), ((130, 40), 1), ((3, 2, 77), 1), ((4, 3, 11), 2)):
        tail = shape[-inner:]

        def layer_norm(function, tail=tail):
            return lambda x, w=None, b=None: function(x, tail, w, b)

        pair = layer_norm(functional.layer_norm), layer_norm(F.layer_norm)
        inputs = [random(*shape, scale=2, shift=1), random(*tail), random(*tail)]
        name = "x".join(map(str, shape))
        found[f"layer_norm-{name}"] = Case(*pair, inputs, "layer_norm")
        found[f"layer_norm-{name}-plain"] = Case(*pair, inputs[:1], "layer_norm")
        pair = [lambda x, w=None, f=f, tail=tail: f(x, tail, w, 0.1) for f in (functional.rms_norm, F.rms_norm)]
        found[f"rms_norm-{name}"] = Case(*pair, inputs[:2], "rms_norm")
        found[f"rms_norm-{name}-plain"] = Case(*pair, inputs[:1], "rms_norm")
    for shape in ((4, 8, 5, 5), (2, 4, 16), (3, 12, 2, 3, 3), (70, 4, 2, 2)):
        inputs = [random(*shape, scale=2, shift=3), random(shape[1]), random(shape[1])]
        pair = [lambda x, w=None, b=None, f=f: f(x, 4, w, b) for f in (functional.group_norm, F.group_norm)]
        name = "x".join(map(str, shape))
        found[f"group_norm-{name}"] = Case(*pair, inputs, "group_norm")
        found[f"batch_norm-{name}"] = Case(
            functional.batch_norm_with_statistics, torchs_batch_norm, inputs, "batch_norm"
        )
    found["group_norm-plain"] = Case(*pair, inputs[:1], "group_norm")
    found["batch_norm-plain"] = Case(functional.batch_norm_with_statistics, torchs_batch_norm, inputs[:1], "batch_norm")
    for shape in ((3, 5), (2, 7, 33), (40, 64)):
        pair = [lambda x, f=f: f(x, -1) for f in (functional.softmax, F.softmax)]
        found["softmax-" + "x".join(map(str, shape))] = Case(*pair, [random(*shape, scale=3)], "softmax")
    for causal, rows, columns in ((False, 5, 9), (True, 33, 33), (True, 6, 20), (True, 20, 6)):
        pair = [
            lambda q, k, v, f=f, causal=causal: f(q, k, v, is_causal=causal, scale=0.4)
            for f in (functional.scaled_dot_product_attention, F.scaled_dot_product_attention)
        ]
        inputs = [random(2, 3, rows, 8), random(2, 3, columns, 8), random(2, 3, columns, 4)]
        found[f"attention-{rows}x{columns}-{causal}"] = Case(*pair, inputs, "softmax")
    pair = [
        lambda q, k, v: attention(q, k, v, None, 0.4, 0, None, 0.0),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4, enable_gqa=True),
    ]
    inputs = [random(2, 6, 150, 8), random(2, 3, 140, 8), random(2, 3, 140, 4)]
    found["strips-150x140"] = Case(*pair, inputs, "attention")
    for kind, shape in (("seen", (2, 1, 5, 9)), ("seen", (7, 40)), ("added", (1, 3, 5, 9)), ("added", (2, 3, 1, 33))):
        rows, columns = 5 if shape[-2] == 1 else shape[-2], shape[-1]
        inputs = [random(2, 3, rows, 8), random(2, 3, columns, 8), random(2, 3, columns, 4)]
        mask = random(*shape)
        if kind == "added":
            inputs.append(mask)
        else:
            mask = mask > 0
            mask[..., 0, :] = False  # a row that sees nothing
        pair = [
            lambda q, k, v, mask=mask, f=f: f(q, k, v, attn_mask=mask if mask.dtype is torch.bool else mask.to(q.dtype))
            for f in (functional.scaled_dot_product_attention, F.scaled_dot_product_attention)
        ]
        found[f"attention-{kind}-" + "x".join(map(str, shape))] = Case(*pair, inputs, "softmax")
    for (batch, heads, length, width), own in (((2, 3, 5, 8), 1), ((3, 1, 7, 34), 3), ((1, 2, 9, 96), 1)):
        angles = [random(own, 1, length, width) for _ in range(2)]
        inputs = [random(batch, heads, length, width), *angles]
        name = "x".join(map(str, inputs[0].shape))
        found[f"rotary-{name}"] = Case(functional.rotary, written_out_rotary, inputs, "rotary")
    for shape in ((2, 3, 6, 8), (5, 2, 34), (1, 1, 2, 2)):
        pair = [lambda x, f=f: f(x, 2) for f in (functional.avg_pool2d, F.avg_pool2d)]
        found["avg_pool-" + "x".join(map(str, shape))] = Case(*pair, [random(*shape)], "avg_pool2x2")
    for reduction, classes in (("none", 37), ("mean", 16), ("sum", 5)):
        target = torch.randint(classes, (50,), generator=g)
        target[7] = -100
        pair = [
            lambda x, f=f, target=target, reduction=reduction: f(x, target, reduction=reduction)
            for f in (functional.cross_entropy, F.cross_entropy)
        ]
        found[f"cross_entropy-{reduction}"] = Case(*pair, [random(50, classes, scale=3)], "cross_entropy")
    target = torch.randint(37, (50,), generator=g)
    target[7] = -100
    for name, options in LINEAR_LOSSES.items():
        pair = [lambda h, w, b=None, f=f, o=options: f(h, w, target, b, **o) for f in (linear_loss, plain_linear_loss)]
        inputs = [random(50, 9), random(37, 9), random(37)]
        operator = "linear_cross_entropy" if options.get("reduction") == "none" else "linear_cross_entropy_total"
        found[f"linear_cross_entropy-{name}"] = Case(*pair, inputs, operator)
    found["linear_cross_entropy-no-bias"] = Case(*pair, inputs[:2], "linear_cross_entropy")
    return found


LINEAR_LOSSES: dict[str, dict] = {
    "mean": {},
    "sum": dict(reduction="sum", label_smoothing=0.1),
    "cap": dict(reduction="none", softcap=2.0, label_smoothing=0.2),
    "z-loss": dict(z_loss=0.01),
    "all": dict(reduction="none", z_loss=0.02, softcap=3.0, label_smoothing=0.1),
}
linear_loss = functional.linear_cross_entropy


def plain_linear_loss(
    h, weight, target, bias=None, *, reduction="mean", label_smoothing=0.0, z_loss=0.0, softcap=None, ignore_index=-100
):
    """In torch's operators, with the logits in memory."""
    z = F.linear(h, weight, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, target, None, None, ignore_index, None, "none", label_smoothing)
    seen = target != ignore_index
    losses = losses + z_loss * z.logsumexp(-1).square() * seen
    return losses if reduction == "none" else losses.sum() / (seen.sum() if reduction == "mean" else 1)


def plain_norm(name: str) -> Callable[..., Tensor | tuple[Tensor, ...]] | None:
    """The norm of a case in plain arithmetic, for derivatives of any order; None for what is no norm."""
    dims = {"layer_norm-4x3x11": [1, 2], "layer_norm": [-1], "batch_norm": [0, 2, 3], "group_norm": [2]}
    found = next((found for kind, found in dims.items() if name.startswith(kind)), None)

    def function(x, w=None, b=None):
        sets = x.reshape(x.shape[0], 4, -1) if name.startswith("group") else x
        centred = sets - sets.mean(found, keepdim=True)
        variance = centred.square().mean(found, keepdim=True)
        y = (centred * (variance + 1e-5).rsqrt()).view(x.shape)
        shape = [-1] if name.startswith("layer") else [-1, *[1] * (x.ndim - 2)]
        y = y if w is None else y * w.view(shape) + b.view(shape)
        count = x.numel() // x.shape[1]
        if not name.startswith("batch"):
            return y
        return y, x.mean(found), variance.flatten() * (count / (count - 1))

    return function if found else None


CASES = cases()
# One a kind, for tests of the machinery.
SAMPLES = [
    "gelu-15",
    "layer_norm-3x2x77",
    "rms_norm-3x2x77",
    "group_norm-4x8x5x5",
    "batch_norm-4x8x5x5",
    "softmax-2x7x33",
    "attention-33x33-True",
    "attention-added-1x3x5x9",
    "cross_entropy-mean",
    "linear_cross_entropy-all",
    "linear_cross_entropy-mean",
    "strips-150x140",
]
every_case = pytest.mark.parametrize("name", CASES)
every_sample = pytest.mark.parametrize("name", SAMPLES)


def tensors(outputs) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def random_like(like: list[Tensor], seed: int) -> list[Tensor]:
    g = np.random.default_rng(seed)  # not torch's: a trace would record the draw
    return [torch.from_numpy(g.standard_normal(tuple(x.shape)).astype(np.float32)).to(x.dtype) for x in like]


def derivatives(function, inputs: list[Tensor], dtype=torch.float32, keep_layout=False) -> list[Tensor]:
    """The values, the gradients in a random direction, and the gradients of <gradients, u> + <values, a> with respect
    to the inputs and that direction."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    values = tensors(function(*inputs))
    gy = [x.requires_grad_() for x in random_like(values, 1)]
    first = torch.autograd.grad(values, inputs, gy, create_graph=True)
    cotangents = random_like(list(first), 2) + random_like(values, 3)
    second = torch.autograd.grad([*first, *values], [*gy, *inputs], cotangents, materialize_grads=True)
    return [x.detach() for x in (*values, *first, *second)]


def check_against_float64(case: Case) -> None:
    """Errors relative to the largest value: at most twice torch's own, or 8 roundings, whichever is more. A result here
    is a handful of rounded operations, and torch's error is often 0 or 1 rounding by luck."""
    exact = derivatives(case.theirs, case.inputs, torch.float64)
    plain = derivatives(case.theirs, case.inputs)
    for i, (mine, torchs, value) in enumerate(zip(derivatives(case.ours, case.inputs), plain, exact, strict=True)):
        assert mine.shape == value.shape and mine.dtype is torch.float32
        scale = value.abs().max().clamp(min=1e-20)
        error, allowed = ((x - value).abs().max() / scale for x in (mine, torchs))
        few = (
            8 * EPS if value.numel() > 1 else 100 * EPS
        )  # a scalar is a sum of up to a hundred terms, which may cancel
        assert error <= max(2 * allowed, few), (i, float(error), float(allowed))
