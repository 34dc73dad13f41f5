"""The recipe `mixture` on the texts that every Python with torch holds: its parts, its promise, its page."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import matplotlib.image
import pytest
import torch

from mgd.errors import BadArgument
from mgd.recipes.mixture import recipe, report
from mgd.recipes.mixture.descent import FLOOR, Path, lattice, shares_of, weights_of
from mgd.recipes.mixture.recipe import BY_SIZE, EQUAL, FORWARD, GRID, REVERSE, Task
from mgd.ui.page import write

ALWAYS = ["pydoc", "python", "c++"]


@pytest.fixture(scope="module")
def found():
    patch = pytest.MonkeyPatch()
    patch.setattr(recipe, "available", lambda: ALWAYS)
    try:
        return recipe.run(replace(recipe.Settings().quick(), steps=16, meta_steps=6, outer=0.8))
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def task():
    return Task(recipe.Settings().quick(), ALWAYS, 0)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_shares_are_a_mixture_with_a_floor():
    shares = shares_of(torch.tensor([50.0, 0.0, 0.0, -3.0]))
    assert float(shares.sum()) == pytest.approx(1) and float(shares.min()) == pytest.approx(FLOOR)


def test_weights_are_one_where_batches_are_drawn_by_them_and_move_with_the_shares():
    shares, source = torch.tensor([0.2, 0.8]), torch.tensor([1, 0, 1])
    assert weights_of(shares, shares, source).tolist() == [1.0, 1.0, 1.0]
    assert weights_of(torch.tensor([0.4, 0.6]), shares, source).tolist() == pytest.approx([0.75, 2.0, 0.75])


@pytest.mark.parametrize("sources, parts", [(2, 1), (3, 4), (6, 2), (6, 3)])
def test_the_grid_has_every_mixture_once(sources, parts):
    points = lattice(sources, parts)
    assert len({tuple(point.tolist()) for point in points}) == len(points) == math.comb(parts + sources - 1, parts)
    for point in points:
        assert float(point.sum()) == pytest.approx(1, abs=1e-6) and float(point.min()) >= FLOOR * 0.999


def test_what_is_found_is_the_mean_of_the_last_quarter():
    shares = [torch.tensor([float(i), 1.0]) for i in range(9)]
    assert Path(shares, []).found.tolist() == [7.5, 1.0]


def test_batches_are_drawn_by_the_shares_and_each_number_has_its_own(task):
    shares = torch.tensor([0.7, 0.2, 0.1])
    first, again, other = (task.training(shares, number).batches for number in (3, 3, 4))
    source = torch.cat([batch[1] for batch in first])
    assert torch.equal(source, torch.cat([batch[1] for batch in again]))
    assert not torch.equal(source, torch.cat([batch[1] for batch in other]))
    counts = torch.bincount(source, minlength=3) / len(source)
    assert float((counts - shares).abs().max()) < 0.15
    for tokens, origin, _ in first:
        pools = [set(map(tuple, pool.tolist())) for pool in task.pools]
        assert all(tuple(row) in pools[k] for row, k in zip(tokens.tolist(), origin.tolist(), strict=True))


def test_a_forward_sweep_gives_the_metagradient_of_every_text(task):
    shares = torch.tensor([0.5, 0.3, 0.2])
    several = task.training(shares, 0, texts=True)
    value, table = recipe.effects(several, shares)
    gradients = several.metagradient({"mixture": shares}).grads["mixture"].T
    assert value.shape == (3,) and table.shape == (3, 3)
    torch.testing.assert_close(table, gradients - gradients[-1], rtol=1e-3, atol=1e-5)


# --- the whole of it -------------------------------------------------------------------------------------------------


def test_both_modes_walk_the_same_path(found):
    assert found.agreement < 1e-4 and len(found.paths[FORWARD].shares) == 1 + found.settings.forward_steps
    assert found.forward > found.reverse > 1


def test_a_descent_finds_shares_with_a_lower_loss(found):
    shares, values = found.paths[REVERSE].shares, found.paths[REVERSE].values
    assert sum(values[-2:]) < sum(values[:2])
    assert float(shares[0].std()) < 1e-6 and float(found.mixtures[REVERSE][2]) < 0.2  # C++ is no target
    means = {name: sum(judged.bits) / len(judged.bits) for name, judged in found.judged.items()}
    assert means[REVERSE] < means[BY_SIZE] and means[GRID] < means[BY_SIZE] and means[REVERSE] < means[EQUAL]


def test_the_json_and_the_page_are_complete(found, tmp_path):
    result = json.loads(json.dumps(found.to_dict()))
    assert result["mixtures"].keys() == result["judged"].keys() and len(result["paths"][REVERSE]["shares"]) == 7
    assert result["target"] == ["pydoc", "python"] and result["forward_sweep_in_trainings"] == found.forward
    paths = write(report.page(found), tmp_path)
    assert [path.name for path in paths] == ["index.html", "shares.png", "test.png"]
    assert matplotlib.image.imread(paths[1]).std() > 0.01
    assert "fewer bits per byte than shares by size" in report.verdict(found)


@pytest.mark.parametrize("name, value", [("steps", 1), ("few", 0), ("seeds", 1), ("forward_steps", 99)])
def test_settings_that_cannot_be_are_refused(name, value):
    with pytest.raises(BadArgument, match=name):
        recipe.run(recipe.Settings(**{name: value}))
