"""Losses, batches and objectives that cannot be differentiated are refused with the step."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import cross_entropy, initial, weighted, weights
from refusals import CALLS, STEPS, base, refused

from mgd import errors
from mgd_kernels import SGD


def at(t, wrong):
    """The loss that is `wrong(model, batch, z)` at step t."""
    count = itertools.count()
    return lambda model, batch, z: (wrong if next(count) == t else cross_entropy)(model, batch, z)


def on_batch(chosen, wrong):
    """The loss that is `wrong(model, batch, z)` on one batch, however often the training is run."""
    return lambda model, batch, z: (wrong if torch.equal(batch[0], chosen[0]) else cross_entropy)(model, batch, z)


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


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("trace, step", [(False, 0), (False, 3), (False, STEPS - 1), (True, 3)])
def test_a_gradient_that_is_not_finite(call, trace, step):
    """The gradient of a square root at 0: the loss of the step itself is finite, that of the next is not."""
    wrong = lambda m, b, z: cross_entropy(m, b, z) + ((m[0].bias * 0).sum() + (b[0][0, 0] - 9.0).square()).sqrt()
    case = base(trace=trace)
    case.batches[step][0][0, 0] = 9.0
    error = refused(errors.NonFiniteState, step=step, case=case, call=call, loss=wrong)
    assert error.where == "the gradient of parameter '0.bias'"


@pytest.mark.parametrize("call", CALLS)
def test_a_gradient_that_no_later_loss_shows(call):
    """A parameter that one step reads alone: only the end of the training shows it."""
    case = base()
    case.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    wrong = lambda m, b, z: cross_entropy(m, b, z) + (m.extra * 0).sum().sqrt()
    error = refused(errors.NonFiniteState, step=2, call=call, case=case, loss=on_batch(case.batches[2], wrong))
    assert error.where == "the gradient of parameter 'extra'"


def test_a_training_that_does_not_repeat_itself_says_what_was_seen():
    wrong = lambda m, b, z: cross_entropy(m, b, z) + (m[0].bias * 0).sum().sqrt()
    error = refused(errors.NonFiniteState, step=4, loss=at(3, wrong))
    assert error.where == "a parameter, at this step or before it,"


def test_an_update_that_overflows():
    case = base(optimizer=SGD(lr=0.1))
    large = lambda m, b, z: cross_entropy(m, b, z) + 1e10 * m[3].bias.sum()
    z = {"lr": torch.tensor([1.0, 1e300, *[1.0] * (STEPS - 2)], dtype=torch.float64)}
    error = refused(errors.NonFiniteState, step=1, case=case, z=z, loss=on_batch(case.batches[1], large))
    assert error.where == "parameter '3.bias' after an update with a finite gradient"


def test_a_finite_training_is_made_once(monkeypatch):
    """What names the origin costs nothing where there is none to name."""
    steps = []
    case = base()
    loss = lambda m, b, z: steps.append(0) or cross_entropy(m, b, z)
    case.but(loss=loss).function().train({})
    assert len(steps) == STEPS


def test_a_second_derivative_that_is_not_finite():
    """|x|^1.5 at 0 has a gradient, 0, but no second derivative. At step 0 no later check would notice."""
    case = base()
    with torch.no_grad():
        case.model[0].bias.zero_()
    loss = lambda m, b, z: cross_entropy(m, b, z) + (m[0].bias.square() ** 0.75).sum() * z["scale"]
    refused(errors.NonFiniteState, loss=loss, case=case, z={"scale": torch.tensor(0.1), "init": initial(case.model)})


def backward(function, z):
    leaves = {name: x.clone().requires_grad_() for name, x in z.items()}
    function(leaves).backward()


@pytest.mark.parametrize("call", [lambda f, z: f.metagradient(z), backward])
def test_a_second_derivative_that_is_not_finite_is_told_with_its_step(call):
    """|x|^1.5 at 0, on one batch: the next step back would be the first that a hyperparameter shows it at."""
    case = base()
    case.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    chosen = case.batches[3][0]

    def loss(m, b, z):
        wrong = torch.equal(b[0], chosen)
        return cross_entropy(m, b, z) + (m.extra.abs() ** 1.5 if wrong else 0 * m.extra).sum()

    read = lambda m: cross_entropy(m, case.batches[0], {}) + m.extra.sum()
    case = case.but(loss=loss, objective=read)
    with pytest.raises(errors.NonFiniteState) as caught:
        call(case.function(), case.z)
    assert (caught.value.step, caught.value.where) == (3, "the adjoint of parameter 'extra'")


def test_an_objective_whose_gradient_is_not_finite():
    wrong = lambda m: m[0].weight.sum() + (m[0].bias * 0).sum().sqrt()
    error = refused(errors.NonFiniteState, step=STEPS, objective=wrong)
    assert error.where == "the gradient of the objective with respect to '0.bias'"


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
def test_an_objective_of_the_wrong_kind(objective, got):
    refused(errors.BadObjective, "[] or [k]", got, objective=objective)


def test_an_objective_that_changes_parameters():
    def objective(model):
        value = model[0].weight.sum()
        with torch.no_grad():
            model[0].weight.zero_()
        return value

    refused(errors.BadObjective, "changed parameters in place", objective=objective)
