"""Grouped matrix products are a loop over their groups, with derivatives of any order."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mgd_kernels.functional import grouped_mm


def operands(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g, dtype=dtype, requires_grad=True) for shape in ((6, 3), (4, 3, 2))]


@pytest.mark.parametrize("ends", [[1, 3, 4, 6], [0, 2, 2, 6], [0, 0, 3, 5]], ids=["full", "empty groups", "rest"])
def test_a_loop_over_groups(ends):
    x, w = operands()
    offs = torch.tensor(ends, dtype=torch.int32)
    y = grouped_mm(x, w, offs)
    starts = [0, *ends[:-1]]
    expected = [x[start:end] @ w[i] for i, (start, end) in enumerate(zip(starts, ends, strict=True))]
    torch.testing.assert_close(y, torch.cat([*expected, y.new_zeros(len(x) - ends[-1], 2)]))
    function = lambda x, w: grouped_mm(x, w, offs).sin()
    assert gradcheck(function, (x, w)) and gradgradcheck(function, (x, w))


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
def test_torch_agrees():
    x, w = (tensor.detach() for tensor in operands(torch.float32))
    x, w = x.repeat(1, 4), w.repeat(1, 4, 4)  # torch wants rows of 16 bytes
    offs = torch.tensor([1, 3, 3, 6], dtype=torch.int32)
    torch.testing.assert_close(grouped_mm(x, w, offs), torch.nn.functional.grouped_mm(x, w, offs=offs))


def test_transposed_weights_and_a_trace():
    x, w = operands()
    offs = torch.tensor([1, 3, 4, 6])
    transposed = w.detach().transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(grouped_mm(x, transposed, offs), grouped_mm(x, w, offs))
    torch.library.opcheck(torch.ops.mgd_kernels.grouped_rows.default, (x, w, offs))
    torch.library.opcheck(torch.ops.mgd_kernels.grouped_weights.default, (x, grouped_mm(x, w, offs).detach(), offs))
