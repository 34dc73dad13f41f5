"""Where the drop-in is better than TorchOpt: derivatives of its own fused operator, memory and precision."""

from __future__ import annotations

import pytest
import torch
from torchopt_cases import float64_default, torchopt  # noqa: F401

from mgd_kernels import buffers
from mgd_kernels.integrations import torchopt as fused

# --- Where TorchOpt's own fused operator is wrong -----------------------------------------------------------------


def adam_vjp(module, m, v, g, eps_root, **settings):
    """The update of step 3 and its VJP with respect to the moments and the gradient."""
    m, v, g = (t.clone().requires_grad_() for t in (m, v, g))
    transformation = module.adam(1.0, eps_root=eps_root, **settings)
    head, *rest = transformation.init([m])
    count = [torch.tensor(2)] if module is torchopt else torch.tensor([2])
    state = (head._replace(mu=[m], nu=[v], count=count), *rest)
    (update,), _ = transformation.update([g], state, params=[m], inplace=False)
    cotangent = torch.linspace(-1, 1, m.numel())
    return update, *torch.autograd.grad(update, [m, v, g], cotangent)


def test_second_moment_with_eps_root():
    torch.manual_seed(6)
    m, v, g = torch.randn(64), 1e-2 * torch.rand(64), 0.1 * torch.randn(64)
    expected, found = adam_vjp(torchopt, m, v, g, 1e-2), adam_vjp(fused, m, v, g, 1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    accelerated = adam_vjp(torchopt, m, v, g, 1e-2, use_accelerated_op=True)
    assert (accelerated[2] / expected[2]).max() < 0.5  # TorchOpt's fault: less than half of the derivative


def test_first_moment_where_it_vanishes():
    torch.manual_seed(7)
    zero, v = torch.zeros(64), 1e-2 * torch.rand(64)
    expected, found = adam_vjp(torchopt, zero, v, zero, 1e-2), adam_vjp(fused, zero, v, zero, 1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    accelerated = adam_vjp(torchopt, zero, v, zero, 1e-2, use_accelerated_op=True)
    assert expected[1].abs().max() > 1 and accelerated[1].abs().max() == 0  # TorchOpt's fault: dropped


@pytest.mark.parametrize("n", [1023, 1024, 1025, 1026, 1027, 4099])
def test_lengths_around_a_block(n):
    torch.manual_seed(n)
    m, v, g = torch.randn(n), torch.rand(n), torch.randn(n)
    torch.testing.assert_close(adam_vjp(fused, m, v, g, 0.0), adam_vjp(torchopt, m, v, g, 0.0), rtol=1e-11, atol=1e-13)


# --- Memory and precision -----------------------------------------------------------------------------------------


def saved_tensors(transformation, numel, steps, lr=None):
    """How many tensors of the parameters' size the graph saves a step, each as often as it is saved."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel()
        return tensor

    params = [torch.randn(numel, requires_grad=True)]
    state = transformation.init(params)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for _ in range(steps):
            grads = [0.5 * p + 1 for p in params]  # saves nothing
            updates, state = transformation.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
    return round(total / numel / steps, 2)


def test_the_graph_holds_what_the_vjp_reads_and_no_more():
    n = 20_000
    assert saved_tensors(fused.adamw(1e-3), n, 3) == 3  # gradient and two moments
    assert saved_tensors(torchopt.adamw(1e-3), n, 3) == 5
    assert saved_tensors(torchopt.adamw(1e-3, use_accelerated_op=True), n, 3) == 7
    assert saved_tensors(fused.sgd(1e-3, momentum=0.9), n, 3) == 0  # a linear rule
    lr = torch.tensor(1e-3, requires_grad=True)
    assert saved_tensors(fused.adamw(lr), n, 3) == 4  # the decayed parameters too
    assert saved_tensors(torchopt.adamw(lambda count: lr), n, 3) == 6


def test_the_update_is_as_precise_as_it_can_be():
    """Small updates of large parameters: `new - old` would keep three digits of them."""
    torch.manual_seed(8)
    n, settings = 4096, {"lr": 1e-6, "eps_root": 1e-8, "weight_decay": 0.01}
    params, m, v, g = 10 * torch.randn(n), torch.randn(n), torch.rand(n), torch.randn(n)

    def update(dtype):
        p = [params.float().to(dtype)]
        state = (fused.AdamState([m.float().to(dtype)], [v.float().to(dtype)], torch.tensor([4])),)
        return fused.adamw(**settings).update([g.float().to(dtype)], state, params=p, inplace=False)[0][0]

    exact, found = update(torch.float64), update(torch.float32).double()
    # A handful of float32 roundings (2^-24 = 6e-8 each) of terms no larger than the update's own.
    scale = exact.abs() + 1e-6 * 0.01 * params.abs()
    assert ((found - exact).abs() / scale).max() < 8 * 2**-24
    p = params.float()
    subtracted = ((p + found.float()) - p).double()
    assert ((subtracted - exact).abs() / scale).median() > 1e-3


def test_moments_of_16_bit_parameters_are_float32():
    torch.manual_seed(9)
    params = [torch.randn(300, dtype=torch.bfloat16, requires_grad=True)]
    grads = [torch.randn(300, dtype=torch.bfloat16, requires_grad=True)]
    transformation = fused.adamw(1e-2, eps_root=1e-6)
    updates, (state,) = transformation.update(grads, transformation.init(params), params=params, inplace=False)
    assert updates[0].dtype == torch.bfloat16 and state.mu[0].dtype == torch.float32
    torch.testing.assert_close(state.mu[0].double(), 0.1 * grads[0].double(), rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad(updates[0].double().sum() + state.mu[0].sum(), grads)
    g = grads[0].detach().double()
    wide = g.clone().requires_grad_()
    expected = -1e-2 * wide / ((wide**2 + 1e-6).sqrt() + 1e-8) + 0.1 * wide
    (expected,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)  # half a unit of bfloat16


def test_buffers_come_back_when_the_last_tensor_is_gone():
    buffers.release()
    size = buffers.SMALLEST // 8 + 5
    first = buffers.empty(size, torch.float64, torch.device("cpu"))
    address, view = first.data_ptr(), first[3:].view(-1)
    other = buffers.empty(size, torch.float64, torch.device("cpu"))
    assert other.data_ptr() != address and buffers.free_bytes() == 0
    del first
    assert buffers.free_bytes() == 0  # the view still lives
    del view
    assert buffers.free_bytes() == 8 * size
    assert buffers.empty(size, torch.float64, torch.device("cpu")).data_ptr() == address
    buffers.release()
    assert buffers.free_bytes() == 0


def test_an_unrolled_loop_in_recycled_memory_repeats_itself_bit_for_bit():
    buffers.release()
    lengths = [300_000, 150_001]

    def run():
        torch.manual_seed(10)
        params = start = [torch.randn(n, requires_grad=True) for n in lengths]
        transformation = fused.adamw(1e-2, eps_root=1e-6)
        state = transformation.init(params)
        for _ in range(3):
            grads = [p.sin() for p in params]
            updates, state = transformation.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return torch.autograd.grad(sum((p**2).sum() for p in params), start)

    first = [g.clone() for g in run()]
    assert buffers.free_bytes() > 0
    for _ in range(2):
        torch.testing.assert_close(list(run()), first, rtol=0, atol=0)
    buffers.release()
