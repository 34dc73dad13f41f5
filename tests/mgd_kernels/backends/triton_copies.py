"""The copy that 16-bit models read, written by Triton's kernels; `test_triton.py` runs this file as it runs
`triton_numerics.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_numerics import DEVICE, rounded

from mgd_kernels import AdamW, Arena, use_backend


class Model16(torch.nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("a", (33, 7)), ("b", (5,)), ("c", (700,))):
            setattr(self, name, torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)))


class Casts(TorchDispatchMode):
    """Counts casts, and copies into tensors that are there."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_write_the_copy_that_a_16_bit_model_reads(dtype):
    """No step and no replay is followed by a cast, and the copy has the bits of one."""
    arena, optimizer = Arena.of(Model16(dtype)), AdamW(lr=0.03, param_groups=[{"params": "b", "lr": 0.1}])
    state = optimizer.init(arena.flatten(Model16(dtype)), arena)
    grads = [torch.randn_like(state.params).to(dtype) for _ in range(4)]
    hypers = optimizer.tables(6).to(DEVICE).unbind()
    arena.tensors(state.params)

    def casts(how) -> int:
        with Casts() as counted:
            found = arena.tensors(state.params)
        parts = arena.slices(state.params)
        assert all(torch.equal(x.cpu(), how(y.cpu(), dtype)) for x, y in zip(found, parts, strict=True))
        return counted.count

    with use_backend("triton"):
        optimizer.step_(state, grads[0], hypers[0])
        assert casts(rounded) == 0
        optimizer.replay_(state, grads[1:], torch.stack(hypers[1:4]))
        assert casts(rounded) == 0
    state.params.mul_(1.5)  # not by a kernel
    assert casts(Tensor.to) == 1 and casts(Tensor.to) == 0
