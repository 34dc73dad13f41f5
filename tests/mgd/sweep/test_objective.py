"""Objectives: several at once, the differentiable call, and the order of its Taylor remainder."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import adamw, assert_exact, convnet, generator, initial, language, lstm, mlp, supervised, weighted, weights

from mgd_kernels import RMSprop

STEPS = 8


def base(**options):
    return supervised(mlp(0.2), (5,), STEPS, **options).but(loss=weighted, z={"data_weights": weights()})


def three(case):
    """Three objectives: the held-out loss, its square, and the norm of one tensor."""
    single = case.objective

    def objective(model):
        value = single(model)
        return torch.stack([value, value**2, next(model.parameters()).square().sum().to(value)])

    return case.but(objective=objective)


VECTOR = {
    "mlp": base,
    "convnet": lambda: supervised(convnet(), (1, 6, 6), microbatches=2),
    "lstm": lambda: supervised(lstm(), (4, 5)),
    "gpt": language,
}


@pytest.mark.parametrize("name", VECTOR)
def test_three_objectives_share_one_sweep(name):
    case = three(VECTOR[name]())
    case = case.but({"init": initial(case.model)})
    result = assert_exact(case)
    assert result.value.shape == (3,)
    assert result.report.objectives == 3 and result.report.counts["model steps"] == len(case)


@pytest.mark.parametrize("name", [name for name in VECTOR if name != "lstm"])  # which Dynamo leaves to autograd
def test_several_objectives_are_captured(name):
    case = three(VECTOR[name]())
    result = assert_exact(case, trace=True)
    assert result.report.execution == "captured"


def test_one_objective_in_a_vector_has_a_leading_dimension():
    case = base()
    single, alone = case.metagradient(), case.but(objective=lambda m: case.objective(m)[None]).metagradient()
    assert torch.equal(alone.value, single.value[None])
    assert all(torch.equal(alone.grads[key], single.grads[key][None]) for key in case.z)


def test_the_objective_may_be_random():
    """Its random stream is one of the training's own, so dropout in it repeats."""
    case = base()
    x, y, _ = case.batches[0]
    case = case.but(objective=lambda model: F.cross_entropy(model.train()(x.to(model[0].weight)), y))
    assert_exact(case)
    assert torch.equal(case.function().value(case.z), case.function().value(case.z))


def leaves(case):
    return {key: value.clone().requires_grad_() for key, value in case.z.items()}


def test_the_call_is_a_node_of_the_graph():
    case = base()
    z, f = leaves(case), case.function()
    value = f(z)
    expected = case.metagradient()
    assert torch.equal(value.detach(), expected.value)
    (3 * value).backward()
    for key, gradient in expected.grads.items():
        assert torch.allclose(z[key].grad, 3 * gradient, rtol=1e-12, atol=0)


def test_backward_twice():
    case = base()
    z = leaves(case)
    value = case.function()(z)
    value.backward(retain_graph=True)
    once = {key: leaf.grad.clone() for key, leaf in z.items()}
    value.backward()
    assert all(torch.equal(z[key].grad, 2 * once[key]) for key in z)


def test_a_vector_of_objectives_takes_any_cotangent():
    case = three(base())
    z, f = leaves(case), case.function()
    cotangent = torch.tensor([0.5, -2.0, 0.25], dtype=torch.float64)
    grads = torch.autograd.grad(f(z), list(z.values()), cotangent)
    expected = case.unrolled().grads
    for key, gradient in zip(z, grads, strict=True):
        assert torch.allclose(gradient, torch.tensordot(cotangent, expected[key], 1), rtol=1e-10, atol=1e-15)


def test_a_schedule_from_knots():
    """Learning rates are interpolated from four knots on a logarithmic scale; the gradient reaches the knots."""
    case = base()

    def schedule(knots):
        return F.interpolate(knots[None, None], STEPS, mode="linear", align_corners=True)[0, 0].exp()

    knots = torch.tensor([-4.0, -3.5, -4.0, -5.0], dtype=torch.float64, requires_grad=True)
    f = case.function()
    (2 * f({"lr": schedule(knots), "data_weights": weights()}) + knots[0]).backward()

    case.z["lr"] = schedule(knots.detach())
    (expected,) = torch.autograd.grad(schedule(knots), knots, 2 * case.unrolled().grads["lr"])
    expected[0] += 1
    assert torch.allclose(knots.grad, expected, rtol=1e-10, atol=1e-15)


def test_numbers_and_constants_beside_tensors_in_the_call():
    case = base()
    z = {"lr": 1e-2, "data_weights": weights().requires_grad_(), "init": initial(case.model)}
    case.function()(z).backward()
    expected = case.but(z={"lr": torch.tensor(1e-2, dtype=torch.float64)} | {k: z[k] for k in ("init",)}).unrolled()
    assert torch.allclose(z["data_weights"].grad, expected.grads["data_weights"], rtol=1e-10, atol=1e-15)
    assert all(tensor.grad is None for tensor in z["init"].values())


def test_a_changed_z_is_refused_in_backward():
    case = base()
    z = leaves(case)
    value = case.function()(z)
    with torch.no_grad():
        z["lr"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_two_calls_in_one_graph():
    case = base()
    f, lr = case.function(), case.z["lr"].clone().requires_grad_()
    (f(case.z | {"lr": lr}) * f(case.z | {"lr": 2 * lr})).backward()
    one, two = case.unrolled(), case.but({"lr": 2 * case.z["lr"]}).unrolled()
    expected = one.grads["lr"] * two.value + 2 * one.value * two.grads["lr"]
    assert torch.allclose(lr.grad, expected, rtol=1e-10, atol=0)


def test_an_objective_of_running_statistics_alone():
    case = supervised(convnet(), (1, 6, 6))
    assert_exact(case.but({"init": initial(case.model)}, objective=lambda m: m[1].running_var.log().sum()))


def test_a_sum_of_buffers_in_the_objective():
    """Its gradient is a single 1, expanded, which cannot be written to."""
    case = supervised(convnet(), (1, 6, 6))
    case = case.but(objective=lambda m: m[1].running_mean.sum() + m[0].weight.square().sum())
    lr = case.z["lr"].clone().requires_grad_()
    (3 * case.function()(case.z | {"lr": lr})).backward()
    assert torch.allclose(lr.grad, 3 * case.unrolled().grads["lr"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(mode):
    case = base()
    expected = case.metagradient()
    with mode():
        result = case.metagradient()
        assert torch.is_grad_enabled() is False
    assert all(torch.equal(result.grads[key], expected.grads[key]) for key in case.z)


@pytest.mark.parametrize("optimizer", [adamw, lambda: RMSprop(lr=1e-2, momentum=0.5, eps_root=1e-4)])
def test_the_taylor_remainder_is_of_second_order(optimizer):
    """|f(z + h d) - f(z) - h <∇f, d>| = O(h²): halving h divides it by 4, all kinds of metaparameters moving."""
    case = base(optimizer=optimizer(), microbatches=2, max_grad_norm=0.4)
    case = case.but({"init": initial(case.model)})
    case.z["lr"] = case.z["lr"].clone()
    f, g = case.function(), generator(6)
    result = f.metagradient(case.z)
    scale = {"lr": 1e-2, "data_weights": 1.0}
    d = {key: s * torch.randn(case.z[key].shape, generator=g, dtype=torch.float64) for key, s in scale.items()}
    d["init"] = {n: torch.randn(p.shape, generator=g, dtype=torch.float64) for n, p in case.z["init"].items()}

    def moved(h):
        init = {n: p + h * d["init"][n] for n, p in case.z["init"].items()}
        return {
            "lr": case.z["lr"] + h * d["lr"],
            "data_weights": case.z["data_weights"] + h * d["data_weights"],
            "init": init,
        }

    slope = sum((result.grads[key] * d[key]).sum() for key in scale)
    slope += sum((result.grads["init"][n] * d["init"][n]).sum() for n in d["init"])
    remainders = [abs(f.value(moved(h)) - result.value - h * slope).item() for h in (2e-3, 1e-3, 5e-4)]
    orders = [torch.tensor(a / b).log2().item() for a, b in itertools.pairwise(remainders)]
    assert all(1.9 < order < 2.1 for order in orders), (remainders, orders)
