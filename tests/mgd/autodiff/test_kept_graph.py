"""Steps by autograd whose graphs are kept have the bits of those that are evaluated twice, or are evaluated twice."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import adamw, assert_exact, convnet, cross_entropy, initial, language, mlp, supervised, weighted, weights
from same_bits import same
from torch import nn
from torch.utils.checkpoint import checkpoint

import mgd
from mgd.autodiff import kept_graph
from mgd.autodiff.eager import EagerEvaluator
from mgd.autodiff.kept_graph import AutogradResiduals, KeptGraphs


@pytest.fixture
def counts(monkeypatch):
    """How many second derivatives came from kept graphs, and how many steps were evaluated again for them."""
    found = {"kept": 0, "again": 0}
    kept, again = AutogradResiduals.second_derivatives, EagerEvaluator.second_derivatives

    def from_kept(self, *given):
        result = kept(self, *given)
        found["kept"] += result is not None
        return result

    def evaluated(self, *given):
        found["again"] += 1
        return again(self, *given)

    monkeypatch.setattr(AutogradResiduals, "second_derivatives", from_kept)
    monkeypatch.setattr(EagerEvaluator, "second_derivatives", evaluated)
    return found


def never(monkeypatch):
    monkeypatch.setattr(KeptGraphs, "pays", lambda self, held: False)


def plain(**options):
    return supervised(mlp(), (5,), **options)


def several(model):
    p = [x.square().mean() for x in model.parameters()]
    return torch.stack([p[0] + p[1], p[2].sin()])


def kept(case):
    """The microbatches whose graphs are kept: all but those of the first step that has second derivatives, which is
    measured, and of the last one, which is evaluated again."""
    return (case.options.get("since", len(case)) - 2) * case.options.get("microbatches", 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        plain().but(z={"data_weights": weights()}, loss=weighted),
        plain().but(z={"init": initial(mlp())}),
        plain().but(objective=several),
        plain(microbatches=2, max_grad_norm=0.4),
        plain(since=3).but(z={"lr": torch.tensor(1e-2, dtype=torch.float64)}),
        supervised(mlp(0.3), (5,)),
        supervised(convnet(), (1, 6, 6)),
        language(6),
    ],
    ids=["weights", "init", "several", "microbatches", "since", "dropout", "convnet", "gpt"],
)
@pytest.mark.filterwarnings("ignore:the model computes in", "ignore:the adjoint")
def test_it_has_the_bits_of_two_evaluations(case, dtype, counts, monkeypatch):
    case = case.to(dtype)
    found = case.metagradient(trace=False)
    # The first step was measured; now and then another one is looked at, since its gradient rounds.
    assert counts["kept"] == kept(case) and counts["again"] <= 4 * case.options.get("microbatches", 1)
    never(monkeypatch)
    assert same(found, case.metagradient(trace=False))
    assert counts["kept"] == kept(case)


def test_it_is_exact(counts):
    assert_exact(plain().but(z={"data_weights": weights()}, loss=weighted), trace=False)
    assert counts["kept"] == 12


def test_it_serves_until_a_capture_pays(counts):
    case = plain().to(torch.float32)
    f = case.function()
    found = f.metagradient(case.z)
    assert counts["kept"] > 0 and same(found, case.metagradient(trace=True))


def test_a_replayed_step_is_evaluated_once(counts):
    """A step of which nothing was kept is replayed, and reversed at once."""
    case = plain(schedule="revolve", budget=mgd.Budget(host="6KB"))
    case.metagradient(trace=False)
    assert counts["kept"] > 0


# --- when it does not serve -------------------------------------------------------------------------------------


def test_no_more_than_the_budget(counts):
    """A graph counts twice, since it leaves the heap in pieces."""
    case = plain()
    f = case.function(trace=False, budget=mgd.Budget(host="10KB"))
    result = f.metagradient(case.z)
    assert 0 < counts["kept"] < 7 and result.report.kept_bytes <= 10_000
    assert same(result, case.metagradient(trace=False))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(0.2)

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def test_activation_checkpoints_are_evaluated_again(counts):
    """A checkpoint would call the user's model, which holds other parameters by then."""
    case = supervised(Checkpointed(), (5,))
    found = case.metagradient(trace=False)
    assert counts == {"kept": 0, "again": 7}
    assert torch.equal(found.grads["lr"], supervised(mlp(0.2), (5,)).metagradient(trace=False).grads["lr"])


def offloaded(model, batch, z):
    with torch.autograd.graph.save_on_cpu():
        return cross_entropy(model, batch, z)


def test_what_is_packed_by_somebody_else_is_evaluated_again(counts):
    case = plain().but(loss=offloaded)
    case.metagradient(trace=False)
    assert counts == {"kept": 0, "again": 7}


class Reusing:
    """Batches that share one piece of memory, as a loader's."""

    def __init__(self, batches, write):
        self.batches, self.write = batches, write
        self.x, self.y = batches[0][0].clone(), batches[0][1].clone()

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, t):
        self.write(self.x, self.batches[t][0])
        self.write(self.y, self.batches[t][1])
        return self.x, self.y


def past_autograd(x, y):
    np.copyto(x.numpy(), y.numpy())


@pytest.mark.parametrize("write", [torch.Tensor.copy_, past_autograd], ids=["copy", "numpy"])
def test_batches_in_one_piece_of_memory_are_read_again(write, counts):
    case = plain()
    reusing = case.but(batches=Reusing(case.batches, write))
    assert torch.equal(reusing.metagradient(trace=False).grads["lr"], case.metagradient(trace=False).grads["lr"])
    assert counts["again"] >= 6


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g / 2


def test_what_has_no_second_derivative_is_the_error_of_two_evaluations():
    case = plain().but(loss=lambda m, b, z: Half.apply(cross_entropy(m, b, z)))
    with pytest.raises(mgd.errors.NotDifferentiable, match="Half"):
        case.metagradient(trace=False)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.calls = mlp(), 0

    def forward(self, x):
        self.calls += 1
        return self.body(x)


def test_measuring_calls_nothing_twice(monkeypatch):
    model = Counting()
    case = supervised(model, (5,))
    case.metagradient(trace=False)
    first, model.calls = model.calls, 0
    never(monkeypatch)
    case.metagradient(trace=False)
    assert first == model.calls - 6  # those of the second evaluations, but that of the last step


def stateful(counter):
    def loss(model, batch, z):
        counter[0] += 1
        return cross_entropy(model, batch, z) * (1 + counter[0])

    return loss


def test_a_loss_that_counts_its_calls_is_no_function(counts):
    """Its first step was evaluated more than once."""
    with pytest.raises(mgd.errors.ReplayDivergence):
        plain().but(loss=stateful([0])).metagradient(trace=False)


def test_a_gradient_of_other_bits_keeps_no_graph(counts, monkeypatch):
    monkeypatch.setattr("mgd.autodiff.eager.same_bits", lambda x, y: False)
    case = plain()
    case.metagradient(trace=False)
    assert counts == {"kept": 0, "again": 7}


def test_a_graph_of_another_gradient_is_not_used(counts, monkeypatch):
    """What a kept graph gives is compared with the gradient that trained."""
    case = plain()
    expected = case.metagradient(trace=False)
    original = kept_graph.along

    def wrong(*given):
        results, products = original(*given)
        return [[None if x is None else 2 * x for x in each] for each in results], [2 * x for x in products]

    monkeypatch.setattr(kept_graph, "along", wrong)
    assert same(expected, case.metagradient(trace=False))


# --- what it takes ----------------------------------------------------------------------------------------------


def test_only_larger_batches_are_measured(monkeypatch):
    measured = []
    original = KeptGraphs.measured

    def noted(self, kind, given):
        measured.append(kind[1][0][0])
        return original(self, kind, given)

    monkeypatch.setattr(KeptGraphs, "measured", noted)
    sizes = [4, 3, 6, 2, 6, 5, 4, 3]
    case = plain()
    case = case.but(batches=[tuple(x[:n] for x in batch) for n, batch in zip(sizes, case.batches, strict=True)])
    case.metagradient(trace=False)
    assert measured == [4, 6]


def test_what_a_graph_holds_is_what_it_is_said_to(monkeypatch):
    """Activations of two layers, and of the gradient as many again."""
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 3))
    case = supervised(model, (64,), batch=300, examples=300, optimizer=adamw()).to(torch.float32)
    taken = []
    original = AutogradResiduals.second_derivatives
    monkeypatch.setattr(
        AutogradResiduals,
        "second_derivatives",
        lambda self, *given: taken.append(self.held) or original(self, *given),
    )
    case.metagradient(trace=False)
    activation = 300 * 512 * 4
    assert 4 * activation < taken[0] < 12 * activation


def test_nothing_is_held_afterwards(monkeypatch):
    held = []
    original = AutogradResiduals.second_derivatives

    def noted(self, *given):
        held.append(weakref.ref(self.leaves[0]))
        return original(self, *given)

    monkeypatch.setattr(AutogradResiduals, "second_derivatives", noted)
    case = plain()
    f = case.function(trace=False)
    f.metagradient(case.z)
    gc.collect()
    assert held and all(each() is None for each in held)


def test_losses_with_penalties(counts):
    """From the first step on whose loss differentiates the model, norms are evaluated in another way."""

    def penalised(model, batch, z):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return loss + 0.1 * sum(x.square().sum() for x in slopes)

    assert_exact(supervised(convnet(), (1, 6, 6), 4).but(loss=penalised), (torch.float64,), trace=False)
    assert counts["kept"] > 0


def test_a_leaf_of_the_loss_itself_is_evaluated_again(counts):
    """It might be one of an earlier step."""

    def penalised(model, batch, z):
        x = batch[0].clone().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return F.cross_entropy(out, batch[1]) + 0.1 * slope.square().mean()

    assert_exact(plain().but(loss=penalised), (torch.float64,), trace=False)
    assert counts["kept"] == 0


class Carrying:
    """A loss that carries what it computed at one step over to the next, with its graph or without."""

    def __init__(self, detached):
        self.detached, self.state = detached, None

    def __call__(self, model, batch, z):
        out = model(batch[0])
        loss = F.cross_entropy(out if self.state is None else out + self.state, batch[1])
        self.state = out.detach().mean(0) if self.detached else out.mean(0)
        return loss


@pytest.mark.parametrize("detached", [True, False])
def test_a_state_carried_from_step_to_step_is_seen(detached, counts):
    """The first step is evaluated twice. Unrolled, the graph would go on into earlier steps."""
    with pytest.raises(mgd.errors.ReplayDivergence):
        plain().but(loss=Carrying(detached)).metagradient(trace=False)


class Late(Carrying):
    """Only from the fourth call on, long after the first step was looked at."""

    def __init__(self):
        super().__init__(False)
        self.calls = 0

    def __call__(self, model, batch, z):
        self.calls += 1
        found, before = super().__call__(model, batch, z), self.state
        self.state = before if self.calls > 4 else None
        return found


def test_a_state_that_is_carried_later_is_seen(counts):
    with pytest.raises(mgd.errors.ReplayDivergence):
        plain().but(loss=Late()).metagradient(trace=False)
    assert counts["kept"] == 0


def test_a_teacher_whose_parameters_require_gradients_is_evaluated_again(counts):
    teacher = mlp()
    case = plain().but(loss=lambda m, b, z: F.mse_loss(m(b[0]), teacher(b[0])))
    case.metagradient(trace=False)
    assert counts == {"kept": 0, "again": 7}


def test_sparse_batches(counts):
    case = plain()
    sparse = case.but(
        batches=[(x.to_sparse(), y) for x, y, _ in case.batches],
        loss=lambda m, b, z: F.cross_entropy(m[3](torch.tanh(b[0] @ m[0].weight.T + m[0].bias)), b[1]),
    )
    assert torch.allclose(sparse.metagradient(trace=False).grads["lr"], case.metagradient(trace=False).grads["lr"])
