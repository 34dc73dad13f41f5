"""Attention and cross-entropy by strips beside the paths that hold the matrix: value, gradient, second derivatives.

One thread pinned to one core, in alternation; ratios are of medians of processor time (`bench_functional.py`). Memory
is the growth of a process of its own.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench_functional import medians, one_pinned_thread
from torch import Tensor

from mgd_kernels import functional
from mgd_kernels.functional import attention as whole

__all__ = ["one_pinned_thread"]

# Query length, width of a head, causal: batch 1, 4 heads.
ATTENTION = [(1024, 64, False), (1024, 64, True), (4096, 64, False), (4096, 64, True)]
TOKENS, WIDTH, VOCABULARY = 2048, 256, 50_000


def second(function: Callable[..., Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> None:
    inputs = [x.detach().requires_grad_() for x in inputs]
    first = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
    torch.autograd.grad(first, inputs, cotangents)


def attention(length: int, width: int, causal: bool, strips: bool) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 4, length, width, generator=g) for _ in range(6)]
    whole.LARGE = 0 if strips else 1 << 62
    call = functools.partial(functional.scaled_dot_product_attention, is_causal=causal)
    second(lambda q, k, v: call(q, k, v).square().sum(), tensors[:3], tensors[3:])


def loss(strips: bool) -> None:
    g = torch.Generator().manual_seed(0)
    h, w, ch, cw = (torch.randn(n, WIDTH, generator=g) / 4 for n in (TOKENS, VOCABULARY) * 2)
    target = torch.randint(VOCABULARY, (TOKENS,), generator=g)
    held = lambda h, w: functional.cross_entropy(F.linear(h, w), target)
    second((lambda h, w: functional.linear_cross_entropy(h, w, target)) if strips else held, [h, w], [ch, cw])


def peak() -> int:
    """Of this process, in MB. Not `ru_maxrss`, which begins at the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10


def megabytes(function: Callable[..., None], *args: object) -> int:
    """By which a call grows a process that has done nothing else."""
    program = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
import bench_strips
torch.set_num_threads(1)
before = bench_strips.peak()
bench_strips.{function.__name__}(*{args!r})
print(bench_strips.peak() - before)
"""
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def compare(benchmark, rounds: int, function: Callable[..., None], *args: object) -> None:
    mine, held = (functools.partial(function, *args, strips) for strips in (True, False))
    seconds = medians(rounds, mine, held)
    memory = [megabytes(function, *args, strips) for strips in (True, False)]
    benchmark.extra_info.update(seconds=seconds, times_faster=seconds[1] / seconds[0], megabytes=memory)
    benchmark.pedantic(mine, rounds=1)
    assert memory[0] < memory[1]


@pytest.mark.parametrize(("length", "width", "causal"), ATTENTION)
def test_attention(benchmark, monkeypatch, length, width, causal):
    monkeypatch.setattr(whole, "LARGE", whole.LARGE)  # put back afterwards
    compare(benchmark, 5 if length < 2048 else 1, attention, length, width, causal)


def test_linear_cross_entropy(benchmark):
    compare(benchmark, 2, loss)
