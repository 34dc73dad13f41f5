"""Operators with fused second derivatives against torch in float64, and how they behave under torch's machinery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgd_kernels import _core, functional
from mgd_kernels.errors import BadArgument

ops = torch.ops.mgd_kernels
EPS = torch.finfo(torch.float32).eps


@dataclass
class Case:
    """ours, theirs: functions of the inputs, one fused and one torch's. nodes: operators a call is traced to."""

    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    theirs: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]
    operator: str


def _batch_norm(x, w=None, b=None):
    variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1])
    return F.batch_norm(x, None, None, w, b, True), mean, variance


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
        name = "layer_norm-" + "x".join(map(str, shape))
        found[name] = Case(*pair, inputs, "layer_norm")
        found[name + "-plain"] = Case(*pair, inputs[:1], "layer_norm")
    for shape in ((4, 8, 5, 5), (2, 4, 16), (3, 12, 2, 3, 3), (70, 4, 2, 2)):
        inputs = [random(*shape, scale=2, shift=3), random(shape[1]), random(shape[1])]
        pair = [lambda x, w=None, b=None, f=f: f(x, 4, w, b) for f in (functional.group_norm, F.group_norm)]
        name = "x".join(map(str, shape))
        found[f"group_norm-{name}"] = Case(*pair, inputs, "group_norm")
        found[f"batch_norm-{name}"] = Case(functional.batch_norm_with_statistics, _batch_norm, inputs, "batch_norm")
    found["group_norm-plain"] = Case(*pair, inputs[:1], "group_norm")
    found["batch_norm-plain"] = Case(functional.batch_norm_with_statistics, _batch_norm, inputs[:1], "batch_norm")
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
    for reduction, classes in (("none", 37), ("mean", 16), ("sum", 5)):
        target = torch.randint(classes, (50,), generator=g)
        target[7] = -100
        pair = [
            lambda x, f=f, target=target, reduction=reduction: f(x, target, reduction=reduction)
            for f in (functional.cross_entropy, F.cross_entropy)
        ]
        found[f"cross_entropy-{reduction}"] = Case(*pair, [random(50, classes, scale=3)], "cross_entropy")
    return found


CASES = cases()
# One a kind, for tests of the machinery.
SAMPLES = [
    "gelu-15",
    "layer_norm-3x2x77",
    "group_norm-4x8x5x5",
    "batch_norm-4x8x5x5",
    "softmax-2x7x33",
    "attention-33x33-True",
    "cross_entropy-mean",
]
every_case = pytest.mark.parametrize("name", CASES)
every_sample = pytest.mark.parametrize("name", SAMPLES)


@pytest.fixture(autouse=True)
def _torch_attention_that_has_second_derivatives():
    with sdpa_kernel(SDPBackend.MATH):
        yield


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


@every_case
def test_values_gradients_and_second_derivatives(name):
    check_against_float64(CASES[name])


@pytest.mark.parametrize("isa", [isa for isa in _core.isas() if isa != _core.isa()])
def test_every_instruction_set(isa):
    default = _core.isa()
    try:
        _core.use_isa(isa)
        for case in CASES.values():
            check_against_float64(case)
    finally:
        _core.use_isa(default)


# --- Extreme inputs -----------------------------------------------------------------------------------------------

EXTREMES = [0.0, -0.0, 1e-40, -1e-30, 1e-8, 0.62, 0.63, -5.5, 8.0, -13.0, 20.0, -40.0, 100.0, -1e4, 1e10, -1e30]


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])
def test_activations_in_the_tails(name):
    """Exact to 4e-7 of 1 + |value| where float64 is finite (torch's gelu_tanh overflows beyond 1e12), and never NaN."""
    case = CASES[name + "-1"]
    x = torch.tensor(EXTREMES)
    mine = derivatives(case.ours, [x])
    exact = derivatives(case.theirs, [x], torch.float64)
    for got, value in zip(mine, exact, strict=True):
        assert got.isfinite().all()
        inside = value.isfinite()
        assert inside.sum() >= 13
        torch.testing.assert_close(got[inside].double(), value[inside], rtol=1e-6, atol=4e-7)


def test_gelu_is_accurate_to_units_in_the_last_place_in_the_left_tail():
    """x Phi(x) has a relative error of a few roundings where 1 + erf would have lost every digit."""
    x = torch.linspace(-12, 6, 20001)
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2  # torch's ndtr cancels
    relative = ((functional.gelu(x) - exact) / exact)[exact != 0].abs().max()
    assert relative <= 3 * EPS


def test_not_a_number_comes_through():
    x = torch.tensor([1.0, float("nan")] * 9)
    for function in (functional.gelu, functional.silu, functional.tanh, functional.sigmoid):
        assert torch.equal(function(x).isnan(), x.isnan())
    assert functional.softmax(x, 0).isnan().all()


def test_softmax_of_minus_infinity_and_large_logits():
    x = torch.tensor([[float("-inf"), 0.0, 1e4, 1e4 - 1], [float("-inf")] * 3 + [-3.0]])
    torch.testing.assert_close(functional.softmax(x, -1), F.softmax(x.double(), -1).float(), rtol=1e-6, atol=0)
    assert functional.softmax(torch.full((2, 40), float("-inf")), -1).isnan().all()
    check_against_float64(Case(*[lambda x, f=f: f(x, -1) for f in (functional.softmax, F.softmax)], [x], "softmax"))


def test_cross_entropy_of_large_logits_and_of_nothing():
    x, target = torch.tensor([[1e4, 0.0, 9998.0], [-1e4, -1e4, -9999.0]]), torch.tensor([0, 2])
    pair = [lambda x, f=f: f(x, target, reduction="none") for f in (functional.cross_entropy, F.cross_entropy)]
    check_against_float64(Case(*pair, [x], "cross_entropy"))
    ignored = torch.full((2,), -100)
    assert functional.cross_entropy(x, ignored).isnan() and F.cross_entropy(x, ignored).isnan()
    assert functional.cross_entropy(x, ignored, reduction="sum") == 0


@pytest.mark.parametrize("bad", [3, -1])
def test_target_out_of_bounds(bad):
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        functional.cross_entropy(torch.zeros(2, 3), torch.tensor([0, bad]))


@pytest.mark.parametrize("function", [functional.layer_norm, functional.group_norm])
def test_norms_of_data_far_from_zero(function):
    """A mean 1,000 times the deviation costs three digits in the input's own rounding, and no more."""
    x = 1000 + torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    argument = (64,) if function is functional.layer_norm else 4
    exact = getattr(F, function.__name__)(x.double(), argument)
    torch.testing.assert_close(function(x, argument).double(), exact, rtol=0, atol=1000 * EPS)


# --- Torch's machinery --------------------------------------------------------------------------------------------


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
    forward = f"mgd_kernels.{case.operator}{'_with_slope' if case.operator == 'activation' else ''}.default"
    # The last derivative goes back through the backward pass once, and through the function itself once more.
    backward, twice = (f"mgd_kernels.{case.operator}_{kind}.default" for kind in ("backward", "double_backward"))
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
            # torch's bmm of a batch may round otherwise than that of its parts; the operators are called one by one.
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


@every_sample
def test_bits_do_not_depend_on_threads(name):
    shapes = {
        "gelu-15": [(300_001,)],
        "layer_norm-3x2x77": [(2000, 2, 77), (77,), (77,)],
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


@every_sample
def test_third_derivatives_are_torchs(name):
    """A gradient penalty inside a loss asks for them."""
    case = CASES[name]
    found = []
    for function, dtype in ((case.ours, torch.float32), (case.theirs, torch.float64)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in case.inputs]
        values = tensors(function(*inputs))
        gy = [x.requires_grad_() for x in random_like(values, 1)]
        first = torch.autograd.grad(values, inputs, gy, create_graph=True)
        u = [x.requires_grad_() for x in random_like(list(first), 2)]
        second = torch.autograd.grad(first, [*inputs, *gy], u, create_graph=True, materialize_grads=True)
        live = [x for x in second if x.requires_grad]
        found.append(torch.autograd.grad(live, [*inputs, *gy, *u], random_like(live, 3), materialize_grads=True))
    for got, value in zip(*found, strict=True):
        # Three dozen roundings a result, of terms that are larger than it.
        torch.testing.assert_close(got.double(), value, rtol=0, atol=100 * EPS * max(1, float(value.abs().max())))


def test_absent_cotangents():
    """Only the bias's gradient is differentiated, only the mean is differentiated, a constant input: each alone."""
    x, w, b = (p.detach().requires_grad_() for p in CASES["batch_norm-4x8x5x5"].inputs)

    exact = [p.detach().double().requires_grad_() for p in (x, w, b)]

    def compare(derivative: Callable[..., list[Tensor]]):
        mine = derivative(functional.batch_norm_with_statistics, x, w, b)
        for got, value in zip(mine, derivative(_batch_norm, *exact), strict=True):
            torch.testing.assert_close(got.double(), value, rtol=0, atol=32 * EPS * float(value.abs().max()))

    def through_weights_only(f, x, w, b):
        y = f(x, w, b)[0]
        _, gw, _gb = torch.autograd.grad(y, [x, w, b], y.detach().square(), create_graph=True)
        return list(torch.autograd.grad(gw.square().sum(), x))

    compare(lambda f, x, w, b: list(torch.autograd.grad(f(x, w, b)[1].square().sum(), x)))
    compare(lambda f, x, w, b: list(torch.autograd.grad(f(x, w, b)[2].square().sum(), x)))
    compare(lambda f, x, w, b: list(torch.autograd.grad(f(x.detach(), w, b)[0].square().sum(), [w, b])))
    compare(through_weights_only)


def sample_calls() -> list[tuple]:
    """Every operator, with arguments."""
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g).requires_grad_()
    x, w, b, rows = r(3, 10), r(10), r(10), (r(3).detach(), r(3).detach().abs())
    image, sets, channels = r(2, 4, 9), (r(4).detach(), r(4).detach().abs()), (r(4).detach(), r(4).detach().abs())
    target = torch.tensor([1, -100, 3])
    p = torch.softmax(r(2, 3, 3), -1).detach().requires_grad_()
    statistics = torch.zeros(3, 2)
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
        (ops.softmax, (x, 0.5, False)),
        (ops.softmax_backward, (r(2, 3, 3), p, 0.5, True)),
        (ops.cross_entropy, (x, target, -100)),
        (ops.cross_entropy_backward, (r(3), x, target, statistics, -100)),
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


# --- What the kernels do not serve goes to torch -------------------------------------------------------------------


def traced_operators(function, *inputs) -> set[str]:
    return {str(node.target) for node in make_fx(function)(*inputs).graph.nodes if node.op == "call_function"}


@every_case
def test_float64_is_torchs_own(name):
    case = CASES[name]
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
        ("scaled_dot_product_attention", q, k, v, mask),
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
    ):
        mine, torchs = getattr(functional, name), getattr(F, name)
        assert torch.equal(mine(*args), torchs(*args))
        tensor_arguments = [x for x in args if isinstance(x, Tensor)]
        found = traced_operators(lambda *_, f=mine, args=args: f(*args), *tensor_arguments)
        assert not any("mgd_kernels" in operator for operator in found), name


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
