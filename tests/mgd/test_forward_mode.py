"""Forward mode: `<metagradient, dz>` is the derivative along dz, for every kind of metaparameter and optimizer."""

from __future__ import annotations

import pytest
import torch
from cases import adamw, convnet, gpt, language, mlp, supervised, weighted, weights
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import mgd
from mgd.autodiff import payoff
from mgd.autodiff.step_graph import StepGraph
from mgd.errors import BadArgument, BadLoss, BadMetaparameter, NonFiniteState
from mgd_kernels import SGD, Adam, Muon, RMSprop

EXACT = 1e-10


def drawn(z, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tree_map(lambda x: x.abs().mean() * torch.randn(x.shape, generator=generator, dtype=x.dtype), z)


def inner(x, y):
    return sum((a * b).sum() for a, b in zip(tree_leaves(x), tree_leaves(y), strict=True))


def assert_agrees(case, **options):
    f = case.function(**options)
    dz = drawn(case.z)
    reverse, forward = f.metagradient(case.z), f.jvp(case.z, dz)
    expected = inner(reverse.grads, dz)
    assert abs(forward.tangent - expected) <= EXACT * abs(expected) + 1e-14
    torch.testing.assert_close(forward.value, reverse.value, rtol=1e-12, atol=1e-14)
    return forward


OPTIMIZERS = [
    SGD(lr=0.1, weight_decay=0.01),
    SGD(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    SGD(lr=0.05, momentum=0.9, nesterov=True),
    Adam(lr=1e-2, eps=1e-3, eps_root=1e-4, weight_decay=0.02),
    adamw(param_groups=[{"params": "*.bias", "weight_decay": 0.0}]),
    RMSprop(eps_root=1e-4),
    Muon(),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_every_optimizer_and_hyperparameter(optimizer):
    case = supervised(mlp(), (5,), optimizer=optimizer)
    hypers = {
        name: torch.tensor(optimizer.defaults[name] or 0.01, dtype=torch.float64) for name in optimizer.hyper_names
    }
    case.z.clear()
    assert_agrees(case.but(hypers | {"init": {n: p.detach() for n, p in case.model.named_parameters()}}))


@pytest.mark.parametrize("trace", [False, True])
def test_schedules_weights_and_initial_parameters(trace):
    case = supervised(mlp(dropout=0.2), (5,)).but({"data_weights": weights()}, loss=weighted)
    assert_agrees(case, trace=trace)
    sliced = lambda model, batch, z: weighted(model, (*batch[:2], torch.arange(len(batch[2]))), z)
    assert_agrees(case.but(loss=sliced, per_example={"data_weights": lambda batch: batch[2]}), trace=trace)
    assert_agrees(supervised(mlp(), (5,)), trace=trace)


@pytest.mark.parametrize("trace", [False, True])
def test_running_statistics_move_too(trace):
    case = supervised(convnet(), (1, 6, 6), steps=4)
    held_out = case.but(objective=lambda m, held_out=case.objective: held_out(m.eval()))
    for forward in (
        assert_agrees(held_out, trace=trace),
        assert_agrees(case, objective_mode="train", microbatches=2, trace=trace),
    ):
        assert forward.report.execution == ("captured" if trace else "eager")


class Remembering(nn.Module):
    """Reads what its parameters were at all steps before."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.seen = torch.cat([self.seen, self.body[0].weight.sum().reshape(1)])
        return self.body(x) * (1 + 0.1 * self.seen.mean())


@pytest.mark.parametrize("trace", [None, False])
def test_buffers_that_grow(trace):
    case = supervised(Remembering(), (5,), steps=4)
    assert_agrees(case, trace=trace)
    assert_agrees(case, trace=trace, since=2)


class Late(nn.Module):
    """Gives values to a buffer that was None: a mean of what it saw, a constant, or what nobody reads in a training."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.kind = mlp(), kind
        self.register_buffer("mean", None)

    def forward(self, x):
        if self.kind.startswith("written"):
            y = self.body(x)
            if self.training:
                self.mean = y.mean(0)
            return y * self.mean if not self.training and self.kind == "written, read in the end" else y
        if self.mean is None:
            self.mean = torch.ones_like(x[0]) if self.kind == "constant" else x.detach().mean(0)
        elif self.kind == "mean":
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return self.body(x * self.mean)


class Keeping(nn.Module):
    """Keeps a table that is read, and beside it what `kind` names."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.kind = mlp(), kind
        for name in ("table", "last", "history"):
            self.register_buffer(name, None)

    def forward(self, x):
        if self.kind == "sparse":
            self.table = torch.eye(5, dtype=x.dtype).to_sparse() if self.table is None else self.table
            return self.body(torch.sparse.mm(self.table, x.t()).t())
        if self.table is None or len(self.table) < len(x):
            self.table = torch.full((len(x), 1), 2.0, dtype=x.dtype)
        y = self.body(x * self.table[: len(x)])
        if self.kind == "last":
            self.last = y.detach()
        if self.kind == "history" and self.training:
            added = y.mean().detach().reshape(1)
            self.history = added.new_zeros(0) if self.history is None else torch.cat([self.history, added])
            y = y * (1 + self.history.sum())
        return y


@pytest.mark.filterwarnings("ignore:mgd evaluates steps by autograd")
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "last", "history"])
def test_tables_beside_other_buffers(kind, trace):
    case = supervised(Keeping(kind), (5,), steps=3)
    f = case.function(trace=trace)
    if kind == "history":  # it grows by what it was, as no table does
        for call in (f.metagradient, lambda z: f.jvp(z, z)):
            with pytest.raises(BadLoss, match="'history' was None"):
                call(case.z)
        return
    expected = inner(f.metagradient(case.z).grads, case.z)
    torch.testing.assert_close(f.jvp(case.z, case.z).tangent, expected, rtol=EXACT, atol=1e-14)


@pytest.mark.filterwarnings("ignore:mgd evaluates steps by autograd")
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("kind", ["constant", "written", "written, read in the end", "mean"])
def test_a_buffer_that_is_none_at_first(kind, trace):
    case = supervised(Late(kind), (5,), steps=3)
    f = case.function(trace=trace)
    if kind in ("constant", "written"):
        expected = inner(f.metagradient(case.z).grads, case.z)
        torch.testing.assert_close(f.jvp(case.z, case.z).tangent, expected, rtol=EXACT, atol=1e-14)
        return
    for call in (f.metagradient, lambda z: f.jvp(z, z)):
        with pytest.raises(BadLoss, match="'mean' was None"):
            call(case.z)


@pytest.mark.parametrize("trace", [False, True])
def test_a_language_model_with_clipping(trace):
    forward = assert_agrees(language(steps=3), max_grad_norm=0.5, trace=trace)
    assert set(forward.model_tangent) == set(dict(gpt().named_parameters()))


# --- graphs -----------------------------------------------------------------------------------------------------


def weighted_case(**options):
    return supervised(mlp(dropout=0.2), (5,)).but({"data_weights": weights()}, loss=weighted, **options)


def graphs_of(f):
    """Whether each graph's metaparameters move, of a graph of forward mode."""
    return [graph.along for graph in f._evaluator.graphs.values()]


def test_a_graph_has_the_bits_of_the_step_and_its_derivatives():
    case = weighted_case()
    f, plain = case.function(trace=True), case.function(trace=False)
    directions = [drawn(case.z, seed) for seed in (1, 2)]
    for dz in (directions, directions[0], {"lr": case.z["lr"]}, [{"lr": case.z["lr"]}, directions[0]]):
        found, expected = f.jvp(case.z, dz), plain.jvp(case.z, dz)
        assert torch.equal(found.value, expected.value)
        torch.testing.assert_close(found.tangent, expected.tangent, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(found.model_tangent, expected.model_tangent, rtol=1e-10, atol=1e-13)
    assert graphs_of(f) == [(True,), (False,)]  # one for what moves, whatever the number of directions


def test_by_default_a_graph_is_made_once_that_pays(monkeypatch):
    case = weighted_case()
    f, dz = case.function(), drawn(case.z)
    expected = case.function(trace=False).jvp(case.z, dz)
    assert f.jvp(case.z, dz).report.execution.startswith("eager; a capture would take")
    monkeypatch.setattr(payoff, "CAUTION", 0.0)
    found = f.jvp(case.z, dz)
    assert found.report.execution == "captured" and graphs_of(f) == [(True,)]
    assert torch.equal(found.value, expected.value)
    torch.testing.assert_close(found.tangent, expected.tangent, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("trace", [None, True])
def test_a_graph_that_is_not_the_loss_as_written_is_refused(monkeypatch, trace):
    """Forward mode evaluates each step once: nothing later would show it."""
    case = weighted_case()
    dz = drawn(case.z)
    expected = case.function(trace=False).jvp(case.z, dz)
    monkeypatch.setattr(payoff, "CAUTION", 0.0)
    tangents = StepGraph.tangents

    def wrong(self, *arguments):
        found, rest = tangents(self, *arguments)
        found.gradients[0][0] = found.gradients[0][0] * 1.01
        return found, rest

    monkeypatch.setattr(StepGraph, "tangents", wrong)
    f = case.function(trace=trace)
    with pytest.warns(RuntimeWarning, match="cannot capture"):
        found = f.jvp(case.z, dz)
    assert torch.equal(found.tangent, expected.tangent)


def test_a_captured_sweep_begins_where_differentiation_does():
    case = weighted_case()
    dz = drawn(case.z)
    found = case.function(trace=True, since=3).jvp(case.z, dz)
    expected = case.function(trace=False, since=3).jvp(case.z, dz)
    torch.testing.assert_close(found.tangent, expected.tangent, rtol=1e-11, atol=1e-14)


def test_several_directions_and_outputs_share_a_sweep():
    case = supervised(mlp(), (5,))
    x = torch.randn(9, 5, dtype=torch.float64)
    f = case.but(objective=lambda model: model(x).logsumexp(1)).function()
    directions = [drawn(case.z, seed) for seed in (1, 2)]
    together = f.jvp(case.z, directions)
    assert together.tangent.shape == (2, 9) and together.value.shape == (9,)
    gradients = f.metagradient(case.z).grads["lr"]
    for i, dz in enumerate(directions):
        alone = f.jvp(case.z, dz)
        torch.testing.assert_close(together.tangent[i], alone.tangent, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(alone.tangent, gradients @ dz["lr"], rtol=1e-9, atol=1e-14)
        for name, tangent in alone.model_tangent.items():
            torch.testing.assert_close(together.model_tangent[name][i], tangent, rtol=1e-12, atol=1e-15)


def test_the_tangent_of_the_model_is_that_of_finite_differences():
    case = supervised(mlp(), (5,))
    f, dz, h = case.function(), drawn(case.z), 1e-6
    ahead, behind = (f.train({"lr": case.z["lr"] + s * h * dz["lr"]}).parameters for s in (1, -1))
    for name, tangent in f.jvp(case.z, dz).model_tangent.items():
        torch.testing.assert_close(tangent, (ahead[name] - behind[name]) / (2 * h), rtol=1e-6, atol=1e-9)


def test_float32_is_as_exact_as_reverse_mode():
    case = supervised(mlp(), (5,)).to(torch.float32)
    f, dz = case.function(), drawn(case.z)
    forward, reverse = f.jvp(case.z, dz).tangent, f.metagradient(case.z).grads["lr"]
    torch.testing.assert_close(forward, reverse @ dz["lr"], rtol=1e-4, atol=1e-7)


def test_a_penalty_on_gradients_has_third_derivatives():
    def loss(model, batch, z):
        x = batch[0].clone().requires_grad_()
        value = nn.functional.cross_entropy(model(x), batch[1])
        (g,) = torch.autograd.grad(value, x, create_graph=True)
        return value + z["penalty"] * g.square().sum()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    case = supervised(model, (5,), steps=3).but({"penalty": torch.tensor(0.1, dtype=torch.float64)}, loss=loss)
    assert_agrees(case)


@pytest.mark.parametrize(
    "dz, part",
    [
        ([], "at least one direction"),
        ({"momentum": torch.tensor(1.0)}, "'momentum'"),
        ({"lr": torch.ones(3)}, "shapes of z\\['lr'\\]"),
        ({"lr": torch.full((8,), float("nan"))}, "finite"),
    ],
)
def test_directions_that_are_none(dz, part):
    case = supervised(mlp(), (5,))
    with pytest.raises(BadMetaparameter, match=part):
        case.function().jvp(case.z, dz)


def test_a_tangent_that_grows_without_bounds_is_named():
    case = supervised(mlp(), (5,), steps=40, optimizer=SGD(lr=1.0)).to(torch.float32)
    with pytest.raises(NonFiniteState, match="tangent"):
        case.function().jvp({"lr": torch.full((40,), 1.0)}, {"lr": torch.full((40,), 3e38)})


def test_a_direction_of_another_dtype_is_as_any_other():
    case = weighted_case().to(torch.float32)
    f, dz = case.function(trace=True), drawn(case.z)
    double = f.jvp(case.z, {key: x.double() for key, x in dz.items()})
    assert double.report.execution == "captured"
    assert torch.equal(double.tangent, f.jvp(case.z, dz).tangent)


def test_a_result_of_forward_mode_goes_to_a_file(tmp_path):
    case = supervised(mlp(), (5,))
    result = case.function().jvp(case.z, case.z)
    result.save(tmp_path / "jvp")
    assert torch.equal(mgd.load(tmp_path / "jvp").tangent, result.tangent) and "tangent" in repr(result)


@pytest.mark.parametrize("dz", [None, 3, [None]])
def test_a_direction_is_a_mapping(dz):
    case = supervised(mlp(), (5,), steps=2)
    with pytest.raises(BadArgument, match="expected dz to map names"):
        case.function().jvp(case.z, dz)
