"""Device graphs of functions of tensors, by an emulated recorder: which calls run by a recording, to which bits."""

from __future__ import annotations

import warnings

import pytest
import torch
from emulated_graphs import Emulated, emulated
from torch import Tensor, fx, nn

from mgd.autodiff import device_graphs, device_recording
from mgd.autodiff.device_graphs import CALLS, KINDS, MOVES, DeviceGraph, DeviceGraphs
from mgd.autodiff.device_recording import Packed


@pytest.fixture(autouse=True)
def on_the_cpu():
    with emulated("cpu"):
        yield


def graph(run, *pieces: int, constants=()) -> DeviceGraph:
    return DeviceGraph(DeviceGraphs(), run, pieces or (1,), constants)


def fresh(*shape: int) -> Tensor:
    """Random numbers at an address that nothing else has."""
    fresh.held.append(torch.randn(*shape))
    return fresh.held[-1]


fresh.held = []


def warm(f: DeviceGraph, *shapes: tuple[int, ...]) -> None:
    """Up to the first call that was confirmed."""
    for _ in range(CALLS + 1):
        f(*[fresh(*shape) for shape in shapes])
    (recording,) = f.recordings.values()
    assert recording.confirmed and Emulated.made == 1 and Emulated.replays == 1


def test_a_call_runs_by_its_recording_to_the_same_bits():
    runs = []
    f = graph(lambda x, y: (runs.append(0), [x @ y, (x @ y).sum(0)])[1], 2)
    warm(f, (3, 4), (4, 5))
    count = len(runs)
    for _ in range(3):
        x, y = fresh(3, 4), fresh(4, 5)
        found = f(x, y)
        assert torch.equal(found[0], x @ y) and torch.equal(found[1], (x @ y).sum(0))
    assert len(runs) == count and Emulated.replays == 4


def test_what_was_handed_out_is_nobody_elses():
    f = graph(lambda x: [x + 1, x * 2, x * 3], 1, 2)
    warm(f, (4,))
    inputs = [fresh(4) for _ in range(3)]
    found = [f(x) for x in inputs]
    for x, (a, b, c) in zip(inputs, found, strict=True):
        assert torch.equal(a, x + 1) and torch.equal(b, x * 2) and torch.equal(c, x * 3)
    a, b, c = found[0]
    assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() == c.untyped_storage().data_ptr()
    b.add_(1)
    assert (b._version, c._version) == (1, 0)


LAYOUTS = {
    "transposed": lambda x: x.t() * 2,
    "expanded": lambda x: x.sum().expand(3, 2),
    "part": lambda x: (x * 2)[1:, 2:],
    "zero": lambda x: x.sum(),
    "empty": lambda x: x[:0] * 1,
    "mask": lambda x: x > 0,
    "half": lambda x: x.to(torch.bfloat16),
    "double": lambda x: x.double(),
    "index": lambda x: x.argmax(1),
    "complex": lambda x: torch.complex(x, x),
}


def test_outputs_of_every_layout():
    """Their strides and dtypes are those of a plain call; None and inputs stay what they are."""
    run = lambda x, y: [*[layout(x) for layout in LAYOUTS.values()], None, y]
    f = graph(run, len(LAYOUTS) + 2)
    warm(f, (4, 6), (2,))
    x, y = fresh(4, 6), fresh(2)
    *found, none, same = f(x, y)
    assert none is None and same is y and Emulated.replays == 2
    for name, a, b in zip(LAYOUTS, found, run(x, y), strict=False):
        assert torch.equal(a, b) and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), name


def test_inputs_of_every_layout():
    f = graph(lambda x, y, z: [x @ y, z.sum()], 2)
    make = lambda: (fresh(4, 3).t(), fresh(4, 6)[:, 1:4], fresh(2, 0))
    for _ in range(CALLS + 1):
        f(*make())
    x, y, z = make()
    assert torch.equal(f(x, y, z)[0], x @ y) and Emulated.replays == 2


def test_the_last_outputs_of_one_part_are_taken_by_another_as_one_tensor():
    owner = DeviceGraphs()
    first = DeviceGraph(owner, lambda x: [x.sum(), x * 2, x > 0, x.t() * 3], (1, 3), (), True)
    second = DeviceGraph(owner, lambda y, double, mask, triple: [y + double * mask + triple.t()], (1,), ())
    kept = []
    for _ in range(3 * CALLS):
        x = fresh(3, 4)
        kept.append((x, first(x)[1:]))
    assert [len(each) for _, each in kept] == [3] * (CALLS + 1) + [1] * (2 * CALLS - 1)
    for x, each in kept:
        y = fresh(3, 4)
        assert torch.equal(second(y, *each)[0], y + x * 2 * (x > 0) + x * 3)
    packed = kept[-1][1][0]
    moved = Packed(torch.cat([torch.zeros(8, dtype=torch.int64), packed.memory])[8:], packed.layout)
    assert all(map(torch.equal, packed.tensors(), moved.tensors()))
    assert Emulated.made == owner.made == 3  # the second part, for lists and for one tensor


def test_a_nan_is_a_bit_pattern():
    f = graph(lambda x: [x / x])
    for x in [torch.zeros(3), *[fresh(3) for _ in range(CALLS - 1)], torch.zeros(3), fresh(3)]:
        f(x)
    assert Emulated.replays == 2 and not f.owner.given_up


def test_random_numbers_are_those_of_the_call():
    f = graph(lambda x: [nn.functional.dropout(x, 0.5)])
    for seed in [0, 1, 2, 3, 4, 3, 4]:
        x = fresh(50)
        torch.manual_seed(seed)
        found, after = f(x)[0], torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(found, nn.functional.dropout(x, 0.5)) and torch.equal(after, torch.rand(1)), seed
    assert Emulated.replays == 4


# --- what stays where it is ----------------------------------------------------------------------------------------


def test_an_input_is_read_where_it_is_until_it_moves():
    weight = fresh(4)
    f = graph(lambda w, x: [w * x])
    for _ in range(CALLS + 2):
        weight.add_(1)
        x = fresh(4)
        assert torch.equal(f(weight, x)[0], weight * x)
    (recording,) = f.recordings.values()
    assert [i for i, _ in recording.still] == [0] and Emulated.replays == 2
    for moved in range(MOVES + 2):  # once it has moved it is copied
        other, x = fresh(4), fresh(4)
        assert torch.equal(f(other, x)[0], other * x), moved
    (recording,) = f.recordings.values()
    assert recording.still == [] and Emulated.made == 2 == f.owner.made + 1 and Emulated.replays == 2 + MOVES + 1


def test_inputs_that_move_one_by_one_are_all_copied_in_the_end():
    kept = [fresh(4) for _ in range(6)]
    f = graph(lambda *x: [sum(x)])
    for moved in range(6):
        for _ in range(CALLS):
            assert torch.equal(f(*kept)[0], sum(kept))
        kept[moved] = fresh(4)
    assert Emulated.made == MOVES + 2


def test_calls_of_another_kind_have_recordings_of_their_own():
    f = graph(lambda x: [x * 2])
    for shape in [(3,), (4,), (3, 1)]:
        for _ in range(CALLS + 2):
            x = fresh(*shape)
            assert torch.equal(f(x)[0], x * 2)
    memory = fresh(64)
    for _ in range(CALLS + 2):  # another alignment, for which kernels may round otherwise
        assert torch.equal(f(memory[1:4])[0], memory[1:4] * 2)
    assert Emulated.made == f.owner.made == len(f.recordings) == 4 == KINDS and f.owner.left_out is None
    for _ in range(CALLS + 2):
        assert torch.equal(f(x[:2])[0], x[:2] * 2)
    assert Emulated.made == 4 and "at most 4 shapes" in f.owner.describe()


SETTINGS = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]


@pytest.mark.parametrize(("where", "name"), [*SETTINGS, (torch.backends.cudnn, "enabled")])
def test_a_setting_that_chooses_kernels_makes_another_kind(where, name):
    before = getattr(where, name)
    setattr(where, name, before)  # torch tells one that was set from one that was not
    f = graph(lambda x: [x * 2])
    warm(f, (3,))
    try:
        setattr(where, name, not before)
        f(fresh(3))
        assert Emulated.replays == 1
    finally:
        setattr(where, name, before)
    f(fresh(3))
    assert Emulated.replays == 2


# --- what is not recorded ------------------------------------------------------------------------------------------

OUTSIDE = torch.ones(3)
library = torch.library.Library("device_graphs_test", "DEF")
library.define("double(Tensor x) -> Tensor")
library.impl("double", lambda x: x * 2, "CPU")

REFUSED = {
    "a number of data": (lambda x: [x * x.sum().item()], "_local_scalar_dense"),
    "a shape of data": (lambda x: [x.nonzero()], "nonzero"),
    "a mask": (lambda x: [x[x > 0]], "mask"),
    "a mask that is written to": (lambda x: [x.clone().index_put((x > 0,), x.sum())], "mask"),
    "another tensor": (lambda x: [x + OUTSIDE], "reads another tensor"),
    "somebody's operator": (lambda x: [torch.ops.device_graphs_test.double(x)], "device_graphs_test"),
    "a write": (lambda x: [x.mul_(1)], "writes to it"),
    "a number": (lambda x: [x * 2, 3], "a number among the outputs"),
    "another device": (lambda x: [x * 2, torch.empty(2, device="meta")], "plain tensors on cpu"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_a_recording_would_freeze_runs_as_it_is(why):
    run, said = REFUSED[why]
    f = graph(run, 2)
    for _ in range(2 * CALLS):
        x = fresh(3)
        assert all(torch.equal(a, b) for a, b in zip(f(x), run(x), strict=True) if a is not b and not a.is_meta)
    assert Emulated.made == 0 and said in f.owner.describe()


def test_numbers_among_the_inputs():
    f = graph(lambda x, n: [x * n])
    assert [float(f(torch.ones(()), n)[0]) for n in range(6)] == [0, 1, 2, 3, 4, 5]
    assert Emulated.made == 0 and "a number among the inputs" in f.owner.describe()


def test_constants_of_a_graph_may_be_read():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("two", torch.full((3,), 2.0))

        def forward(self, x):
            return [x + self.two]

    owner = DeviceGraphs()
    f = owner.direct(fx.symbolic_trace(Adds()), 1)
    for _ in range(CALLS + 2):
        x = fresh(3)
        assert torch.equal(f(x)[0], x + 2)
    assert Emulated.replays == 2 and owner.made == 1


def test_an_error_of_the_recorder_is_said_and_ends_it():
    class Failing(Emulated):
        failing = RuntimeError("operation not permitted when stream is capturing")

    with emulated("cpu", Failing):
        f = graph(lambda x: [nn.functional.dropout(x, 0.5)])
        for seed in range(6):
            torch.manual_seed(seed)
            found, after = f(torch.ones(9))[0], torch.rand(1)
            torch.manual_seed(seed)
            assert torch.equal(found, nn.functional.dropout(torch.ones(9), 0.5)) and torch.equal(after, torch.rand(1))
    assert f.refused and "stream is capturing" in f.owner.describe() and not f.owner.bytes


def test_an_interrupt_passes_and_leaves_no_half_of_a_recording():
    class Interrupted(Emulated):
        failing = KeyboardInterrupt()

    f = graph(lambda x: [x * 2])
    with emulated("cpu", Interrupted):
        for _ in range(CALLS - 1):
            f(fresh(3))
        with pytest.raises(KeyboardInterrupt):
            f(fresh(3))
    Interrupted.failing = None
    for _ in range(3):
        x = fresh(3)
        assert torch.equal(f(x)[0], x * 2)
    assert Emulated.made == 1 and f.owner.made == 1


def test_limits(monkeypatch):
    monkeypatch.setattr(device_graphs, "MOST", 1)
    owner = DeviceGraphs()
    first, second = (DeviceGraph(owner, lambda x: [x * 2], (1,), ()) for _ in range(2))
    for _ in range(CALLS + 1):
        first(fresh(100)), second(fresh(100))
    assert owner.made == 1 and "at most 1 recordings" in owner.describe() and owner.bytes >= 3 * 400
    for name, said in (("LARGEST", "at most 1.2 kB"), ("TOGETHER", "and of 1.2 kB with all others")):
        with monkeypatch.context() as patched:
            patched.setattr(device_graphs, name, 1200)
            for size, made in ((100, 1), (1000, 0)):
                f = graph(lambda x: [x * 2])
                for _ in range(CALLS):
                    f(fresh(size))
                assert f.owner.made == made, (name, size)
            assert said in f.owner.describe()


def test_they_can_be_switched_off():
    f = graph(lambda x: [x * 2])
    with device_graphs.switched(False):
        for _ in range(2 * CALLS):
            f(fresh(3))
    assert not Emulated.made
    warm(f, (3,))
    with device_graphs.switched(False):
        f(fresh(3))
    assert Emulated.replays == 1


# --- the first call of a recording is compared ---------------------------------------------------------------------


def test_a_recording_with_other_bits_ends_all_of_them():
    count = iter(range(1000))
    owner = DeviceGraphs()
    bad = DeviceGraph(owner, lambda x: [x * next(count)], (1,), ())
    good = DeviceGraph(owner, lambda x: [x * 2], (1,), ())
    for _ in range(CALLS):
        bad(fresh(3)), good(fresh(3))
    good(fresh(3))
    with pytest.warns(RuntimeWarning, match="other bits"):
        bad(fresh(3))
    replays = Emulated.replays
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good(fresh(3)), bad(fresh(3))
    assert Emulated.replays == replays and owner.describe().startswith("; launched one by one")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_an_input_that_is_not_copied_is_seen(dtype, monkeypatch):
    class Stale(device_recording.Recording):
        def _copy_in(self, inputs):
            if not hasattr(self, "_replay"):  # as it was recorded, it stays
                super()._copy_in(inputs)

    monkeypatch.setattr(device_graphs, "Recording", Stale)
    f = graph(lambda x, y: [x + y])
    with pytest.warns(RuntimeWarning, match="other bits"):
        for i in range(CALLS + 1):
            x, y = fresh(3).to(dtype) + i, fresh(3)
            assert torch.equal(f(x, y)[0], x + y)


def test_random_numbers_that_are_not_drawn_are_seen():
    class Skipping(Emulated):
        def record(self, run):
            replay = super().record(run)

            def skipping():
                state = torch.get_rng_state()
                replay()
                torch.set_rng_state(state)

            return skipping

    with emulated("cpu", Skipping), pytest.warns(RuntimeWarning, match="other bits"):
        f = graph(lambda x: [nn.functional.dropout(x, 0.5)])
        for _ in range(CALLS + 1):
            f(fresh(9))
