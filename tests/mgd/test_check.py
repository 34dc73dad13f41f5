"""`mgd.check`: passes what is right, fails what is wrong, and measures what it says it measures."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mgd.check import check, in_double
from mgd.errors import BadArgument
from mgd.function import TrainingFunction
from mgd_kernels import SGD, AdamW

T = 12


def training(loss=None, model=None, objective=None, **options):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 5, generator=generator), torch.randn(20, 2, generator=generator)
    held_x, held_y = torch.randn(9, 5, generator=generator), torch.randn(9, 2, generator=generator)
    index = [torch.randint(20, (6,), generator=generator) for _ in range(T)]
    if model is None:
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))

    def weighted(model, batch, z):
        x, y, i = batch
        return (z["data_weights"][i] * (model(x) - y).square().mean(1)).mean()

    f = TrainingFunction(
        model,
        loss or weighted,
        [(x[i], y[i], i) for i in index],
        # A large eps_root keeps the training smooth: its float32 metagradient is then accurate to about 1e-6.
        optimizer=AdamW(lr=0.02, eps_root=1e-4, weight_decay=0.1),
        objective=objective or (lambda model: F.mse_loss(model(held_x), held_y)),
        **options,
    )
    z = {"lr": torch.full((T,), 0.02), "weight_decay": torch.tensor(0.1), "data_weights": torch.ones(20)}
    return f, z


@pytest.fixture(scope="module")
def right():
    return check(*training())


def test_a_right_metagradient_passes_with_second_order_remainders(right):
    assert right.passed
    assert right.trainings == 1 + 2 * 3 * 3
    for key in right.keys.values():
        assert key.relative_error < 1e-8  # at h = 1e-5 truncation is 1e-10, rounding 1e-16 / h
        assert key.order == pytest.approx(2, abs=0.1)
        assert 1e-9 < key.float32_error < 1e-4 and key.forward < 1e-12


def test_the_numbers_are_those_of_a_training_solved_by_hand():
    # One step of gradient descent on w²/2 from w = 3: w' = (1 - η) 3, φ = w'² = 9 (1 - η)², dφ/dη = -18 (1 - η).
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0]))

    f = TrainingFunction(
        Scalar(),
        lambda model, batch, z: model.w.square().sum() / 2,
        [torch.zeros(1)],
        optimizer=SGD(lr=0.25),
        objective=lambda model: model.w.square().sum(),
    )
    found = check(f, {"lr": torch.tensor(0.25)}, steps=(0.5, 0.1), seed=3)
    key = found.keys["lr"]
    v = key.analytic / (-18 * 0.75)  # the direction that was drawn
    assert found.value == pytest.approx(9 * 0.75**2, rel=1e-15)
    drawn = torch.randn((), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert v == pytest.approx(0.25 * float(drawn), rel=1e-12)
    # φ is quadratic in η: the central difference is exact, the remainder is 9 (h v)², of order 2.
    assert key.relative_error < 1e-14
    assert key.remainders == pytest.approx([9 * (h * v) ** 2 for h in (0.5, 0.1)], rel=1e-10)
    assert key.order == pytest.approx(2, abs=1e-9)


def test_a_wrong_metagradient_fails_with_a_first_order_remainder():
    def loss(model, batch, z):  # half of the dependence on the weights is hidden from autograd
        x, y, i = batch
        weights = (z["data_weights"] + z["data_weights"].detach()) / 2
        return (weights[i] * (model(x) - y).square().mean(1)).mean()

    f, z = training(loss)
    result = check(f, z)
    assert not result.passed
    assert result.keys["lr"].relative_error < 1e-6
    assert result.keys["data_weights"].relative_error == pytest.approx(0.5, abs=1e-3)
    assert result.keys["data_weights"].order == pytest.approx(1, abs=0.1)
    assert "FAILS" in str(result)


def test_an_inaccurate_metagradient_of_the_function_itself_fails():
    f, z = training()
    own = f.metagradient(z)
    wrong = dataclasses.replace(own, grads={**own.grads, "lr": own.grads["lr"] * 1.05})
    result = check(f, z, metagradient=wrong)
    assert result.keys["lr"].float32_error == pytest.approx(0.05, rel=1e-3)
    assert not result.passed
    assert check(f, z, metagradient=wrong, float32_tolerance=0.1).passed


def test_nan_does_not_pass(right):
    key = dataclasses.replace(right.keys["lr"], relative_error=float("nan"))
    assert not dataclasses.replace(right, keys={"lr": key}).passed


def test_a_difference_that_agrees_by_luck_does_not_pass(right):
    key = dataclasses.replace(right.keys["lr"], order=-0.31)
    lucky = dataclasses.replace(right, keys={"lr": key})
    assert not lucky.passed and "unclear" in str(lucky) and lucky.verdict("lr") == "unclear"
    assert dataclasses.replace(right, keys={"lr": dataclasses.replace(key, order=None)}).passed


def test_keys_and_step_sizes_can_be_chosen_and_are_checked():
    f, z = training()
    result = check(f, z, keys=["lr"], steps=(1e-3, 1e-4))
    assert list(result.keys) == ["lr"] and result.trainings == 1 + 2 * 2
    with pytest.raises(BadArgument, match="got \\['learning_rate'\\]"):
        check(f, z, keys=["learning_rate"])
    for steps in ((), (1e-4, 1e-3), (1e-3, 0.0)):
        with pytest.raises(BadArgument, match="positive, falling"):
            check(f, z, steps=steps)


def test_several_objectives_and_a_pytree_of_parameters():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(5))
    f, z = training(objective=lambda model: model(x).square().mean(0))  # a vector [2]
    z["init"] = {name: p.detach().clone() for name, p in f.model.named_parameters()}
    result = check(f, z)
    assert result.passed
    assert result.keys["init"].relative_error < 1e-6


def test_a_function_that_is_float64_already_has_no_precision_error():
    f, z = training()
    double = in_double(f)
    result = check(double, {key: value.double() for key, value in z.items()})
    assert [key.float32_error for key in result.keys.values()] == [0.0, 0.0, 0.0]


def test_a_training_that_draws_other_numbers_in_float64_is_not_compared():
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), _Noise(), nn.Linear(8, 2))
    f, z = training(model=model)
    result = check(f, z)
    assert result.passed
    assert all(key.float32_error is None for key in result.keys.values())
    assert "other random numbers" in str(result)


class _Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)  # float32 and float64 normals are different draws


def test_the_copy_in_float64_casts_what_reaches_any_part_of_the_model():
    constant = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))  # float32, from the closure

    def loss(model, batch, z):
        x, y, i = batch
        return (z["data_weights"][i] * (model[2](constant * model[0](x).tanh()) - y).square().mean(1)).mean()

    f, z = training(loss)
    double = in_double(f)
    assert double.batches[0][0].dtype == torch.float64 and double.batches[0][2].dtype == torch.int64
    assert {p.dtype for p in double.model.parameters()} == {torch.float64}
    assert {p.dtype for p in f.model.parameters()} == {torch.float32}
    assert check(f, z, keys=["data_weights"]).passed


def test_the_result_is_json_and_an_aligned_table():
    f, z = training()
    result = check(f, z, keys=["lr", "weight_decay"])
    read = json.loads(json.dumps(result.to_dict()))
    assert read["passed"] is True and read["keys"]["lr"]["analytic"] == result.keys["lr"].analytic
    head, rule, *rows = str(result).splitlines()[:4]
    assert len({row.rindex("holds") for row in rows}) == 1 and set(rule) == {"-", " "}
    columns = ["analytic", "finite difference", "rel. error", "order", "forward mode", "float32"]
    assert head.split() == " ".join(columns).split()


def test_step_sizes_that_leave_the_range_of_a_hyperparameter_do_not_count():
    f, z = training()
    result = check(f, {**z, "beta2": torch.tensor(0.9999)}, keys=["beta2"], steps=(1.0, 1e-5))
    assert result.keys["beta2"].errors[0] == float("inf") and result.keys["beta2"].h == 1e-5
