"""Buffers that a step of several microbatches changes, against what is written out here."""

import cases
import pytest
import torch
from torch import nn

from mgd.errors import BadArgument


class Keeping(nn.Module):
    """keep(buffer, output) is what it makes of its buffer."""

    def __init__(self, keep, start):
        super().__init__()
        self.linear, self.keep = cases.seeded(lambda: nn.Linear(5, cases.CLASSES))(), keep
        self.register_buffer("kept", start)

    def forward(self, x):
        y = self.linear(x)
        self.kept = self.keep(self.kept, y)
        return y


def training(keep, start=None, steps=3, **options):
    start = torch.zeros(cases.CLASSES, dtype=torch.float64) if start is None else start
    case = cases.supervised(Keeping(keep, start), (5,), steps, batch=7, microbatches=3, trace=False)
    return case.but({"init": cases.initial(case.model), "lr": torch.tensor(1e-2).double()}, **options)


def running(kept, y):
    return 0.9 * kept + 0.1 * y.mean(0)


def test_each_microbatch_begins_with_the_buffers_of_the_step_before():
    case = training(running, steps=2)
    with pytest.warns(RuntimeWarning, match="leave the buffer 'kept' differently"):
        found = case.function().train(case.z)
    first = case.but(batches=case.batches[:1])
    with pytest.warns(RuntimeWarning):
        before = first.function().train(first.z)
    expected, weight, bias = torch.zeros(cases.CLASSES, dtype=torch.float64), *case.model.linear.parameters()
    for batch, parameters in zip(case.batches, [(weight, bias), before.parameters.values()], strict=True):
        y = nn.functional.linear(batch[0], *parameters).detach()
        expected = 0.9 * expected + 0.1 * y.mean(0)  # of all examples: means of microbatches count by their lengths
    assert torch.allclose(found.buffers["kept"], expected, rtol=1e-14, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_their_derivatives():
    cases.assert_exact(training(running, objective=lambda model: model.kept.square().sum()))


def test_norms_of_torch_are_averaged_without_a_word():
    model = cases.seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, cases.CLASSES)))()
    case = cases.supervised(model, (5,), 2, batch=7, microbatches=3, trace=False)
    found = case.function().train({"init": cases.initial(case.model)})
    assert int(found.buffers["1.num_batches_tracked"]) == 2, "once a step"


@pytest.mark.parametrize("value", [0.1, float("inf"), -float("inf")])
def test_what_all_leave_is_kept_bit_by_bit(value):
    case = training(lambda kept, y: torch.full_like(kept, value))
    kept = case.function().train(case.z).buffers["kept"]
    assert torch.equal(kept, torch.full_like(kept, value))


def test_a_number_without_a_mean_must_be_left_alike():
    seen = training(lambda kept, y: kept + len(y), torch.zeros((), dtype=torch.int64))
    with pytest.raises(BadArgument, match="leave 'kept' alike"):
        seen.function().metagradient(seen.z)
    assert int(seen.but(microbatches=1).function().train(seen.z).buffers["kept"]) == 3 * 7
    steps = training(lambda kept, y: kept + 1, torch.zeros((), dtype=torch.int64))
    assert int(steps.function().train(steps.z).buffers["kept"]) == 3


def test_a_buffer_of_another_shape_is_refused():
    case = training(lambda kept, y: y.mean(1).detach())
    with pytest.raises(BadArgument, match="keep shape and dtype, with microbatches=3; a step changes those of 'kept'"):
        case.function().metagradient(case.z)


def test_the_length_of_the_log_does_not_depend_on_microbatches():
    sizes = {count: training(running, microbatches=count).function().plan().sizes.gradient for count in (1, 7)}
    assert sizes[7] == sizes[1]
