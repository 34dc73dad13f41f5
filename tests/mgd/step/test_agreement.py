"""What the inner product of a gradient and a direction may differ by."""

import math

import torch

from mgd.step.agreement import discrepancy_of


def test_discrepancy_is_relative_to_both_norms():
    gradient, direction = (
        [torch.tensor([3.0]), None, torch.tensor([[4.0]])],
        [torch.ones(1), torch.ones(2), 2 * torch.ones(1, 1)],
    )
    scale = 5 * math.sqrt(5)
    assert math.isclose(discrepancy_of(torch.tensor(11.5), gradient, direction), 0.5 / scale)
    assert discrepancy_of(torch.tensor(0.0), [torch.zeros(1)], [torch.ones(1)]) == 0
