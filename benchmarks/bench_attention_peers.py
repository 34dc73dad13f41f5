"""Second derivatives of attention on a GPU, beside torch's math path and the packages that have them: FlashBoB (package
`bob`, arXiv 2609.24089, from its repository) and jvp_flash_attention. What is not installed, or fails, is left out.

The value, its gradient, and the derivative of `<gradient, cotangents>`: reverse over reverse, and for
jvp_flash_attention, which differentiates forwards, the gradient's tangent. bfloat16, batch 1, 8 heads; milliseconds
until the device is done, medians, in turns, and errors against float64, relative in norm. Never run on a GPU so far.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgd.bench import timing
from mgd_kernels import functional

# Length, width of a head, causal.
SHAPES = [(1024, 64, True), (4096, 64, False), (4096, 64, True), (4096, 128, True)]
HEADS = 8
Attention = Callable[..., Tensor]


def math(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def flashbob(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return importlib.import_module("bob").sdpa_bob(q, k, v, is_causal=causal)


def jvp_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn.fwd_dual(q, k, v, causal=causal)


def by_reverse(attention: Attention, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    first = torch.autograd.grad(attention(*inputs).float().square().sum(), inputs, create_graph=True)
    return torch.autograd.grad(first, inputs, cotangents)


def by_forward(attention: Attention, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same, since the Hessian is symmetric: the gradient's tangent along the cotangents."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), c) for x, c in zip(inputs, cotangents, strict=True)]
        duals = [x.requires_grad_() for x in duals]
        first = torch.autograd.grad(attention(*duals).float().square().sum(), duals)
        return tuple(forward_ad.unpack_dual(g).tangent for g in first)


PEERS: dict[str, tuple[Attention, Callable[..., tuple[Tensor, ...]]]] = {
    "mgd_kernels": (ours, by_reverse),
    "torch math": (math, by_reverse),
    "FlashBoB": (flashbob, by_reverse),
    "jvp_flash_attention": (jvp_flash, by_forward),
}


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    pairs = zip(found, exact, strict=True)
    return max(float((x.double() - y).norm() / y.norm()) for x, y in pairs)


def compare(
    device: str, length: int, width: int, causal: bool, rounds: int = 10, dtype: torch.dtype = torch.bfloat16
) -> dict[str, dict[str, float | str]]:
    """By the names of `PEERS`: milliseconds and error, or why there are none."""
    g = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(1, HEADS, length, width, generator=g, device=device).to(dtype) for _ in range(6)]
    doubles = [x.double() for x in tensors]
    exact = by_reverse(functools.partial(math, causal=causal), doubles[:3], doubles[3:])
    found: dict[str, dict[str, float | str]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name, (attention, differentiate) in PEERS.items():
        run = functools.partial(differentiate, functools.partial(attention, causal=causal), tensors[:3], tensors[3:])
        try:
            found[name] = {"error": error(run(), exact)}
        except Exception as why:  # whatever stops a peer is what is shown of it
            found[name] = {"why": f"{type(why).__name__}: {why}"[:200]}
        else:
            runs[name] = run
    times = [[timing.seconds_of(run, device=device) for run in runs.values()] for _ in range(rounds)]
    for name, seconds in zip(runs, zip(*times, strict=True), strict=True):
        found[name]["milliseconds"] = 1e3 * sorted(seconds)[len(seconds) // 2]
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(("length", "width", "causal"), SHAPES)
def test_second_derivatives(benchmark, length, width, causal):
    found = compare("cuda", length, width, causal)
    benchmark.extra_info.update(found)
    print(found)
    assert found["mgd_kernels"]["error"] <= 2 * found["torch math"]["error"]
    tensors = [torch.randn(1, HEADS, length, width, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
    run = functools.partial(by_reverse, functools.partial(ours, causal=causal), tensors[:3], tensors[3:])
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
