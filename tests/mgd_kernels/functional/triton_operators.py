"""Triton's operators against torch in float64; `test_triton_operators.py` runs this file.

On a GPU where there is one, else in Triton's interpreter, which needs a process that sets TRITON_INTERPRET=1 before
anything imports triton. There the operators take the CPU's tensors for a GPU's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import quick_interpreter  # noqa: F401
import torch
import torch.nn.functional as F
from operator_cases import CASES, Case, check_against_float64, derivatives
from test_fused_numbers import EXTREMES

sys.path.append(str(Path(__file__).parents[2] / "mgd" / "device"))
import pretended

import mgd
from mgd_kernels import SGD, functional
from mgd_kernels.backends import triton_channel_norm, triton_nn
from mgd_kernels.functional import _library, loss
from mgd_kernels.functional import attention as whole

GPU = torch.cuda.is_available()
PRETENDS = not GPU and pretended.missing() is None
if PRETENDS:  # before autograd is used
    pretended.load()
NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")
KINDS = ("gelu", "silu", "tanh", "sigmoid", *NORMS, "softmax", "attention", "cross_entropy")
# Of many rows and columns none, where the interpreter takes them.
SLOW = "-130x40 -1037 -16 -40x64 -plain -33x33-True -seen-7x40 -20x6-True -5x9-False -2x3x1x33 group_norm-70".split()
NAMES = [name for name in CASES if name.startswith(KINDS) and (GPU or not any(x in name for x in SLOW))]


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> list[str]:
    """The kernels' names as they are launched."""
    found: list[str] = []
    if not GPU:
        monkeypatch.setattr(_library, "on_gpu", lambda x: True)
    monkeypatch.setattr(whole, "served_by_tiles", lambda *_: False)  # its tests are in triton_tiles.py
    kernels = [(triton_nn, name) for name in ("activation", "row_norm", "softmax")]
    for module, name in (*kernels, (triton_channel_norm, "channel_norm"), (loss, "TritonRows")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real, **k: (found.append(name), real(*a, **k))[1])
    return found


def there(case: Case) -> Case:
    """The case on the GPU, if there is one; what its functions hold is not moved."""
    return Case(case.ours, case.theirs, [x.cuda() for x in case.inputs], case.operator) if GPU else case


@pytest.mark.parametrize("name", NAMES)
def test_values_gradients_and_second_derivatives(name, launches):
    if GPU and ("seen" in name or name.startswith("cross_entropy")):
        pytest.skip("its mask or its target is the CPU's")
    check_against_float64(there(CASES[name]))
    assert launches


def test_a_norm_without_weights():
    check_against_float64(there(CASES["rms_norm-4x3x11-plain"]))


def test_sums_over_rows_of_several_programs():
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(18, 3, generator=g), torch.randn(3, generator=g), torch.randn(3, generator=g)]
    pair = [lambda x, w, b, f=f: f(x, (3,), w, b) for f in (functional.layer_norm, F.layer_norm)]
    check_against_float64(there(Case(*pair, inputs, "layer_norm")))


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("name", ["group_norm-4x8x5x5", "batch_norm-4x8x5x5"])
def test_sets_of_several_tiles(name, block, monkeypatch):
    monkeypatch.setattr(triton_channel_norm._kernels(), "BLOCK", block)
    check_against_float64(there(CASES[name]))


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])
def test_activations_in_the_tails(name):
    case, x = CASES[name + "-1"], torch.tensor(EXTREMES, device="cuda" if GPU else "cpu")
    for got, value in zip(derivatives(case.ours, [x]), derivatives(case.theirs, [x], torch.float64), strict=True):
        assert got.isfinite().all()
        inside = value.isfinite()
        torch.testing.assert_close(got[inside].double(), value[inside], rtol=1e-6, atol=4e-7)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of what is looked for
def test_not_a_number_and_infinity_come_through():
    x = torch.tensor([1.0, float("nan")] * 9, device="cuda" if GPU else "cpu")
    for function in (functional.gelu, functional.silu, functional.tanh, functional.sigmoid):
        assert torch.equal(function(x).isnan(), x.isnan())
    assert functional.softmax(x, 0).isnan().all()
    x = torch.tensor([[float("-inf"), 0.0, 1e4, 1e4 - 1], [float("-inf")] * 3 + [-3.0]], device=x.device)
    torch.testing.assert_close(functional.softmax(x, -1), F.softmax(x.double(), -1).float(), rtol=1e-6, atol=0)
    assert functional.softmax(torch.full_like(x, float("-inf")), -1).isnan().all()


def test_rows_that_are_too_wide_are_torchs(launches):
    x = torch.randn(2, triton_nn._kernels().WIDEST + 1, device="cuda" if GPU else "cpu")
    assert triton_nn.serves(x.shape[1] - 1) and not triton_nn.serves(x.shape[1])
    if GPU:
        functional.softmax(x, -1), functional.layer_norm(x, x.shape[1:])
        assert not launches


# --- On a device -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PRETENDS, reason="the pretended device stands for a GPU")
def test_a_captured_step_on_a_device_uses_them(launches, monkeypatch):
    """Of a training there, whose operators the interpreter computes; its metagradient is the CPU's."""
    monkeypatch.setattr(_library, "on_gpu", lambda x: not x.is_cpu)
    monkeypatch.setitem(_library.GPUS, "pretend", "PrivateUse1")
    library = torch.library.Library("mgd_kernels", "IMPL")
    for name, kernel in _library.GPU_KERNELS.items():
        library.impl(name, kernel, "PrivateUse1")
    found = {}
    for device in ("cpu", "pretend:0"):
        torch.manual_seed(0)
        x, y = torch.randn(2, 3, 5), torch.randint(3, (2, 3))
        layers = [torch.nn.Linear(5, 6), torch.nn.GELU(), torch.nn.LayerNorm(6), torch.nn.Unflatten(1, (2, 3))]
        layers += [torch.nn.BatchNorm1d(2), torch.nn.GroupNorm(1, 2), torch.nn.Flatten(), torch.nn.Linear(6, 3)]
        model, x, y = torch.nn.Sequential(*layers).to(device), x.to(device), y.to(device)

        def loss(model, batch, z):
            return z["scale"] * (1 - F.softmax(model(batch[0]), -1).gather(1, batch[1][:, None])).mean()

        f = mgd.TrainingFunction(
            model,
            loss,
            list(zip(x, y, strict=True)),
            optimizer=SGD(lr=0.1, momentum=0.9),
            objective=lambda model, x=x, y=y: F.cross_entropy(model(x[0]), y[0]),
            trace=True,
        )
        result = f.metagradient({"scale": torch.tensor(2.0, device=device), "lr": torch.full((2,), 0.1)})
        assert result.report.execution == "captured"
        found[device] = [result.value, *result.grads.values()]
        every = {"activation", "row_norm", "channel_norm", "softmax", "TritonRows"}
        assert set(launches) == (set() if device == "cpu" else every)
    for ours, theirs in zip(found["pretend:0"], found["cpu"], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-4, atol=1e-7)
