"""What a run depends on is told from its directory: one thing is changed at a time, and the run is continued."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mgd
from mgd.errors import StaleRun
from mgd.recipes.lr_schedule.search import Objective
from mgd.util.fingerprint import differing, digest
from mgd.util.run_directory import RunDirectory
from mgd_kernels import SGD, Adam, AdamW
from mgd_kernels.update_rule import UpdateRule

STEPS, EXAMPLES, QUERIES = 4, 12, 3
X = torch.randn(EXAMPLES, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(EXAMPLES) % 3


class Network(nn.Module):
    """With frozen parameters, running statistics and dropout."""

    def __init__(self, slope: float = 0.1):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 3)).double()
        self.layers[0].bias.requires_grad_(False)
        self.slope = slope

    def forward(self, x):
        return F.leaky_relu(self.layers(x), self.slope)


def model(change=None) -> nn.Module:
    network = Network()
    if change is not None:
        with torch.no_grad():
            change(network.layers)
    return network


def batches():
    return [(X[i : i + 6], Y[i : i + 6], torch.arange(i, i + 6)) for i in (0, 6, 3, 2)]


def loss(model, batch, z):
    x, y, _ = batch
    return (z["w"] * F.cross_entropy(model(x), y, reduction="none")).mean()


def squared(model, batch, z):
    """Has the values of `loss` where the weights are 1, and other derivatives."""
    x, y, _ = batch
    return (z["w"] ** 2 * F.cross_entropy(model(x), y, reduction="none")).mean()


def objective(model):
    return F.cross_entropy(model.eval()(X), Y)


def noisy(scale: float):
    def update(param, slots, grad, hyper, step):
        return param - hyper["lr"] * (grad + (scale if step > 1 else 0.0)), {}

    return UpdateRule(update, defaults={"lr": 0.1})


def training(**changes) -> mgd.TrainingFunction:
    options = {
        "model": model(),
        "loss": loss,
        "batches": batches(),
        "optimizer": SGD(lr=0.1, momentum=0.5),
        "objective": objective,
        "per_example": {"w": lambda batch: batch[2]},
        "trace": False,
    }
    return mgd.TrainingFunction(**options | changes)


def z(**changes):
    return {"w": torch.ones(EXAMPLES, dtype=torch.float64)} | changes


def moved(at: int):
    changed = batches()
    x, y, i = changed[at]
    changed[at] = (x.clone().index_fill_(0, torch.tensor([5]), 0.25), y, i)
    return changed


# What changes: the training function's arguments, what the error says.
CHANGES = {
    "a weight": ({"model": model(lambda m: m[3].weight[2, 1].mul_(1 + 1e-12))}, "the initial parameters"),
    "a frozen weight": ({"model": model(lambda m: m[0].bias[1].add_(1e-12))}, "the initial parameters"),
    "a buffer": ({"model": model(lambda m: m[1].running_var.mul_(2))}, "the initial buffers"),
    "what the model computes": ({"model": Network(slope=0.2)}, "the loss"),
    "the mode of the model": ({"model": model().eval()}, "the loss"),
    "the first batch": ({"batches": moved(0)}, "the batches"),
    "the last batch": ({"batches": moved(STEPS - 1)}, "the batches"),
    "the order of batches": ({"batches": [*batches()[:2], *batches()[:1:-1]]}, "the batches"),
    "the number of steps": ({"batches": batches()[:-1]}, "the number of steps"),
    "the loss": ({"loss": lambda m, b, z: 2 * loss(m, b, z)}, "the loss"),
    "a derivative of the loss": ({"loss": squared}, "the loss"),
    "the indices of examples": ({"per_example": {"w": lambda batch: batch[2].flip(0)}}, "the batches"),
    "the objective": ({"objective": lambda m: 2 * objective(m)}, "the objective"),
    "the held-out data": ({"objective": lambda m: F.cross_entropy(m.eval()(X[1:]), Y[1:])}, "the objective"),
    "a derivative of the objective": (
        {"objective": lambda m: objective(m).square() / objective(m).detach()},
        "objective",
    ),
    "the optimizer": ({"optimizer": Adam(lr=0.1)}, "the optimizer"),
    "the learning rate": ({"optimizer": SGD(lr=0.2, momentum=0.5)}, "the hyperparameters"),
    "dampening": ({"optimizer": SGD(lr=0.1, momentum=0.5, dampening=0.1)}, "the optimizer"),
    "Nesterov": ({"optimizer": SGD(lr=0.1, momentum=0.5, nesterov=True)}, "the optimizer's updates"),
    "groups": ({"optimizer": SGD(lr=0.1, momentum=0.5, param_groups=[{"params": "*.bias"}])}, "the optimizer"),
    "a schedule": ({"fixed": {"lr": torch.tensor([0.1, 0.1, 0.1, 0.2])}}, "the hyperparameters"),
    "clipping": ({"max_grad_norm": 1.0}, "clipping"),
    "microbatches": ({"microbatches": 2}, "microbatches"),
    "the seed": ({"seed": 1}, "the seed"),
    "the optimizer's state": ({"optimizer_state": {}}, "whether the optimizer state continues"),
    "captured": ({"trace": True}, "the execution"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_everything_that_a_training_depends_on_is_in_its_identity(change):
    changes, says = CHANGES[change]
    known = training().identity(z())
    assert training().identity(z()) == known
    assert any(says in name for name in differing(known, training(**changes).identity(z()))), change


def test_the_metaparameters_are_in_the_identity():
    known = training().identity(z())
    one = torch.ones(EXAMPLES, dtype=torch.float64).index_fill(0, torch.tensor([11]), 1 + 1e-12)
    assert "z['w']" in differing(known, training().identity(z(w=one)))
    assert "the metaparameters" in differing(known, training().identity(z(lr=torch.tensor(0.1, dtype=torch.float64))))
    longer = training().identity(z(lr=torch.tensor(0.1)))
    assert "z['lr']" in differing(longer, known), "what the new call lacks counts, too"


def test_an_update_that_only_a_second_step_tells():
    first, second = (training(optimizer=noisy(scale)).identity(z()) for scale in (0.0, 1.0))
    assert differing(first, second) == ["the optimizer's updates"]


def test_the_number_of_threads_counts():
    known = training().identity(z())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert "the version of torch and its threads" in differing(known, training().identity(z()))
    finally:
        torch.set_num_threads(threads)


def test_looking_changes_nothing():
    f, start = training(), z()
    state = {name: x.clone() for name, x in f.model.state_dict().items()}
    modes, before = [m.training for m in f.model.modules()], torch.get_rng_state()
    reference = training().metagradient(start)
    f.identity(start)
    assert torch.equal(torch.get_rng_state(), before) and [m.training for m in f.model.modules()] == modes
    assert all(torch.equal(x, state[name]) for name, x in f.model.state_dict().items())
    assert torch.equal(f.metagradient(start).grads["w"], reference.grads["w"])


def test_digests_tell_values_apart():
    values = [1, 1.0, True, "1", None, [1], (1, 2), [[1], 2], {"a": 1}, {"a": [1]}, torch.ones(1), torch.ones(1, 1)]
    values += [torch.ones(1, dtype=torch.float64), torch.ones(1).numpy(), b"1", ["ab", "c"], ["a", "bc"], torch.float32]
    digests = [digest(value) for value in values]
    assert len(set(digests)) == len(values)
    assert digest(object()) == digest(object()), "an address is no part of it"
    assert digest(torch.tensor(0.0)) != digest(torch.tensor(-0.0))


# --- the runs that continue ------------------------------------------------------------------------------------------


class Ended(Exception):
    pass


def ending(function, calls: int):
    """The function, which raises after so many calls."""
    count = 0

    def call(*arguments):
        nonlocal count
        count += 1
        if count > calls:
            raise Ended
        return function(*arguments)

    return call


def resumed(directory, **changes):
    """A metagradient, begun by an earlier process that ended in its reverse sweep."""
    with pytest.raises(Ended):
        training(loss=ending(loss, 1 + STEPS + 1)).metagradient(z(), resume=directory)
    return lambda: training(**changes).metagradient(z(), resume=directory)


def descended(directory, **changes):
    run = lambda steps, **changes: mgd.MetaDescent(training(**changes), lambda x: torch.optim.Adam(x, lr=0.1)).run(
        z(), steps, directory=directory
    )
    run(1)
    return lambda: run(2, **changes)


def attributed(directory, **changes):
    def run(queries, **changes):
        return mgd.attribute(training(**changes), z(), QUERIES, queries, weights="w", chunk=1, out=directory)

    asked = lambda held_out: lambda m, q: held_out(m) * (1.0 + q)
    with pytest.raises(Ended):
        run(ending(asked(objective), QUERIES + 1))
    return lambda: run(asked(changes.get("objective", objective)), **changes)


@pytest.mark.parametrize("change", ["a weight", "the last batch", "the loss", "the objective", "the learning rate"])
@pytest.mark.parametrize("begun", [resumed, descended, attributed])
def test_a_run_is_not_continued_as_another(tmp_path, begun, change):
    changes, says = CHANGES[change]
    with pytest.raises(StaleRun, match=says):
        begun(tmp_path, **changes)()
    begun_again = {resumed: lambda: training().metagradient(z(), resume=tmp_path)}.get(begun)
    if begun_again is not None:
        assert torch.equal(begun_again().grads["w"], training().metagradient(z()).grads["w"])


def test_a_descent_is_not_continued_with_another_judge_problem_or_optimizer(tmp_path):
    f = training()
    adam = lambda x: torch.optim.Adam(x, lr=0.1)
    judge = lambda result: float(result.losses[-1])

    def run(problem=f, outer=adam, validate=judge, steps=3):
        return mgd.MetaDescent(problem, outer, validate=validate).run(z(), steps, directory=tmp_path)

    run(steps=2)
    for says, changes in {
        "the score of the first training": {"validate": lambda result: 2 * judge(result)},
        "the score": {"validate": None},
        "the outer optimizer": {"outer": lambda x: torch.optim.Adam(x, lr=0.1, betas=(0.9, 0.99))},
        r"z\['w'\]": {"problem": lambda variables, step: (f, {"w": 2 * variables["w"]})},
    }.items():
        with pytest.raises(StaleRun, match=says):
            run(**changes)
    assert len(run().history) == 3  # and it is as it was


class Own(torch.optim.Optimizer):
    """An optimizer whose only setting is nowhere to be read."""

    def __init__(self, params, power):
        super().__init__(params, {})
        self.update = lambda g: g.abs() ** power * g.sign()

    @torch.no_grad()
    def step(self, closure=None):
        for x in self.param_groups[0]["params"]:
            x -= 0.1 * self.update(x.grad)


class Rounded:
    """A constraint whose only setting is nowhere to be read."""

    def __init__(self, digits):
        self._round = lambda x: torch.round(x, decimals=digits)

    def project(self, x):
        return self._round(x)

    def check(self, name, x):
        pass


def test_optimizers_and_constraints_are_told_by_what_they_do(tmp_path):
    run = lambda power, digits, steps: mgd.MetaDescent(
        training(), lambda x: Own(x, power), constraints={"w": Rounded(digits)}
    ).run(z(), steps, directory=tmp_path)
    run(1.0, 8, 1)
    with pytest.raises(StaleRun, match="the outer optimizer"):
        run(2.0, 8, 2)
    with pytest.raises(StaleRun, match="the constraint on 'w'"):
        run(1.0, 2, 2)
    assert len(run(1.0, 8, 2).history) == 2


class Scores(nn.Module):
    def __init__(self, start=0.0, temperature=1.0):
        super().__init__()
        self.layer, self.temperature = nn.Linear(5, 1).double(), temperature
        for p in self.parameters():
            nn.init.constant_(p, start)

    def forward(self, x):
        return self.layer(x)[:, 0] / self.temperature + x[:, 0] / self.temperature


def squares(scale):
    return lambda model, x: scale * model(x)[:, 0].square()


RATER = {
    "the learning rate": ({"lr": 0.2}, "the outer Adam"),
    "betas": ({"betas": (0.8, 0.999)}, "the outer Adam"),
    "the pool": ({"pool": torch.cat([X[:-1], X[:1]])}, "the pool"),
    "a pool that is drawn": ({"pool": lambda n, g: X[torch.randint(12, (n,), generator=g)].flip(1)}, "the pool"),
    "the held-out examples": ({"held_out": X.flip(1)}, "the held-out examples"),
    "the rater's start": ({"rater": Scores(start=0.1)}, "the start of the rater"),
    "what the rater computes": ({"rater": Scores(temperature=2.0)}, "the first ratings"),
    "the loss": ({"loss": squares(2.0)}, "the loss"),
    "the inner model": ({"model": lambda: nn.Linear(5, 2).double()}, "the model"),
    "its first parameters": ({"model": lambda: nn.Linear(5, 1).double().requires_grad_()}, None),
    "the inner optimizer": ({"optimizer": AdamW(lr=1e-3)}, "the optimizer"),
    "clipping": ({"options": {"trace": False, "max_grad_norm": 1.0}}, "clipping"),
    "the window": ({"window": 3}, "batch"),
    "the lifetime": ({"lifetime": 3}, "population"),
    "the seed": ({"seed": 1}, "the seed"),
}


def rater(**changes):
    options = {
        "rater": Scores(),
        "model": lambda: nn.Linear(5, 1).double(),
        "loss": squares(1.0),
        "pool": X,
        "held_out": X[:7],
        "optimizer": SGD(lr=0.1),
        "batch": 4,
        "population": 2,
        "lr": 0.1,
        "options": {"trace": False},
    } | changes
    arguments = [options.pop(name) for name in ("rater", "model", "loss", "pool", "held_out")]
    return mgd.DataRater(*arguments, **options)


@pytest.mark.parametrize("change", RATER)
def test_a_rater_is_not_continued_as_another(tmp_path, change):
    changes, says = RATER[change]
    rater().fit(2, directory=tmp_path)
    other = rater(**changes)
    before = {name: x.clone() for name, x in other.rater.state_dict().items()}
    if says is None:
        other.fit(3, directory=tmp_path)
    else:
        with pytest.raises(StaleRun, match=says):
            other.fit(3, directory=tmp_path)
        assert all(torch.equal(x, before[name]) for name, x in other.rater.state_dict().items()), "it is as it was"


def test_a_rater_that_was_trained_already_goes_on_in_its_directory(tmp_path):
    whole = rater().fit(4)
    one = rater().fit(2, directory=tmp_path)
    again = one.fit(4, directory=tmp_path)
    assert [step.values for step in again.history] == [step.values for step in whole.history]


def test_a_search_is_not_continued_as_another(tmp_path):
    rates = torch.full((STEPS,), 0.1)
    plain = lambda **changes: training(loss=lambda m, b, z: F.cross_entropy(m(b[0]), b[1]), **changes)

    def value(function):
        with RunDirectory(tmp_path, "search", function.identity({"lr": rates})) as run:
            return Objective(function, run)(rates)

    first = value(plain())
    with pytest.raises(StaleRun, match="the objective"):
        value(plain(objective=lambda m: 2 * objective(m)))
    assert value(plain()) == first


def test_one_element_of_any_stride_has_the_digest_of_its_copy():
    one = torch.arange(20.0).view(4, 5)[1:2, 2]
    assert one.is_contiguous() and one.stride() == (5,)
    assert digest(one) == digest(one.clone().contiguous().view(1)) != digest(one + 1)
