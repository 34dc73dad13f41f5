"""16-bit evaluations. Both sides round at bf16, each in its own order, so they agree to bf16's precision and no better.

Rounding is a step function whose derivative autograd takes to be 1; the metagradient is then that of the unrounded
training at the rounded points. Its relative error is a small multiple of bf16's unit roundoff, 2^-8 = 0.4%; a wrong
formula (a missing term, a gradient logged in the wrong dtype) is off by tens of percent.
"""

import copy

import pytest
import torch
from cases import adamw, errors, initial, mlp, relative_error, supervised, weighted, weights
from same_bits import same
from torch import nn

from mgd_kernels import SGD, Arena

BF16 = 5e-2


def case(**options):
    return supervised(mlp(), (5,), **options).but(loss=weighted, z={"data_weights": weights()}).to(torch.float32)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_autocast(microbatches):
    cast = case(autocast=torch.bfloat16, microbatches=microbatches).but({"init": initial(case().model)})
    expected = cast.unrolled()
    result = cast.metagradient()
    assert torch.allclose(result.losses, torch.tensor(expected.losses, dtype=torch.float64), rtol=1e-2)
    assert max(errors(result, expected).values()) < BF16, errors(result, expected)
    exact = cast.but(autocast=None).to(torch.float64).unrolled()
    assert relative_error(result.grads["lr"], exact.grads["lr"]) < 2 * BF16
    assert not torch.equal(result.value, cast.metagradient(autocast=None).value)  # it does run in bf16


@pytest.mark.filterwarnings("ignore:the model computes in")
@pytest.mark.parametrize("optimizer", [adamw, lambda: SGD(lr=0.1, momentum=0.8)])
def test_bf16_parameters_with_a_float32_master(optimizer):
    half = case(optimizer=optimizer())
    half = half.but(model=copy.deepcopy(half.model).bfloat16())
    half.batches = [(x.bfloat16(), y, i) for x, y, i in half.batches]
    assert Arena.of(half.model).dtype == torch.float32 and Arena.of(half.model).gradient_dtype == torch.bfloat16
    expected, result = half.unrolled(), half.metagradient()
    assert max(errors(result, expected).values()) < BF16, errors(result, expected)
    assert result.model_state["0.weight"].dtype == torch.bfloat16
    assert result.grads["data_weights"].dtype == torch.float32


def test_small_steps_are_not_lost_on_bf16_parameters():
    """50 steps of 1e-4 of the weights' size each: without a master copy every one would round to nothing."""
    half = supervised(mlp(), (5,), 50, optimizer=SGD(lr=1e-3)).to(torch.float32)
    half = half.but(model=copy.deepcopy(half.model).bfloat16())
    half.batches = [(x.bfloat16(), y, i) for x, y, i in half.batches]
    half.z = {"lr": torch.full((50,), 1e-3)}
    trained, expected = half.function().train(half.z), half.unrolled()
    start = initial(half.model)
    assert any(not torch.equal(trained.parameters[n], start[n]) for n in start)
    for name, p in expected.parameters.items():
        # Both round the same float32 master, which differs by summation order alone: at most one bf16 unit.
        assert torch.allclose(trained.parameters[name].float(), p, rtol=2**-7, atol=2**-10)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_captured_steps_cast_as_eager_ones_do(microbatches):
    cast = case(autocast=torch.bfloat16, microbatches=microbatches)
    eager, captured = cast.metagradient(trace=False), cast.metagradient(trace=True)
    assert captured.report.execution == "captured"
    assert same(eager, captured)


def test_running_statistics_are_kept_in_full_precision_under_autocast():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(64, 3))
    conv = supervised(net, (1, 6, 6), 1, optimizer=SGD(lr=0.1)).to(torch.float32)
    conv = conv.but(autocast=torch.bfloat16)
    plain = copy.deepcopy(conv.model)
    with torch.autocast("cpu", torch.bfloat16):
        plain(conv.batches[0][0])
    trained = conv.function().train(conv.z)
    for name, buffer in plain.named_buffers():
        # float32 on both sides: sums in another order.
        assert torch.allclose(trained.buffers[name], buffer, rtol=1e-5, atol=1e-6), name
