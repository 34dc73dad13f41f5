"""What could make a kept graph wrong, larger than it was measured, or of no use: it is seen, or nothing is kept."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import generator, indices, lstm, mlp, seeded, supervised, weighted, weights
from same_bits import same
from torch import nn
from torch.utils.checkpoint import checkpoint

import mgd
from mgd.autodiff.eager import EagerEvaluator
from mgd.autodiff.kept_graph import AutogradResiduals, KeptGraphs
from mgd.step.batches import _sums


class Counts:
    """Evaluations whose graph was to be kept, those that were measured, and second derivatives that came of a graph."""

    def __init__(self, monkeypatch):
        self.keep = self.measured = self.used = self.held = 0
        gradient, second = EagerEvaluator._gradient, AutogradResiduals.second_derivatives

        def noted(evaluator, *given, **kinds):
            self.keep += kinds.get("keep") is not None
            self.measured += kinds.get("measure") is not None
            return gradient(evaluator, *given, **kinds)

        def read(residuals, *given):
            self.held = max(self.held, residuals.held)
            found = second(residuals, *given)
            self.used += found is not None
            return found

        monkeypatch.setattr(EagerEvaluator, "_gradient", noted)
        monkeypatch.setattr(AutogradResiduals, "second_derivatives", read)


@pytest.fixture
def counts(monkeypatch):
    return Counts(monkeypatch)


def assert_as_without(make, **options):
    """The bits of a training whose steps are all evaluated twice. Returns what was found."""
    found = make().metagradient(trace=False, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptGraphs, "pays", lambda self, held: False)
        assert same(found, make().metagradient(trace=False, **options))
    return found


def with_steps(case, **changes):
    """The number of the step is the last tensor of each batch."""
    return case.but(batches=[(*b, torch.tensor(t)) for t, b in enumerate(case.batches)], **changes)


# --- what a backward pass reads while it runs ---------------------------------------------------------------------


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, module):
        ctx.save_for_backward(x)
        ctx.module = module
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g @ ctx.module.weight, g.T @ x, None


class ReadsItsModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(Linear.apply(x, self.second.weight, self.second)))


class ReadsInHook(nn.Module):
    """A buffer that the loss writes to."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.calls += 1
        x = torch.tanh(self.first(x))
        x.register_hook(lambda g: g * (1 + 0.1 * self.calls))
        return self.last(torch.tanh(x))


@pytest.mark.parametrize("module", [ReadsItsModule, ReadsInHook])
def test_the_model_holds_its_tensors_where_a_graph_is_read(module, counts):
    model = seeded(module)()
    assert_as_without(lambda: supervised(model, (5,)).but(z={"data_weights": weights()}, loss=weighted))
    assert counts.used == 6


class Late(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.body, self.inside = mlp(), inside

    def forward(self, x, on):
        return self.inside(self.body, x) if on else self.body(x)


def offloaded(body, x):
    with torch.autograd.graph.save_on_cpu():
        return body(x)


@pytest.mark.parametrize("inside", [lambda body, x: checkpoint(body, x, use_reentrant=False), offloaded])
def test_hooks_of_saved_tensors_from_a_later_step_on(inside, counts):
    """A checkpoint would compute activations again with other parameters, of which the gradient shows nothing."""
    model = Late(inside)

    def late(m, b, z):
        return F.cross_entropy(m(b[0], int(b[3]) >= 3), b[1])

    data = supervised(mlp(), (5,))
    held = data.batches[0][0]
    assert_as_without(
        lambda: with_steps(data, model=model, loss=late, objective=lambda m: m(held, False).square().mean())
    )
    assert counts.used == 2


def test_hooks_of_saved_tensors_around_the_call(counts):
    with torch.autograd.graph.save_on_cpu():
        assert_as_without(lambda: supervised(mlp(), (5,)))
    assert counts.used == 0


# --- memory that is written past autograd -------------------------------------------------------------------------

X = torch.randn(20, 5, generator=generator(), dtype=torch.float64)
Y = torch.randint(0, 3, (20,), generator=generator())


class Ring:
    """Batches in one array of NumPy. wrap: what a batch is."""

    def __init__(self, arrays, wrap):
        self.arrays, self.wrap = arrays, wrap
        self.memory = np.zeros_like(arrays[0])

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, t):
        self.memory[:] = self.arrays[t]
        return self.wrap(self.memory)


def looked_up(m, b, z):
    i = torch.as_tensor(b[0])
    return (z["data_weights"][i] * F.cross_entropy(m(X[i]), Y[i], reduction="none")).mean()


@pytest.mark.parametrize("numbers", [torch.from_numpy, lambda x: x], ids=["tensor", "array"])
def test_indices_in_memory_that_is_used_again(numbers, counts):
    """Neither the loss nor its gradient depends on who has which weight, where all are equal."""
    examples = [x.numpy() for x in indices(8, 6, 20)]
    z = {"data_weights": torch.ones(20, dtype=torch.float64)}
    case = supervised(mlp(), (5,)).but(z=z, loss=looked_up)
    assert_as_without(lambda: case.but(batches=Ring(examples, lambda x: (numbers(x), torch.ones(6)))))
    assert counts.keep == 1


def test_what_only_metaparameters_read_in_memory_that_is_used_again(counts):
    base = supervised(mlp(), (5,)).but(z={"c": torch.zeros((), dtype=torch.float64)})
    x, y, _ = base.batches[0]

    def loss(m, b, z):
        each = F.cross_entropy(m(x), y, reduction="none")
        return each.mean() + z["c"] * (b[0] * each).mean()

    arrays = list(np.random.default_rng(0).standard_normal((8, 6)))
    assert_as_without(lambda: base.but(loss=loss, batches=Ring(arrays, lambda a: (torch.from_numpy(a),))))
    assert counts.keep == 1


def test_outside_memory_that_changes_by_little():
    """What a loss reads beside its batch: no rounding hides it, since the plain evaluation's terms are taken."""
    case = with_steps(supervised(mlp(), (5,)))
    x, y, _, _ = case.batches[0]
    memory = np.zeros(tuple(x.shape))

    def loss(m, b, z):
        memory[:] = x.numpy() * (1 + 1e-9 * int(b[3]))
        return F.cross_entropy(m(torch.from_numpy(memory)), y)

    assert_as_without(lambda: case.but(loss=loss))


def test_long_arrays_are_told_apart():
    x = torch.randn(100_003)
    y, z, swapped = x.clone(), x.clone(), x.clone()
    y[70_000] += 1e-6
    z[-1] += 1e-6
    swapped[[5, 6]] = swapped[[6, 5]]
    assert _sums(x) == _sums(x.clone()) and len({_sums(each) for each in (x, y, z, swapped)}) == 4


# --- a graph unlike the one that was measured ---------------------------------------------------------------------


def zero_head(model, head):
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["groupnorm", "silu", "lstm"])
def test_below_a_last_layer_of_zeros_equal_bits_say_nothing(name, dtype):
    if name == "lstm":
        model, shape = lstm(), (4, 5)
        head = model.head
    elif name == "silu":
        model = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 8), nn.Mish(), nn.Linear(8, 3)))()
        head, shape = model[4], (5,)
    else:
        layers = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(64, 3)
        model = seeded(lambda: nn.Sequential(*layers))()
        head, shape = model[4], (1, 6, 6)
    zero_head(model, head)
    assert_as_without(lambda: supervised(model, shape).to(dtype))


class Switching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3)

    def forward(self, x, on):
        x = self.first(x)
        return self.last(F.silu(self.norm(x)) if on else torch.tanh(x))


def test_operators_from_a_later_step_on(counts):
    model, data = seeded(Switching)(), supervised(mlp(), (5,))
    held = data.batches[0][0]

    def loss(m, b, z):
        return F.cross_entropy(m(b[0], int(b[3]) >= 3), b[1])

    assert_as_without(
        lambda: with_steps(data, model=model, loss=loss, objective=lambda m: m(held, True).square().sum())
    )
    assert counts.used == 2


def test_a_graph_that_grows_with_a_number_in_the_batch(counts):
    """Of the same shapes."""

    def loss(m, b, z):
        n = 1 if int(b[3]) == 0 else 6
        return F.cross_entropy(m(b[0][:n]), b[1][:n])

    case = with_steps(supervised(mlp(), (5,)), loss=loss)
    case.metagradient(trace=False)
    few = case.but(loss=lambda m, b, z: F.cross_entropy(m(b[0]), b[1]))
    grown, counts.held = counts.held, 0
    few.metagradient(trace=False)
    assert grown >= counts.held > 0 and counts.measured == 3


def test_nested_batches():
    """Their shapes cannot be compared."""
    base, g = supervised(mlp(), (5,), 6), generator(3)

    def batch(t):
        parts = [torch.randn(3 + (i + t) % 3, 5, generator=g, dtype=torch.float64) for i in range(4)]
        return torch.nested.nested_tensor(parts, layout=torch.jagged), torch.randint(0, 3, (4,), generator=g)

    def loss(m, b, z):
        out, rows = m(b[0].values()), torch.repeat_interleave(torch.arange(4), b[0].offsets().diff())
        return F.cross_entropy(torch.zeros(4, 3, dtype=out.dtype).index_add(0, rows, out), b[1])

    batches = [batch(t) for t in range(6)]
    assert_as_without(lambda: base.but(batches=batches, loss=loss))


def test_what_is_there_anyway_does_not_count(counts):
    """Batches that are views of a data set, parameters, frozen ones: what is saved of them is not the graph's own."""
    x, y = torch.randn(8000, 5, dtype=torch.float64), torch.randint(0, 3, (8000,))
    base = supervised(mlp(), (5,))
    base.but(batches=[(x[6 * t : 6 * t + 6], y[6 * t : 6 * t + 6]) for t in range(8)]).metagradient(trace=False)
    assert counts.used == 6 and counts.held < 10_000 < x.nbytes


def test_autograd_is_asked_what_was_changed_in_place():
    """It does not look under the hooks by which the first step is measured."""

    def loss(m, b, z):
        hidden = torch.sigmoid(m[0](b[0]))
        out = m[3](hidden)
        if int(b[3]) == 0:
            hidden.mul_(2.0)
        return F.cross_entropy(out, b[1])

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        with_steps(supervised(mlp(), (5,)), loss=loss).metagradient(trace=False)


# --- what does not pay --------------------------------------------------------------------------------------------


def test_one_evaluation_finds_out_that_nothing_can_be_kept(counts):
    teacher = mlp()
    supervised(mlp(), (5,)).but(loss=lambda m, b, z: F.mse_loss(m(b[0]), teacher(b[0]))).metagradient(trace=False)
    assert (counts.keep, counts.measured) == (0, 1)


def test_batches_that_grow_are_not_measured_for_ever(counts):
    case = supervised(mlp(), (5,), 12, batch=20)
    case = case.but(batches=[tuple(x[: 6 + t] for x in batch) for t, batch in enumerate(case.batches)])
    case.metagradient(trace=False)
    assert (counts.keep, counts.measured) == (0, 5)


def test_short_trainings(counts):
    """Of two steps the first may keep its graph, once one was measured; if it is read at all."""
    case = supervised(mlp(), (5,), 2)
    f = case.function(trace=False)
    for measured in (0, 1, 1):
        f.metagradient(case.z)
        assert (counts.keep, counts.measured) == (0, measured)
    case = case.but(z={"data_weights": weights()}, loss=weighted)
    f = case.function(trace=False)
    for keep, measured in ((0, 1), (0, 2), (1, 2)):
        f.metagradient(case.z)
        assert (counts.keep, counts.measured) == (keep, measured)


@pytest.mark.parametrize("size", [10_000, 11_000, 12_000, 13_000, 14_000, 15_000])
def test_a_full_cache_is_offered_nothing(size, counts):
    supervised(mlp(), (5,), 16).metagradient(trace=False, budget=mgd.Budget(host=f"{size}B"))
    assert 0 < counts.used <= counts.keep <= counts.used + 1


# --- afterwards ---------------------------------------------------------------------------------------------------


class Tagged(torch.autograd.Function):
    """Whose contexts live as long as the graph."""

    alive = 0

    @staticmethod
    def forward(ctx, x):
        ctx.tag = Tag()
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Tag:
    def __init__(self):
        Tagged.alive += 1

    def __del__(self):
        Tagged.alive -= 1


@pytest.mark.parametrize("retains", [False, True])
def test_no_graph_is_alive_after_an_interruption(retains):
    """A tensor that retains a gradient with a graph is held by it."""

    def loss(m, b, z):
        if int(b[3]) == 6:
            raise KeyboardInterrupt
        hidden = Tagged.apply(m[0](b[0]))
        if retains:
            hidden.retain_grad()
        return F.cross_entropy(m[3](torch.tanh(hidden)), b[1])

    with pytest.raises(KeyboardInterrupt):
        with_steps(supervised(mlp(), (5,)), loss=loss).metagradient(trace=False)
    gc.collect()
    assert Tagged.alive == 0
