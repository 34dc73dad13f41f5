"""The recipe `select` on images: its pool, what it finds on digits, and what it shows."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from selection_cases import complete, kept_by_kind

from mgd.errors import BadArgument, BadData
from mgd.recipes import data
from mgd.recipes.data import Images
from mgd.recipes.select import report
from mgd.recipes.select import run as recipe
from mgd.recipes.select.images import COPIES, KINDS, ImageSetting, Settings, make_pool
from mgd.ui.console import show
from mgd.ui.page import write


def made(**changes):
    settings = replace(Settings().quick(), **changes)
    return recipe.run(ImageSetting(data.digits(), data.digits(train=False), settings))


@pytest.fixture(scope="module")
def whole():
    return made()


@pytest.fixture(scope="module")
def found():
    """Too short for an effect: what is found is there, and is shown."""
    return made(steps=20, meta_steps=3, repeats=2)


def test_the_pool_is_as_it_says():
    settings = Settings().quick()
    pool = make_pool(data.digits(), data.digits(train=False), settings)
    size = torch.bincount(pool.kind, minlength=4).tolist()
    assert sum(size) == settings.pool == len(pool.images) and size[2] % COPIES == 0
    ordinary = pool.kind < KINDS.index("duplicate")
    assert torch.equal(pool.kind[ordinary] == 1, pool.images.labels[ordinary] != pool.truth[ordinary])
    assert float((pool.kind[ordinary] == 1).double().mean()) == pytest.approx(0.4, abs=0.06)
    pairs = set(zip(pool.truth[pool.kind == 1].tolist(), pool.images.labels[pool.kind == 1].tolist(), strict=True))
    assert len(pairs) == 10
    uniform = make_pool(data.digits(), data.digits(train=False), replace(settings, uniform=True))
    wrong = uniform.kind == KINDS.index("wrong")
    assert bool((uniform.images.labels[wrong] != uniform.truth[wrong]).all()) and torch.equal(wrong, pool.kind == 1)
    assert len(set(zip(uniform.truth[wrong].tolist(), uniform.images.labels[wrong].tolist(), strict=True))) > 60
    copies = pool.images.images[pool.kind == 2]
    assert len({bytes(image.numpy().tobytes()) for image in copies}) == len(copies) // COPIES

    def keys(images):
        return {bytes(image.numpy().tobytes()) for image in images.images}

    assert not keys(pool.images) & keys(pool.held_out) and not keys(pool.test) & keys(pool.held_out)
    assert not keys(pool.images) & keys(pool.test)


def test_selection_beats_everything_chance_and_the_filters_on_test_images(whole):
    assert whole.gain(recipe.ALL) > 0.1 and whole.gain(recipe.RANDOM) > 0.1
    assert whole.gain(recipe.names(whole.setting)[0]) > 0.05
    share = kept_by_kind(whole)
    assert share[0] > 0.9 and share[1] < 0.5  # clean ones stay, wrong ones go
    assert whole.choices[recipe.SELECTED].precision > float(whole.setting.good.double().mean()) + 0.1


def test_the_json_is_complete(found):
    complete(found)


def test_terminal_and_page_show_it(found, tmp_path):
    from matplotlib.image import imread

    console = Console(width=80, record=True, file=io.StringIO())
    page = report.page(found)
    show(page, console)
    text = console.export_text()
    assert "…" not in text and f"{found.choices[recipe.SELECTED].accuracy:.1%}" in text
    paths = write(page, tmp_path)
    assert {path.name for path in paths} == {
        "index.html",
        "accuracy.png",
        "precision.png",
        "counts.png",
        "dropped.png",
        "kept.png",
    }
    for path in paths[1:]:
        assert imread(path)[..., :3].std() > 0.02


def test_the_command_runs_with_a_budget_and_shards(tmp_path):
    from mgd.cli.main import main

    target = tmp_path / "found.json"
    arguments = "recipe select --quick --meta-steps 2 --budget 250 --shard 400 --json".split()
    with pytest.raises(SystemExit) as ended:
        main([*arguments, str(target)])
    assert ended.value.code == 0
    result = json.loads(target.read_text())
    assert [step["total"] for step in result["trace"]] == [250, 250] and result["command"] == "recipe select"
    assert replace(Settings(), **result["settings"]).shard == 400


def test_bad_images_are_refused():
    train, test, settings = data.digits(), data.digits(train=False), Settings().quick()
    one = train[train.labels == 3]
    with pytest.raises(BadData, match="all images of digits are of one class"):
        make_pool(one, test, settings)
    with pytest.raises(BadData, match="digits is empty"):
        make_pool(train[:0], test, settings)
    with pytest.raises(BadArgument, match="expected a pool and held-out images of"):
        make_pool(train, test, Settings())
    with pytest.raises(BadData, match=r"labels of x in 0\.\.1; got 0\.\.2"):
        Images("x", torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(3), ("a", "b"))
