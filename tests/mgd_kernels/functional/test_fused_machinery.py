"""Operators with fused second derivatives under torch's machinery: layouts, traces, batches, threads, opcheck."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from operator_cases import CASES, derivatives, every_sample, random_like, tensors
from torch.fx.experimental.proxy_tensor import make_fx

from mgd_kernels import functional
from mgd_kernels.errors import BadArgument

ops = torch.ops.mgd_kernels


@every_sample
def test_non_contiguous_inputs(name):
    case = CASES[name]
    spread = [torch.stack([x, torch.zeros_like(x)], -1)[..., 0] for x in case.inputs]
    assert not any(x.is_contiguous() for x in spread if x.numel() > 1)
    for got, value in zip(derivatives(case.ours, spread), derivatives(case.ours, case.inputs), strict=True):
        assert torch.equal(got, value)


def test_non_contiguous_cotangents():
    x = torch.randn(6, 7, requires_grad=True)
    gy = torch.randn(7, 6).t()
    (got,) = torch.autograd.grad(functional.gelu(x), x, gy)
    (value,) = torch.autograd.grad(functional.gelu(x), x, gy.contiguous())
    assert torch.equal(got, value)


@every_sample
def test_traced_to_one_node_a_call(name):
    case = CASES[name]
    graph = make_fx(lambda *inputs: derivatives(case.ours, list(inputs)))(*case.inputs).graph
    graph.eliminate_dead_code()
    mine = [str(node.target) for node in graph.nodes if "mgd_kernels" in str(node.target)]
    kind = {"activation": "_with_slope", "linear_cross_entropy_total": "_with_gradients"}.get(case.operator, "")
    forward, backward = (f"mgd_kernels.{case.operator}{kind}.default" for kind in (kind, "_backward"))
    twice = f"mgd_kernels.{case.operator.removesuffix('_total')}_double_backward.default"
    # The last derivative goes back through the backward pass once, and through the function itself once more.
    assert sorted(mine) == sorted([forward, backward, twice, backward])


@every_sample
def test_traced_graph_gives_the_same_bits(name):
    case = CASES[name]
    function = lambda *inputs: derivatives(case.ours, list(inputs))
    for got, value in zip(make_fx(function)(*case.inputs)(*case.inputs), function(*case.inputs), strict=True):
        assert torch.equal(got, value)


@every_sample
@pytest.mark.parametrize("level", [1, 2])
def test_batched_cotangents(name, level):
    """Several objectives at once: `is_grads_batched`, at the gradient and at the second derivative."""
    case = CASES[name]
    inputs = [x.detach().requires_grad_() for x in case.inputs]
    outputs = tensors(case.ours(*inputs))
    if level == 2:
        gy = [x.requires_grad_() for x in random_like(outputs, 1)]
        outputs = list(torch.autograd.grad(outputs, inputs, gy, create_graph=True))
        inputs = [*inputs, *gy]
    each = [random_like(outputs, seed) for seed in (5, 6, 7)]
    stacked = [torch.stack(parts) for parts in zip(*each, strict=True)]
    options = dict(retain_graph=True, allow_unused=True)
    batched = torch.autograd.grad(outputs, inputs, stacked, is_grads_batched=True, **options)
    for i, cotangents in enumerate(each):
        single = torch.autograd.grad(outputs, inputs, cotangents, **options)
        for got, value in zip(batched, single, strict=True):
            if value is None:
                assert got is None
                continue
            # torch's bmm of a batch may round otherwise than that of its parts.
            torch.testing.assert_close(got[i], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


def test_batched_first_derivatives_are_differentiable():
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    gy = torch.eye(9)
    (jacobian,) = torch.autograd.grad(functional.gelu(x), x, gy, create_graph=True, is_grads_batched=True)
    (second,) = torch.autograd.grad(jacobian.sum(), x)
    y = x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(F.gelu(y).sum(), y, create_graph=True)
    torch.testing.assert_close(second.double(), torch.autograd.grad(first.sum(), y)[0], rtol=1e-5, atol=1e-6)


def test_batched_inputs():
    x = torch.randn(3, 4, 6)
    assert torch.equal(torch.vmap(functional.gelu)(x), functional.gelu(x))


IN_ONE_CALL = {
    "gelu": (functional.gelu, F.gelu, [(4, 6)]),
    "tanh": (functional.tanh, torch.tanh, [(6,)]),
    "cross_entropy": (functional.cross_entropy, F.cross_entropy, [(4, 6), 6]),
    "avg_pool2d": (functional.avg_pool2d, F.avg_pool2d, [(2, 3, 4, 4)]),
    "max_pool2d": (functional.max_pool2d, F.max_pool2d, [(2, 3, 4, 4)]),
}


@pytest.mark.parametrize("name", IN_ONE_CALL)
def test_a_batch_of_value_and_derivatives_is_one_call_each(name):
    """Of several tensors side by side, with what they share."""
    ours, theirs, shapes = IN_ONE_CALL[name]
    window = (2,) if name.endswith("pool2d") else ()
    x = torch.randn(3, *shapes[0])
    targets = (torch.randint(6, (3, 4)),) if len(shapes) == 2 else ()
    direction = torch.randn(shapes[0])  # of all

    def derivatives_of(function, x, direction, *targets):
        x = x.detach().requires_grad_()
        value = function(x, *targets, *window).square().sum()
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        return value.detach(), first.detach(), *torch.autograd.grad(first, x, direction)

    one = make_fx(lambda *given: derivatives_of(ours, *given))(x[0], direction, *[y[0] for y in targets])
    one.graph.eliminate_dead_code()
    several = torch.vmap(one, in_dims=(0, None, *[0] * len(targets)))
    graph = make_fx(several)(x, direction, *targets).graph
    calls = [sum("mgd_kernels" in str(node.target) for node in g.nodes) for g in (one.graph, graph)]
    assert calls[0] == calls[1] > 0
    found = several(x, direction, *targets)
    for i in range(3):
        expected = derivatives_of(theirs, x[i].double(), direction.double(), *[y[i] for y in targets])
        for part, value in zip(found, expected, strict=True):
            torch.testing.assert_close(part[i].double(), value, rtol=1e-5, atol=1e-5)


@every_sample
def test_bits_do_not_depend_on_threads(name):
    shapes = {
        "gelu-15": [(300_001,)],
        "layer_norm-3x2x77": [(2000, 2, 77), (77,), (77,)],
        "rms_norm-3x2x77": [(2000, 2, 77), (77,)],
        "group_norm-4x8x5x5": [(32, 32, 17, 19), (32,), (32,)],
        "batch_norm-4x8x5x5": [(32, 32, 17, 19), (32,), (32,)],
        "softmax-2x7x33": [(50, 60, 133)],
    }
    case = CASES[name]
    inputs = case.inputs
    if name in shapes:
        g = torch.Generator().manual_seed(0)
        inputs = [torch.randn(shape, generator=g) for shape in shapes[name]]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(derivatives(case.ours, inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        if "attention" not in name:  # its matrix products are torch's
            assert all(map(torch.equal, found[0], other))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, at the first dual number
@every_sample
def test_forward_mode_raises_and_names_the_operator(name):
    case = CASES[name]
    for requires_grad in (False, True):
        with fwAD.dual_level():
            inputs = [fwAD.make_dual(x.detach().requires_grad_(requires_grad), torch.ones_like(x)) for x in case.inputs]
            with pytest.raises(NotImplementedError, match=f"forward AD with mgd_kernels::{case.operator}"):
                case.ours(*inputs)


def sample_calls() -> list[tuple]:
    """Every operator, with arguments."""
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g).requires_grad_()
    x, w, b, rows = r(3, 10), r(10), r(10), (r(3).detach(), r(3).detach().abs())
    image, sets, channels = r(2, 4, 9), (r(4).detach(), r(4).detach().abs()), (r(4).detach(), r(4).detach().abs())
    target = torch.tensor([1, -100, 3])
    p = torch.softmax(r(2, 3, 3), -1).detach().requires_grad_()
    statistics = torch.zeros(3, 2)
    one = torch.ones((), requires_grad=True)
    gradients = r(3, 10).detach(), r(5, 10).detach(), r(5).detach()
    planes, places = r(1, 2, 4, 6), torch.tensor([4, 8, 1, 3, 5, 4] * 2, dtype=torch.uint8).view(1, 2, 2, 3)
    keyed = r(1, 2, 6, 3), *r(2, 1, 2, 5, 3).detach()
    return [
        (ops.activation_with_slope, (x, "gelu")),
        (ops.activation_backward, (r(3, 10), torch.rand(3, 10), x, "silu")),
        (ops.activation_double_backward, (r(3, 10).detach(), r(3, 10).detach(), torch.rand(3, 10), x.detach(), "gelu")),
        (ops.layer_norm, (x, w, b, 10, 1e-5)),
        (ops.layer_norm_backward, (r(3, 10), x, *rows, w, 10, 1e-5)),
        (ops.group_norm, (image, r(4), None, 2, 1e-5)),
        (ops.group_norm_backward, (r(2, 4, 9), image, *sets, r(4), 2, 1e-5)),
        (ops.batch_norm, (image, r(4), r(4), 1e-5)),
        (ops.batch_norm_backward, (r(2, 4, 9), r(4), None, image, *channels, r(4), 1e-5)),
        (ops.rms_norm, (x, w, None, 10, 1e-5)),
        (ops.rms_norm_backward, (r(3, 10), x, *rows, w, 10, 1e-5)),
        (ops.softmax, (x, None, 0.5, False)),
        (ops.softmax, (r(2, 3, 4, 5), r(1, 3, 1, 5), 0.5, False)),
        (ops.softmax_backward, (r(2, 3, 3), p, 0.5, True)),
        (ops.cross_entropy, (x, target, -100)),
        (ops.cross_entropy_backward, (r(3), x, target, statistics, -100)),
        (ops.attention, (r(1, 4, 6, 3), r(1, 2, 5, 3), r(1, 2, 5, 2), r(1, 4, 1, 5), 0.5, 0, None, 0.0)),
        (ops.attention_backward, (r(1, 2, 6, 3), *keyed, None, False, 0.5, None, torch.tensor(3), 0.2)),
        (ops.linear_cross_entropy, (x, r(5, 10), r(5), target, -100, 0.1, 0.0, 0.0)),
        (ops.linear_cross_entropy_backward, (r(3), x, r(5, 10), None, target, statistics, True, -100, 0.0, 0.1, 2.0)),
        (ops.linear_cross_entropy_total, (x, r(5, 10), r(5), target, True, -100, 0.1, 0.0, 0.0)),
        (ops.linear_cross_entropy_total_with_gradients, (x, r(5, 10), r(5), target, True, True, -100, 0.1, 0.0, 0.0)),
        (
            ops.linear_cross_entropy_total_backward,
            (one, *gradients, x, r(5, 10), r(5), target, statistics, True, True, -100, 0.1, 0.0, 0.0),
        ),
        (ops.max_pool2d, (planes, 3, 2, 1)),
        (ops.max_pool2d_put, (r(1, 2, 2, 3), places, 4, 6, 3, 2, 1)),
        (ops.max_pool2d_take, (planes, places, 3, 2, 1)),
    ]


@pytest.mark.parametrize("call", sample_calls(), ids=lambda call: call[0].__name__)
def test_opcheck(call):
    operator, arguments = call
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator.default, arguments, test_utils=utilities)


def test_operators_check_what_they_are_given():
    with pytest.raises(BadArgument, match="float32"):
        ops.activation(torch.zeros(3, dtype=torch.float64), "gelu")
    with pytest.raises(BadArgument, match=r"\[3\]"):
        ops.activation_backward(torch.zeros(4), torch.zeros(3), torch.zeros(3), "gelu")
    with pytest.raises(BadArgument, match="int64"):
        ops.cross_entropy(torch.zeros(2, 3), torch.zeros(2), -100)
