"""Arguments of the training function that do not fit are refused."""

import copy

import pytest
import torch
from cases import cross_entropy
from refusals import CALLS, base, refused
from torch import nn
from torch.utils.data import DataLoader

import mgd
from mgd import errors
from mgd_kernels import SGD, UpdateRule


@pytest.mark.parametrize("call", CALLS)
def test_a_model_without_trainable_parameters(call):
    case = base()
    case.model.requires_grad_(False)
    refused(errors.BadArgument, "require", case=case, call=call)


def test_a_model_without_parameters():
    refused(errors.BadArgument, "tensor", model=nn.Sequential(nn.Tanh()))


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"model": lambda x: x}, "torch.nn.Module"),
        ({"model": nn.Sequential(nn.Embedding(4, 3, sparse=True))}, "sparse"),
        ({"optimizer": "adam"}, "mgd_kernels"),
        ({"optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)}, "every trainable parameter"),
        ({"batches": []}, "at least one batch"),
        ({"batches": iter([1])}, "mgd.batches"),
        ({"batches": DataLoader([1, 2])}, "mgd.batches"),
        ({"batches": {"x": 1}}, "a sequence of batches"),
        ({"batches": torch.ones(3)}, "a sequence of batches"),
        ({"budget": "1 lightyear"}, "size"),
        ({"budget": 1.5}, "size"),
        ({"schedule": "sqrtt"}, "'sqrtt'"),
        ({"schedule": None}, "name"),
        ({"autocast": "brain"}, "'brain'"),
        ({"autocast": torch.float64}, "torch.bfloat16"),
        ({"objective_mode": "test"}, "'eval'"),
        ({"microbatches": 0}, "microbatches"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"trace": "sideways"}, "'sideways'"),
    ],
)
def test_arguments_of_the_constructor(changes, part):
    with pytest.raises(errors.BadArgument) as caught:
        base().but(**changes).function()
    assert part in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_are_not_python_any_more():
    for model, part in (
        (torch.compile(nn.Linear(4, 3)), "_orig_mod"),
        (torch.jit.script(nn.Linear(4, 3)), "torch.jit"),
    ):
        with pytest.raises(errors.BadArgument, match=part):
            base().but(model=model).function()


def test_an_update_rule_that_is_not_differentiable():
    rule = UpdateRule(lambda p, s, g, h, k: ((p - h["lr"] * g).detach(), {}), (), {"lr": 0.1})
    refused(errors.BadArgument, "differentiable", "detached", optimizer=rule)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_an_operator_without_second_derivative():
    """torch.autograd.grad leaves such a term out without a word: the metagradient would be wrong."""
    loss = lambda m, b, z: cross_entropy(m, b, z) + Once.apply(m(b[0])).mean()
    error = refused(errors.NotDifferentiable, "Once", loss=loss)
    assert "Once" in error.op


def test_a_budget_that_is_too_small():
    error = refused(errors.BudgetTooSmall, "bytes", budget=mgd.Budget(host=100))
    assert "100" in str(error)


def test_every_class_is_an_error_of_the_package():
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), (errors.MetagradientError, errors.KernelError, Warning))


def test_inputs_survive_a_deepcopy_after_a_call():
    case = base()
    case.metagradient()
    copy.deepcopy(case.model)


def test_a_zero_gradient_is_not_clipped():
    """Also where the largest norm is below what torch adds to the norm."""
    f = mgd.TrainingFunction(
        nn.Linear(2, 1),
        lambda model, batch, z: (model(batch) * 0).sum() * z["w"],
        [torch.ones(3, 2)] * 2,
        optimizer=SGD(lr=0.1),
        objective=lambda model: model.weight.sum(),
        max_grad_norm=1e-7,
    )
    z = {"w": torch.tensor(1.0)}
    assert f.metagradient(z).grads["w"] == 0 and f.jvp(z, z).tangent == 0
