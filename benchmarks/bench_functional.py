"""The operators with fused second derivatives against torch's own: each alone, and in whole Hessian-vector products.

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

from mgd.autodiff.accumulation import accumulate_products
from mgd.autodiff.graphs import clean
from mgd.autodiff.second_order import Point, leaves, reverse_over_reverse
from mgd.bench.workloads import WORKLOADS
from mgd.step.model import Binding, differentiable
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


def workload(name: str, fused: bool):
    """The training gradient, and the graph of the Hessian-vector product with its inputs."""
    torch.manual_seed(0)
    w = WORKLOADS[name]()
    binding, batch = Binding(w.model, fused=fused), w.batches[0]
    parameters = [p.detach() for p in binding.parameters().values()]
    buffers = binding.buffers()
    names = differentiable(buffers)
    floats, weights = [buffers[n] for n in names], torch.ones(len(batch[0]))

    def evaluate(p, b, z, constants):
        own = {n: x.clone() for n, x in buffers.items() if n not in names} | dict(zip(names, b, strict=True))
        loss, left = binding.call(w.loss, p, own, batch, {"data_weights": z[0]})
        return loss, [left[n] for n in names]

    def train():
        q = leaves(parameters)
        loss, _ = evaluate(q, [x.clone() for x in floats], [weights], [])
        return torch.autograd.grad(loss, q)

    def product(p, b, z, u, a):
        loss, (found,) = reverse_over_reverse(evaluate, Point(p, b, [z], [], [u], [a]), lambda: None)
        return loss, *(x for x in found if x is not None)

    directions, cotangents = [torch.randn_like(p) for p in parameters], [torch.randn_like(b) for b in floats]
    inputs = (parameters, floats, weights, directions, cotangents)
    return train, lambda: clean(make_fx(product)(*inputs)), inputs


@pytest.mark.parametrize("name", ["mlp", "convnet-group", "convnet-batch", "gpt"])
def test_hessian_vector_product(benchmark, name):
    """Ratios to one eager training gradient by torch."""
    train, trace, inputs = workload(name, fused=False)
    _, trace_fused, _ = workload(name, fused=True)
    plain, fused, accumulated = trace(), trace_fused(), accumulate_products(trace_fused())
    graphs = [lambda graph=graph: graph(*inputs) for graph in (plain, fused, accumulated)]
    base, *seconds = medians(9, train, *graphs)
    for got, value in zip(graphs[2](), graphs[0](), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))
    ratios = dict(zip(("torch", "fused", "fused_and_accumulated"), (x / base for x in seconds), strict=True))
    nodes = [len(graph.graph.nodes) for graph in (plain, fused, accumulated)]
    benchmark.extra_info.update(training_gradient_seconds=base, nodes=nodes, **ratios)
    benchmark.pedantic(graphs[2], rounds=3)
    assert ratios["fused_and_accumulated"] < ratios["torch"]
