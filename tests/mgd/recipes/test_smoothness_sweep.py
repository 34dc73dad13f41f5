"""The sweep over ways to train: what it measures is right in closed form, and on digits it shows what is smooth."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn

import mgd
from mgd.errors import BadArgument
from mgd.recipes import data
from mgd.recipes.intervals import spearman
from mgd.recipes.small_images import Task
from mgd.recipes.smoothness import recipe, report
from mgd.recipes.smoothness.recipe import BASE, CHOICES, Choice, Settings
from mgd.recipes.smoothness.trust import Trust, trust
from mgd.ui.console import show
from mgd.ui.page import write
from mgd_kernels import SGD

QUICK = Settings().quick()
SMOOTH, ROUGH = "weights count in the last eighth", "ReLU, max pooling, norm after"

# --- trust, in closed form -----------------------------------------------------------------------------------------


class Points(nn.Module):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(2, dtype=torch.float64))


def one_step(gradient, objective=lambda model: model.at.square().sum() / 2):
    """One SGD step of size 1 from 0: the trained parameters are `-gradient(a)`."""
    return mgd.TrainingFunction(
        Points(),
        lambda model, batch, z: (model.at * gradient(z["a"])).sum(),
        [torch.zeros(1)],
        optimizer=SGD(lr=1.0),
        objective=objective,
    )


def test_a_step_of_sign_descent_is_predicted_and_carried_out():
    """The parameters are -a, the objective |a|²/2: by a step of h along -sign(a) it changes by -h|a|₁ + h² n/2."""
    a, sizes = torch.tensor([3.0, -1.0], dtype=torch.float64), (0.1, 0.5)
    found = trust(one_step(lambda a: a), {"a": a}, "a", [torch.tensor([1.0, 1.0])], sizes)
    assert found.predicted == pytest.approx([-4 * h for h in sizes], rel=1e-12)
    assert found.actual == pytest.approx([-4 * h + h**2 for h in sizes], rel=1e-12)
    errors = [h / 4 for h in sizes]
    assert found.error == pytest.approx(math.sqrt(errors[0] * errors[1]), rel=1e-9)
    assert found.smoothness == [[pytest.approx(1.0)] * 2] * 2 and found.mean_smoothness == pytest.approx(1.0)


def test_smoothness_is_that_of_metasmoothness():
    f = one_step(lambda a: torch.stack([a[0], 2.5 * a[1] - a[1] ** 2]))
    z, direction = {"a": torch.zeros(2, dtype=torch.float64)}, torch.ones(2)
    f = f.replaced(objective=lambda model: model.at.sum())
    found = trust(f, z, "a", [direction], [1.0])
    assert found.smoothness[1][0] == mgd.metasmoothness(f, z, {"a": direction}, 1.0) == pytest.approx(1 / 3)
    # The metagradient is -(1, 2.5): its own step goes the same way.
    assert found.smoothness[0][0] == pytest.approx(1 / 3) and found.predicted == pytest.approx([-3.5])
    assert found.actual == pytest.approx([-2.5])


def test_a_metagradient_of_zero_has_no_step():
    with pytest.raises(BadArgument, match="0 everywhere"):
        trust(one_step(lambda a: a), {"a": torch.zeros(2, dtype=torch.float64)}, "a", [], [0.1])


def test_means():
    one = Trust([[1.0, 0.5]], [-1.0, -1.0], [-0.9, -0.6])
    measured = recipe.Timings([one, Trust([[0.5]], [2.0], [2.2])], [0.5, 0.7])
    assert measured.smoothness == pytest.approx((0.75 + 0.5) / 2)
    assert measured.error == pytest.approx((0.2 + 0.1) / 2) and measured.accuracy == pytest.approx(0.6)
    assert math.isnan(recipe.Timings([one, None], [0.5, math.nan]).smoothness)


# --- the trainings -------------------------------------------------------------------------------------------------


def test_weights_count_from_the_step_of_their_injection_on():
    """Examples that are seen before it only have a metagradient of exactly 0, those that are seen after it have one."""
    task = Task.make(data.digits(), data.digits(train=False), 128, 100, 100, seed=0)
    f, z = recipe.training(task, Choice(batch=16, injected=0.5), Settings(steps=8), seed=0)
    gradient = f.metagradient(z).grads["data_weights"]
    late = torch.cat([i for _, _, i, _ in list(f.batches)[4:]])
    early = torch.ones(128, dtype=torch.bool).index_fill(0, late, False)
    assert int(early.sum()) == 64 and not gradient[early].any() and bool((gradient[~early] != 0).all())
    plain = recipe.training(task, Choice(batch=16), Settings(steps=8), seed=0)[0]
    assert torch.equal(plain.value(z), f.value(z))  # at weights of 1 it is the same training


def test_every_choice_differs_from_the_base_and_trains():
    assert CHOICES[BASE] == Choice() and len(set(CHOICES.values())) == len(CHOICES)
    task = Task.make(data.digits(), data.digits(train=False), 192, 100, 100, seed=0)
    for choice in CHOICES.values():
        f, z = recipe.training(task, choice, Settings(steps=2), seed=0)
        assert math.isfinite(float(f.value(z)))


def test_a_choice_that_diverges_is_said_and_the_others_are_measured():
    task = Task.make(data.digits(), data.digits(train=False), 96, 100, 100, seed=0)
    entry = recipe.Timings([], [])
    recipe.measure(task, Choice(norm="none"), Settings(steps=4, rate=1e12, directions=0), 0, entry)
    assert entry.trusts == [None] and math.isnan(entry.smoothness)


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"steps": 1}, "steps >= 2"),
        ({"seeds": 0}, "seeds >= 1"),
        ({"sizes": ()}, "sizes between"),
        ({"sizes": (0.6,)}, "sizes between"),
        ({"choices": (BASE, "sideways")}, r"got \['sideways'\]"),
        ({"choices": ("ReLU",)}, "with which the others are compared"),
    ],
)
def test_settings_that_mean_nothing(bad, says):
    with pytest.raises(BadArgument, match=says):
        recipe.run(data.digits(), data.digits(train=False), recipe.replace(QUICK, **bad))


# --- the recipe ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    return recipe.run(data.digits(), data.digits(train=False), QUICK, seed=0)


@pytest.fixture(scope="module")
def found():
    """Too short for an effect: what is found is there, and is shown."""
    return recipe.run(data.digits(), data.digits(train=False), recipe.replace(QUICK, steps=4), seed=0)


def test_smooth_trainings_are_predicted_better_than_rough_ones(whole):
    smooth, base, rough = (whole.measured[name] for name in (SMOOTH, BASE, ROUGH))
    assert smooth.smoothness > base.smoothness > rough.smoothness
    assert smooth.error < base.error and smooth.error < rough.error
    points = [(m.smoothness, m.error) for m in whole.measured.values()]
    assert spearman([x for x, _ in points], [y for _, y in points])[0] < 0
    assert whole.rho is None and whole.interval is None  # of five points, which the page does not claim to be a law


def test_the_result_is_complete_and_json(found):
    result = json.loads(json.dumps(found.to_dict()))
    assert set(result["choices"]) == set(QUICK.choices)
    for name, entry in result["choices"].items():
        assert entry["smoothness"] == found.measured[name].smoothness and -1 <= entry["smoothness"] <= 1
        assert len(entry["by_seed"]) == len(entry["accuracies"]) == QUICK.seeds
        assert len(entry["by_seed"][0]["smoothness"]) == QUICK.directions + 1
    assert result["spearman"] is None and result["spearman_95_percent"] is None


def test_enough_ways_to_train_have_a_correlation(found, monkeypatch):
    monkeypatch.setattr(recipe, "ENOUGH", 3)
    few = recipe.replace(QUICK, choices=(BASE, SMOOTH, ROUGH), steps=4)
    again = recipe.run(data.digits(), data.digits(train=False), few, seed=0)
    low, high = again.to_dict()["spearman_95_percent"]
    assert low <= again.rho <= high and f"{again.rho:.2f}" in report.page(again).verdict


def test_terminal_and_page(found, tmp_path):
    from matplotlib.image import imread

    console = Console(width=80, record=True, file=io.StringIO())
    page = report.page(found)
    show(page, console)
    text = console.export_text()
    assert f"{found.measured[BASE].smoothness:.3f}" in text and "too few to say" in text and "…" not in text
    paths = write(page, tmp_path)
    assert {path.name for path in paths} == {"index.html", "smoothness-and-error.png", "smoothness-and-accuracy.png"}
    for path in paths[1:]:
        assert imread(path)[..., :3].std() > 0.05


def test_a_diverged_choice_stands_last_and_without_numbers(found):
    measured = {**found.measured, "ReLU": recipe.Timings([None], [math.nan])}
    rows = report.ranking(recipe.replace(found, measured=measured))
    assert rows[-1] == ["ReLU", "diverged", "", "", "", ""]
