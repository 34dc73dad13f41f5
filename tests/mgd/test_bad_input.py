"""Bad input: the right class, with what was expected, what came, and the step."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import adamw, cross_entropy, initial, mlp, supervised, weighted, weights
from torch import nn

import mgd
from mgd import errors
from mgd_kernels import SGD, UpdateRule

STEPS = 6


def base(**options):
    return supervised(mlp(), (5,), STEPS, **options)


def refused(kind, *parts, case=None, step=None, call="metagradient", **changes):
    """The call raises exactly this class, and its text has these parts."""
    case = (case or base()).but(**changes)
    with pytest.raises(errors.MetagradientError if kind is None else kind) as caught:
        getattr(case.function(), call)(case.z)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert all(part in text for part in parts), text
    if step is not None:
        assert f"step {step}" in text, text
        assert getattr(caught.value, "step", step) == step
    return caught.value


CALLS = ["metagradient", "value", "train", "__call__"]

# --- z ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_a_schedule_of_another_length(call):
    z = {"lr": torch.full((STEPS + 1,), 1e-2)}
    refused(errors.BadMetaparameter, "z['lr']", f"[{STEPS}]", f"got [{STEPS + 1}]", call=call, z=z)


def test_a_schedule_with_too_many_groups():
    z = {"lr": torch.full((STEPS, 2), 1e-2)}
    refused(errors.BadMetaparameter, "z['lr']", f"got [{STEPS}, 2]", "1 group(s)", z=z)


def test_a_schedule_lists_the_shapes_for_groups():
    case = base(optimizer=adamw(param_groups=[{"params": "*.bias"}]))
    z = {"lr": torch.full((3,), 1e-2)}
    refused(errors.BadMetaparameter, "[2] (one per parameter group)", f"[{STEPS}, 2]", "got [3]", case=case, z=z)


@pytest.mark.parametrize(
    "value, got",
    [
        (torch.ones(20, dtype=torch.int64), "torch.int64"),
        (torch.ones(20, dtype=torch.bool), "torch.bool"),
        (torch.ones(20, dtype=torch.complex64), "torch.complex64"),
        (3, "a int"),
        ("high", "a str"),
        (None, "a NoneType"),
    ],
)
def test_values_that_have_no_gradient(value, got):
    refused(errors.BadMetaparameter, "z['data_weights']", got, loss=weighted, z={"data_weights": value})


def test_the_place_in_a_pytree_is_named():
    z = {"nested": {"a": [torch.ones(1), torch.ones(1, dtype=torch.int32)]}}
    refused(errors.BadMetaparameter, "z['nested']['a'][1]", "torch.int32", z=z)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value):
    z = {"data_weights": weights().index_fill(0, torch.tensor([4]), value)}
    refused(errors.BadMetaparameter, "finite", "z['data_weights']", loss=weighted, z=z)


@pytest.mark.parametrize("key", ["lr", "data_weights", "init"])
def test_values_on_another_device(key):
    z = {"lr": torch.full((STEPS,), 1e-2, device="meta"), "data_weights": torch.ones(20, device="meta")}
    z["init"] = {"0.weight": torch.ones(8, 5, device="meta")}
    refused(errors.BadMetaparameter, f"z['{key}']", "cpu", "meta", loss=weighted, z={key: z[key]})


@pytest.mark.parametrize("z", [None, [1.0], torch.ones(3)])
@pytest.mark.parametrize("call", ["metagradient", "__call__"])
def test_z_is_a_mapping(z, call):
    with pytest.raises(errors.BadMetaparameter, match=f"got {type(z).__name__}"):
        getattr(base().function(), call)(z)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("typo, meant", [("weight_dcay", "weight_decay"), ("intit", "init")])
def test_an_unknown_key_gets_a_hint(call, typo, meant):
    refused(errors.BadMetaparameter, repr(typo), f"did you mean {meant!r}?", call=call, z={typo: torch.ones(())})


def test_a_key_that_is_no_name():
    refused(errors.BadMetaparameter, "names", "got 1", z={1: torch.ones(())})


def test_an_unknown_key_beside_one_of_the_loss():
    z = {"data_weights": weights(), "data_weight": weights()}
    refused(errors.BadMetaparameter, "'data_weight'", "did you mean 'data_weights'?", loss=weighted, z=z)


def test_a_hyperparameter_that_the_optimizer_lacks():
    case = base(optimizer=SGD(lr=0.1))
    z = {"momentum": torch.tensor(0.9)}
    refused(errors.BadMetaparameter, "'momentum'", "SGD has no", "momentum other than 0", case=case, z=z)


def test_a_key_that_was_not_given():
    error = refused(errors.BadMetaparameter, "z['data_weights']", "not given", loss=weighted, step=0)
    assert "'lr'" in str(error)


@pytest.mark.parametrize(
    "init, parts",
    [
        ({"0.weights": torch.ones(8, 5)}, ["'0.weights'", "did you mean '0.weight'?"]),
        ({"0.weight": torch.ones(5, 8)}, ["'0.weight'", "[8, 5]", "[5, 8]"]),
        ({"0.weight": 1.0}, ["'0.weight'", "[8, 5]"]),
        ({"0": {"weight": torch.ones(8, 5)}}, ["'0'"]),
        (torch.ones(3), ["z['init']", "Tensor"]),
    ],
)
def test_initial_parameters(init, parts):
    refused(errors.BadMetaparameter, *parts, z={"init": init})


def test_a_nested_initial_parameter():
    refused(errors.BadMetaparameter, "[8, 5]", "a dict", z={"init": {"0.weight": {"a": torch.ones(8, 5)}}})


def test_an_initial_value_of_a_frozen_parameter():
    case = base()
    case.model[0].bias.requires_grad_(False)
    refused(errors.BadMetaparameter, "'0.bias'", "not a trainable", case=case, z={"init": {"0.bias": torch.ones(8)}})


@pytest.mark.parametrize("index", [torch.ones(6), torch.ones(6, dtype=torch.bool), [0, 1]])
def test_an_index_of_per_example_that_is_none(index):
    case = base(per_example={"data_weights": lambda batch: index}).but({"data_weights": weights()}, loss=weighted)
    refused(errors.BadMetaparameter, "per_example['data_weights']", "integer", step=0, case=case)


# --- loss and batches -------------------------------------------------------------------------------------------


def at(t, wrong):
    """The loss that is `wrong(model, batch, z)` at step t."""
    count = itertools.count()
    return lambda model, batch, z: (wrong if next(count) == t else cross_entropy)(model, batch, z)


@pytest.mark.parametrize(
    "wrong, got",
    [
        (lambda m, b, z: F.cross_entropy(m(b[0]), b[1], reduction="none"), "float64 [6]"),
        (lambda m, b, z: F.cross_entropy(m(b[0]), b[1])[None], "float64 [1]"),
        (lambda m, b, z: F.cross_entropy(m(b[0]), b[1]).item(), "a float"),
        (lambda m, b, z: None, "a NoneType"),
        (lambda m, b, z: m(b[0]).argmax(), "int64 []"),
    ],
)
def test_a_loss_that_is_not_a_scalar(wrong, got):
    refused(errors.BadLoss, "scalar", got, step=3, loss=at(3, wrong))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m, b, z: cross_entropy(m, b, z).detach(),
        lambda m, b, z: torch.no_grad()(cross_entropy)(m, b, z),
        lambda m, b, z: torch.zeros((), dtype=torch.float64),
    ],
)
def test_a_detached_loss(wrong):
    refused(errors.BadLoss, "does not depend on the parameters", step=2, loss=at(2, wrong))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(call, value):
    error = refused(
        errors.NonFiniteState,
        "the loss",
        step=4,
        call=call,
        loss=at(4, lambda m, b, z: cross_entropy(m, b, z) * value),
    )
    assert error.where == "the loss"


def test_a_gradient_that_is_not_finite():
    """The gradient of a square root at 0: the loss of the step itself is finite, that of the next is not."""
    wrong = lambda m, b, z: cross_entropy(m, b, z) + (m[0].bias * 0).sum().sqrt()
    refused(errors.NonFiniteState, step=4, loss=at(3, wrong))


def test_a_second_derivative_that_is_not_finite():
    """|x|^1.5 at 0 has a gradient, 0, but no second derivative. At step 0 no later check would notice."""
    case = base()
    with torch.no_grad():
        case.model[0].bias.zero_()
    loss = lambda m, b, z: cross_entropy(m, b, z) + (m[0].bias.square() ** 0.75).sum() * z["scale"]
    refused(errors.NonFiniteState, loss=loss, case=case, z={"scale": torch.tensor(0.1), "init": initial(case.model)})


def test_an_objective_that_is_not_finite():
    error = refused(errors.NonFiniteState, "the objective", step=STEPS, objective=lambda m: m[0].weight.sum() / 0)
    assert error.where == "the objective"


def in_place(m, b, z):
    m[0].weight.mul_(0.9)
    return cross_entropy(m, b, z)


def in_place_without_gradients(m, b, z):
    value = cross_entropy(m, b, z)
    with torch.no_grad():
        m[0].weight.mul_(0.9)
    return value


@pytest.mark.parametrize("wrong", [in_place, in_place_without_gradients])
def test_a_loss_that_changes_parameters(wrong):
    refused(errors.ParametersModified, "parameters in place", step=2, loss=at(2, wrong))


def test_a_loss_that_changes_frozen_parameters():
    case = base()
    case.model[0].weight.requires_grad_(False)
    refused(errors.ParametersModified, "do not require a gradient", step=2, case=case, loss=at(2, in_place))


def test_a_loss_that_changes_metaparameters():
    def wrong(m, b, z):
        z["data_weights"].clamp_(max=1.0)
        return weighted(m, b, z)

    refused(errors.ParametersModified, "metaparameters in place", step=0, loss=wrong, z={"data_weights": weights()})


@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_empty_batch(microbatches):
    case = base(microbatches=microbatches)
    batches = list(case.batches)
    batches[3] = tuple(part[:0] for part in batches[3])
    refused(errors.BadBatch, "batch 3", "at least one example", case=case, batches=batches)


def test_fewer_examples_than_microbatches():
    refused(errors.BadBatch, "7 examples", "batch 0 has 6", microbatches=7)


def test_no_common_length_for_microbatches():
    case = base(microbatches=2)
    batches = [(x, y[:5], i) for x, y, i in case.batches]
    refused(errors.BadBatch, "[5, 6]", "batch 0", case=case, batches=batches)


def test_an_error_of_the_users_own_passes_unchanged():
    class Own(Exception):
        pass

    def wrong(m, b, z):
        raise Own("mine")

    with pytest.raises(Own, match="mine"):
        base().but(loss=at(2, wrong)).metagradient()


# --- the objective ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        lambda m: torch.ones((), dtype=torch.float64),
        lambda m: m[0].weight.sum().detach(),
        lambda m: torch.no_grad()(m[0].weight.sum)(),
        lambda m: torch.ones((), dtype=torch.float64, requires_grad=True) * 2,
    ],
)
def test_an_objective_that_does_not_depend_on_the_parameters(objective):
    refused(errors.BadObjective, "depend", "parameter", objective=objective)


@pytest.mark.parametrize(
    "objective, got",
    [
        (lambda m: m[0].weight, "float64 [8, 5]"),
        (lambda m: 1.0, "a float"),
        (lambda m: m[0].weight.argmax(), "int64 []"),
        (lambda m: m[0].weight[:0, 0], "float64 [0]"),
    ],
)
def test_an_objective_of_another_kind(objective, got):
    refused(errors.BadObjective, "[] or [k]", got, objective=objective)


def test_an_objective_that_changes_parameters():
    def objective(model):
        value = model[0].weight.sum()
        with torch.no_grad():
            model[0].weight.zero_()
        return value

    refused(errors.BadObjective, "changed parameters in place", objective=objective)


# --- what does not repeat itself --------------------------------------------------------------------------------


class Augmented(list):
    """Batches of which number 3 is another one every time it is asked for."""

    asked = 0

    def __getitem__(self, t):
        x, y, i = super().__getitem__(t)
        self.asked += t == 3
        return (x + 0.1 * self.asked if t == 3 else x), y, i


@pytest.mark.parametrize("schedule", ["log", "revolve"])
def test_batches_that_differ_when_asked_again(schedule):
    case = base(schedule=schedule)
    refused(errors.ReplayDivergence, "batches[3] differs", step=3, case=case, batches=Augmented(case.batches))


@pytest.mark.parametrize("trace", [False, True])
def test_a_loss_with_state_outside_the_model(trace):
    count = itertools.count()

    def loss(m, b, z):
        return cross_entropy(m, b, z) * (1 + 0.01 * next(count))

    error = refused(errors.ReplayDivergence, "bit by bit", "state kept outside the model", loss=loss, trace=trace)
    assert error.step == STEPS - 1


def test_random_numbers_that_are_not_torchs():
    import random

    stream = random.Random(0)
    loss = lambda m, b, z: cross_entropy(m, b, z) * (1 + stream.random())
    refused(errors.ReplayDivergence, "random numbers", step=STEPS - 1, loss=loss, trace=False)


# --- construction -----------------------------------------------------------------------------------------------


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
        ({"optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)}, "mgd_kernels"),
        ({"batches": []}, "at least one batch"),
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
        assert issubclass(getattr(errors, name), (errors.MetagradientError, errors.KernelError))


def test_inputs_survive_a_deepcopy_after_a_call():
    case = base()
    case.metagradient()
    copy.deepcopy(case.model)
