"""DataRater: its meta-gradient, its population, its resumption, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from mgd import DataRater, errors
from mgd.rater.population_adam import PopulationAdam
from mgd.rater.sampling import acceptance, keep_best, sampler
from mgd_kernels import AdamW

DIM = 5
TRUTH = torch.linspace(-1, 1, DIM)


def regression(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets of which half are random, and a mark by which the rater can tell them."""
    g = torch.Generator().manual_seed(seed)
    x, bad = torch.randn(n, DIM, generator=g), torch.rand(n, generator=g) < 0.5
    y = torch.where(bad, 2 * torch.randn(n, generator=g), x @ TRUTH)
    return x, y, bad.float()


POOL, HELD = regression(200, 0), tuple(t[regression(400, 1)[2] == 0] for t in regression(400, 1))


class Mark(nn.Module):
    """Sees the mark alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, examples):
        return self.layer(examples[2][:, None])[:, 0]


def losses(model, examples):
    return (model(examples[0])[:, 0] - examples[1]).square()


def inner() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))


def make(rater: nn.Module | None = None, **changes) -> DataRater:
    given = {"model": inner, "loss": losses, "pool": POOL, "held_out": HELD} | {
        name: changes.pop(name) for name in ("model", "loss", "pool", "held_out") if name in changes
    }
    options = {"batch": 8, "population": 2, "lifetime": 6, "lr": 0.1, "options": {"trace": False}} | changes
    options = {"optimizer": AdamW(lr=1e-2, eps_root=1e-6), **options}
    return DataRater(rater or Mark(), **given, **options)


def test_bad_examples_are_rated_down():
    rater = make(lifetime=40).fit(60)
    marks = rater.rate((torch.zeros(2, DIM), torch.zeros(2), torch.tensor([0.0, 1.0])))
    assert marks[0] > marks[1] + 1


@pytest.mark.parametrize("window", [1, 3])
def test_the_meta_gradient_is_that_of_unrolled_training(window):
    """In float64, against autograd through the window with the rater in the graph: SGD written out, from a member that
    has made steps before."""
    torch.manual_seed(0)
    data = [tuple(x.double() for x in examples) for examples in (POOL, HELD)]
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    class Content(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, examples):
            return self.network(torch.stack([examples[0][:, 0], *examples[1:]], 1))[:, 0]

    model = lambda: nn.Sequential(nn.Linear(DIM, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    rater = make(
        Content(),
        model=model,
        pool=data[0],
        held_out=data[1],
        window=window,
        population=1,
        optimizer=momentum(),
        seed=3,
    )
    rater.fit(2)
    member = rater.population.members[0]
    seen = {}
    rater.adam.step = lambda gradients: seen.update(gradient=gradients[0])
    original = rater.population.train

    def train(i, examples, weights, held_out):
        seen.update(examples=examples, held_out=held_out)
        return original(i, examples, weights, held_out)

    rater.population.train = train
    parameters = {k: v.clone().requires_grad_() for k, v in member.tensors.items()}
    buffers = {k: v.clone() for k, v in member.optimizer_state["momentum_buffer"].items()}
    rater.step()

    shell = model()
    call = lambda p, examples: losses(lambda x: torch.func.functional_call(shell, p, (x,)), examples)
    for t in range(window):
        batch = tuple(x[t * 8 : (t + 1) * 8] for x in seen["examples"])
        loss = (rater.rater(batch).softmax(0) * call(parameters, batch)).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        buffers = {k: 0.9 * buffers[k] + g for k, g in zip(parameters, grads, strict=True)}
        parameters = {k: p - 0.05 * buffers[k] for k, p in parameters.items()}
    expected = torch.autograd.grad(call(parameters, seen["held_out"]).mean(), rater.parameters, allow_unused=True)
    for got, want in zip(seen["gradient"], expected, strict=True):
        want = torch.zeros_like(got) if want is None else want
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert seen["gradient"][0].norm() > 0


def momentum():
    from mgd_kernels import SGD

    return SGD(lr=0.05, momentum=0.9)


def test_ages_are_spread_and_lives_end():
    rater = make(population=3, lifetime=6).fit(14)
    for step in rater.history[6:]:
        ages = sorted(step.ages)
        assert [(b - a) for a, b in itertools.pairwise(ages)] == [2, 2], step
        assert max(ages) < 6
    births = [i for step in rater.history for i in step.renewed]
    assert [births.count(i) for i in range(3)] == [2, 2, 3]  # after 6 and 12; 4 and 10; 2, 8 and 14
    tensors = [member.tensors["0.weight"] for member in rater.population.members]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(tensors, 2))


def test_members_go_on_where_their_windows_ended():
    """Two windows of 2 are one of 4: states, moments and random streams are carried."""
    short, long = (make(window=w, population=1, lifetime=99, pool=fixed, held_out=fixed, lr=1e-30) for w in (2, 4))
    short.fit(2), long.fit(1)
    a, b = short.population.members[0], long.population.members[0]
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in b.tensors)
    assert a.optimizer_state["step"] == b.optimizer_state["step"] == 4


def fixed(n, generator):
    """The same 8 examples over and over."""
    return tuple(x[torch.arange(n) % 8] for x in POOL)


def test_resume_to_the_same_bits(tmp_path):
    whole = make().fit(9)
    first = make()

    def stop(step):
        if step.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.fit(9, directory=tmp_path, save_every=2, observe=stop)
    again = make().fit(9, directory=tmp_path, save_every=2)
    assert len(again.history) == 9
    assert [s.values for s in again.history] == [s.values for s in whole.history]
    assert all(map(torch.equal, again.rater.state_dict().values(), whole.rater.state_dict().values()))
    assert torch.equal(again.rate(POOL), whole.rate(POOL))
    longer = make().fit(11, directory=tmp_path)
    assert [s.values for s in longer.history] == [s.values for s in make().fit(11).history]
    with pytest.raises(errors.StaleRun, match="the seed"):
        make(seed=1).fit(9, directory=tmp_path)


def test_state_dict_goes_over():
    a = make().fit(4)
    b = make()
    b.load_state_dict(a.state_dict())
    assert a.step().values == b.step().values
    assert torch.equal(a.rate(POOL), b.rate(POOL))


def test_seconds_are_reported_by_part():
    rater = make().fit(5)
    assert {"first window", "training", "hvp", "scoring", "held-out loss"} <= set(rater.seconds)
    assert sum(rater.seconds.values()) <= sum(step.seconds for step in rater.history)
    assert sum(rater.seconds.values()) > 0.8 * sum(step.seconds for step in rater.history)


# --- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_member_that_diverges_is_reset_and_reported():
    armed = []

    def diverging(model, examples):
        found = losses(model, examples)
        return found * float("nan") if armed and armed.pop() else found

    rater = make(loss=diverging)
    rater.fit(3)
    before = [p.clone() for p in rater.parameters]
    births = [member.births for member in rater.population.members]
    armed.append(True)
    step = rater.step()
    assert step.values[0] is None and 0 in step.renewed and math.isfinite(step.values[1])
    assert "inner model 0" in rater.notes[0] and "meta-step 3" in rater.notes[0] and "made anew" in rater.notes[0]
    assert rater.population.members[0].births == births[0] + 1
    assert any(not torch.equal(p, q) for p, q in zip(rater.parameters, before, strict=True)), "the other one counts"
    assert all(bool(torch.isfinite(p).all()) for p in rater.parameters)


def test_a_newborn_that_diverges_is_an_error():
    with pytest.raises(errors.NonFiniteState):
        make(loss=lambda model, examples: losses(model, examples) / 0).step()


def test_a_loss_that_does_not_repeat_is_refused_with_its_step():
    calls = itertools.count()

    def restless(model, examples):
        return losses(model, examples) * (1 + (next(calls) if len(examples[0]) == 8 else 0) * 1e-3)

    rater = make()
    rater.fit(3)
    rater.population.loss = restless
    with pytest.raises(errors.ReplayDivergence, match=r"step 7 .*inner model 0, meta-step 3") as caught:
        rater.step()
    assert caught.value.step == 7


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"pool": tuple(x[:0] for x in POOL)}, errors.BadArgument, "pool.*empty"),
        ({"pool": lambda n, g: tuple(x[:0] for x in POOL)}, errors.BadArgument, "pool.*16 examples"),
        ({"held_out": (POOL[0], POOL[1][:3])}, errors.BadArgument, "held_out.*common first dimension"),
        ({"batch": 1}, errors.BadArgument, "batch >= 2"),
        ({"window": 0}, errors.BadArgument, "window >= 1"),
        ({"lifetime": 0}, errors.BadArgument, "lifetime >= 1"),
        ({"rater": nn.Identity()}, errors.BadArgument, "trainable parameters"),
        ({"model": lambda: None}, errors.BadArgument, "model\\(\\)"),
        ({"loss": lambda m, e: losses(m, e).mean()}, errors.BadLoss, "every example"),
        ({"loss": lambda m, e: losses(m, e)[:3]}, errors.BadLoss, "every example"),
        ({"lr": 0.0}, errors.BadArgument, "lr > 0"),
    ],
)
def test_bad_arguments(changes, error, words):
    with pytest.raises(error, match=words):
        make(**changes).step()


@pytest.mark.parametrize(
    "output, error, words",
    [
        (
            lambda s: s[:, None],
            errors.BadArgument,
            r"a score to each of 16 examples, \[16\]; got torch.float32 \[16, 1\]",
        ),
        (lambda s: s.mean(), errors.BadArgument, "a score to each"),
        (lambda s: s.detach(), errors.BadArgument, "do not depend on the rater"),
        (lambda s: s / 0, errors.NonFiniteState, "a rating"),
    ],
)
def test_raters_that_do_not_rate(output, error, words):
    class Odd(Mark):
        def forward(self, examples):
            return output(super().forward(examples))

    with pytest.raises(error, match=words):
        make(Odd()).step()


# --- parts -------------------------------------------------------------------------------------------------------


def test_one_member_is_torchs_adam():
    torch.manual_seed(0)
    mine, theirs = ([torch.ones(3, 2), torch.zeros(4)] for _ in range(2))
    for p in theirs:
        p.requires_grad_()
    adam, reference = PopulationAdam(mine, 1, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    for _ in range(5):
        gradient = [torch.randn(3, 2), torch.randn(4)]
        adam.step([gradient])
        for p, g in zip(theirs, gradient, strict=True):
            p.grad = g
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


def test_members_count_alike_whatever_the_scale_of_their_gradients():
    x = [torch.zeros(2)]
    adam = PopulationAdam(x, 3, lr=1.0)
    adam.step([[torch.tensor([1e3, 0.0])], [torch.tensor([0.0, 1e-3])], None])
    torch.testing.assert_close(x[0], torch.tensor([-0.5, -0.5]), rtol=1e-4, atol=0)


def test_keep_best():
    assert keep_best(torch.tensor([0.1, 3.0, 2.0, -1.0]), 0.5).tolist() == [1, 2]
    assert keep_best(torch.ones(3), 0.01).tolist() == [0]
    for ratings, share in ((torch.tensor([float("nan")]), 0.5), (torch.ones(0), 0.5), (torch.ones(3), 0.0)):
        with pytest.raises(errors.BadArgument):
            keep_best(ratings, share)


def test_acceptance_is_the_chance_to_be_among_the_best():
    """Against drawing batches; and on average `keep` of `batch` are accepted."""
    q = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert float(acceptance(q, 3, 8).mean()) == pytest.approx(3 / 8, abs=1e-3)
    others = torch.rand(200_000, 7, generator=torch.Generator().manual_seed(0))
    for quantile in (0.2, 0.6, 0.9):
        drawn = float(((others > quantile).sum(1) < 3).double().mean())
        assert float(acceptance(torch.tensor(quantile), 3, 8)) == pytest.approx(drawn, abs=4e-3)


def test_samplers_draw_the_same_for_the_same_generator():
    draw = sampler({"x": torch.arange(50)}, "pool")
    first, second = (draw(6, torch.Generator().manual_seed(1))["x"] for _ in range(2))
    assert torch.equal(first, second) and len(first) == 6
