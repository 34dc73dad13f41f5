"""Metaparameters that do not fit are refused with what was expected and what was passed."""

import pytest
import torch
from cases import adamw, cross_entropy, weighted, weights
from refusals import CALLS, STEPS, base, refused
from torch._subclasses.fake_tensor import FakeTensorMode

from mgd import errors
from mgd_kernels import SGD, RMSprop


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


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("key, value", [("beta1", 1.5), ("beta2", -0.1), ("eps", -1.0), ("eps_root", -1e-9)])
def test_hyperparameters_out_of_range(call, key, value):
    z = {key: torch.tensor([0.5] * (STEPS - 1) + [value], dtype=torch.float64)}
    refused(errors.BadMetaparameter, f"z['{key}']", f"got {value}", call=call, case=base(optimizer=adamw()), z=z)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", [(), (2,), (STEPS,), (STEPS, 2)])
@pytest.mark.parametrize("key, value, make", [("beta1", 1.5, adamw), ("eps", -1.0, adamw), ("alpha", 1.5, RMSprop)])
def test_one_value_out_of_range_is_enough(call, shape, key, value, make):
    """Whether the hyperparameter is a number, one per group, per step, or both."""
    case = base(optimizer=make(param_groups=[{"params": "*.bias"}]))
    values = torch.full(shape, 0.5, dtype=torch.float64)
    values.view(-1)[-1] = value
    refused(errors.BadMetaparameter, f"z['{key}']", f"got {value}", call=call, case=case, z={key: values})
    refused(errors.BadMetaparameter, f"z['{key}']", f"got {value}", call=call, case=case, z={key: value})


@pytest.mark.parametrize("key, value", [("lr", float("nan")), ("weight_decay", float("inf")), ("beta1", 1.0)])
def test_fixed_hyperparameters_out_of_range(key, value):
    case = base(optimizer=adamw(), fixed={key: value})
    refused(errors.BadMetaparameter, f"fixed['{key}']", f"got {value}", case=case, z={"lr": torch.tensor(0.1)})


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
def test_an_index_of_per_example_that_is_not_one(index):
    case = base(per_example={"data_weights": lambda batch: index}).but({"data_weights": weights()}, loss=weighted)
    refused(errors.BadMetaparameter, "per_example['data_weights']", "integer", step=0, case=case)


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(2).to_sparse(),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        FakeTensorMode().from_tensor(torch.ones(3)),
    ],
)
@pytest.mark.parametrize("key", ["lr", "weights"])
def test_tensors_that_are_not_dense(key, value):
    refused(errors.BadMetaparameter, f"z['{key}']", "dense", z={key: value})


def test_tensors_of_inference_mode_are_as_others():
    case = base(trace=False)
    with torch.inference_mode():
        z = {key: value.clone() for key, value in case.z.items()}
    assert all(value.is_inference() for value in z.values())
    found, expected = case.function().metagradient(z), case.metagradient()
    assert all(torch.equal(found.grads[key], expected.grads[key]) for key in z)


def test_a_complex_buffer_that_depends_on_parameters():
    """Buffers carry an adjoint if they are real: it must not be lost in silence."""
    case = base(trace=False)
    case.model.register_buffer("phase", torch.ones(2, dtype=torch.complex128))

    def loss(model, batch, z):
        value = cross_entropy(model, batch, z)
        model.phase = 0.9 * model.phase + 0.1 * model[0].weight[0, :2]
        return value + model.phase.abs().sum()

    refused(errors.NotDifferentiable, "'phase'", "complex", case=case, loss=loss)


def test_a_model_without_elements():
    model = torch.nn.Module()
    model.empty = torch.nn.Parameter(torch.ones(0, 3))
    refused(errors.BadArgument, "at least one element", model=model, trace=False)
