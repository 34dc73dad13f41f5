"""The operators with fused second derivatives against torch's own.

One thread pinned to one core (`make bench`). What is timed are traced graphs (`make_fx`, dead code eliminated), run in
alternation; ratios are of medians of processor time, which other processes disturb least.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgd.autodiff.graphs import clean
from mgd.autodiff.second_order import leaves
from mgd_kernels import functional


@pytest.fixture(autouse=True)
def one_pinned_thread():
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(cores)})
    with sdpa_kernel(SDPBackend.MATH):
        yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


def medians(rounds: int, *functions: Callable[[], object]) -> list[float]:
    """Seconds of processor time of each, all of them run in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, found in zip(functions, times, strict=True):
            start = time.process_time()
            function()
            found.append(time.process_time() - start)
    return [statistics.median(found[1:]) for found in times]


# Name: a call with the function left open, and the inputs' shapes.
_CASES: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    "gelu": (lambda f, x: f(x), [(1024, 512)]),
    "silu": (lambda f, x: f(x), [(1024, 512)]),
    "layer_norm": (lambda f, x, w, b: f(x, (128,), w, b), [(1024, 128), (128,), (128,)]),
    "group_norm": (lambda f, x, w, b: f(x, 4, w, b), [(64, 32, 16, 16), (32,), (32,)]),
    "batch_norm": (lambda f, x, w, b: f(x, None, None, w, b, True), [(64, 32, 16, 16), (32,), (32,)]),
    "scaled_dot_product_attention": (lambda f, q, k, v: f(q, k, v, is_causal=True), [(16, 4, 64, 32)] * 3),
    "cross_entropy": (lambda f, x: f(x, torch.arange(1024) % 256), [(1024, 256)]),
    "max_pool2d": (lambda f, x: f(x, 3, 2, 1), [(32, 16, 32, 32)]),
}


def second(function: Callable, tensors: list[Tensor], directions: list[Tensor]) -> tuple[Tensor, ...]:
    """Value, and the gradients of <gradients, directions>."""
    inputs = leaves(tensors)
    y = function(*inputs)
    gy = torch.ones_like(y).requires_grad_()
    first = torch.autograd.grad(y, inputs, gy, create_graph=True)
    return y.detach(), *torch.autograd.grad(first, [*inputs, gy], directions, materialize_grads=True)


@pytest.mark.parametrize("name", _CASES)
def test_operator(benchmark, name):
    call, shapes = _CASES[name]
    args = [[torch.randn(shape) for shape in shapes] for _ in range(2)]
    functions = [functools.partial(call, getattr(module, name)) for module in (functional, F)]
    graphs = [clean(make_fx(functools.partial(second, f))(*args)) for f in functions]
    mine, torchs = medians(15, *[lambda graph=graph: graph(*args) for graph in graphs])
    for got, value in zip(graphs[0](*args), graphs[1](*args), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4 * max(1, float(value.abs().max())))
    benchmark.extra_info.update(shapes=shapes, seconds=mine, torch_seconds=torchs, speedup=torchs / mine)
    benchmark.pedantic(graphs[0], args, rounds=3)
    assert torchs > mine
