"""What the fused operators do not serve goes to torch, and each is called as the function that it replaces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from operator_cases import CASES, every_case
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mgd_kernels import functional


def traced_operators(function, *inputs) -> set[str]:
    return {str(node.target) for node in make_fx(function)(*inputs).graph.nodes if node.op == "call_function"}


@every_case
def test_float64_is_torchs_own(name):
    case = CASES[name]
    if name.startswith(("linear_cross_entropy", "strips")):  # which serve float64
        return
    if name.startswith("batch_norm"):
        assert case.ours(*(x.double() for x in case.inputs)) is None
        return
    inputs = [x.double() for x in case.inputs]
    assert torch.equal(case.ours(*inputs), case.theirs(*inputs))


def test_other_modes_are_torchs_own():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, generator=g) for _ in range(3))
    mask = torch.rand(5, 5, generator=g) > 0.3
    image = torch.randn(2, 4, 3, 3, generator=g).contiguous(memory_format=torch.channels_last)
    logits, target = torch.randn(5, 3, generator=g), torch.tensor([0, 1, 2, 1, 0])
    weight = torch.rand(3, generator=g)
    for name, *args in (
        ("scaled_dot_product_attention", q, k, v, mask[:, :1]),
        ("scaled_dot_product_attention", q[0], k[0], v[0], mask),
        ("softmax", q, 1),
        ("gelu", image),
        ("group_norm", image, 2),
        ("group_norm", image[:, :, 0, 0], 2),
        ("cross_entropy", logits, target, weight),
        ("cross_entropy", logits, logits.softmax(-1)),
        ("cross_entropy", q, target[:2].new_zeros(2, 5, 4)),
        ("cross_entropy", logits, target, None, None, -100, None, "mean", 0.1),
        ("batch_norm", image, torch.zeros(4), torch.ones(4)),
        ("gelu", torch.empty(0, 3)),
        ("avg_pool2d", image, 2),
        ("avg_pool2d", image.contiguous(), 2),
        ("avg_pool2d", image.contiguous(), 3, 1, 1),
        ("avg_pool2d", torch.ones(2, 4, 4), (2, 2), None, 0, False, True, 3),
        ("avg_pool2d", torch.ones(2, 4, 4), (2, 1)),
    ):
        mine, torchs = getattr(functional, name), getattr(F, name)
        assert torch.equal(mine(*args), torchs(*args))
        tensor_arguments = [x for x in args if isinstance(x, Tensor)]
        found = traced_operators(lambda *_, f=mine, args=args: f(*args), *tensor_arguments)
        assert not any("mgd_kernels" in operator for operator in found), name


def test_attention_draws_the_dropout_that_torch_draws():
    q, mask = torch.randn(2, 3, 5, 4), torch.rand(2, 1, 5, 5) > 0.2
    found = []
    for function in (functional.scaled_dot_product_attention, F.scaled_dot_product_attention):
        torch.manual_seed(0)
        found.append(function(q, q, q, mask, 0.5))
    assert (found[0] != functional.scaled_dot_product_attention(q, q, q, mask)).any()
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_torch_func_and_autocast_go_to_torch():
    x = torch.linspace(-2, 2, 8)
    derivative = torch.func.vmap(torch.func.grad(torch.func.grad(functional.gelu)))
    expected = torch.func.vmap(torch.func.grad(torch.func.grad(F.gelu)))
    torch.testing.assert_close(derivative(x), expected(x))
    q = torch.randn(2, 3, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.scaled_dot_product_attention(q, q, q).dtype is torch.bfloat16


def test_replacements_have_the_signature_of_what_they_replace():
    x = torch.randn(2, 6, 8)
    for torchs, mine in functional.REPLACEMENTS.items():
        assert mine.__name__ == torchs.__name__
    assert torch.equal(functional.gelu(input=x, approximate="none"), functional.gelu(x))
    assert torch.equal(functional.silu(input=x, inplace=False), functional.silu(x))
    normalised = functional.layer_norm(input=x, normalized_shape=[8], weight=None, bias=None, eps=1e-3)
    torch.testing.assert_close(normalised, F.layer_norm(x, [8], eps=1e-3), rtol=1e-5, atol=1e-6)


def test_batch_norm_updates_running_statistics_as_torch_does():
    x, w, b = CASES["batch_norm-4x8x5x5"].inputs
    mine, torchs = ([torch.zeros(8), torch.ones(8)] for _ in range(2))
    y = functional.batch_norm(x, *mine, w, b, training=True, momentum=0.3, eps=1e-4)
    torch.testing.assert_close(y, F.batch_norm(x, *torchs, w, b, training=True, momentum=0.3, eps=1e-4))
    torch.testing.assert_close(mine, torchs)
