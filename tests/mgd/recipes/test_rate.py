"""The recipe `rate` on the texts that every Python with torch holds: its effect, its parts, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import matplotlib.image
import pytest
import torch

from mgd import errors
from mgd.recipes.data import text
from mgd.recipes.rate import data, models, recipe, report
from mgd.recipes.rate.data import CORRUPTIONS, NOISE, Pool, available, corrupted, passages
from mgd.recipes.rate.models import Curve
from mgd.recipes.rate.selection import EVERYTHING, RATER, share_needed
from mgd.ui.page import write


@pytest.fixture(scope="module")
def whole():
    return recipe.run(recipe.Settings().quick())


@pytest.fixture(scope="module")
def found():
    """Too short for an effect: what is found is there, and is shown."""
    few = {"each": 400, "meta_steps": 8, "lifetime": 30, "transfer_steps": 20, "steps": 40, "judged": 32}
    return recipe.run(replace(recipe.Settings().quick(), **few))


# --- the whole of it -------------------------------------------------------------------------------------------------


def test_ratings_rank_the_domains_as_transfer_does(whole):
    means = whole.mean_ratings()
    assert max(means, key=means.get) == "pydoc" == whole.target
    assert min(means, key=means.get) == NOISE == max(whole.transfer, key=whole.transfer.get)
    assert whole.rank_correlation >= 0.8  # of four domains: at most one pair of neighbours stands the other way round
    assert whole.agreeing_pairs[0] >= 5


def test_what_is_kept_teaches_faster_than_everything(whole):
    needed = whole.selection.needed(RATER)
    assert all(share is not None and share <= 0.7 for share in needed), needed
    ways = whole.selection.ways
    assert ways[RATER].composition["pydoc"] > 0.5 > ways["random"].composition["pydoc"]
    assert ways[RATER].final < ways[EVERYTHING].final
    course = {name: sum(kept.mean_curve().losses) / len(kept.mean_curve().losses) for name, kept in ways.items()}
    assert course[RATER] < course["random"] - 0.05  # bits a byte, averaged over the training
    assert ways[RATER].composition[NOISE] == 0


def test_corrupted_passages_are_rated_lower(whole):
    assert whole.auc["pydoc"]["replaced"] > 0.65 and whole.auc["pydoc"]["all"] > 0.55


def test_the_json_is_complete(found):
    result = json.loads(json.dumps(found.to_dict()))
    assert result["mean_ratings"].keys() == result["transfer_bits_per_byte"].keys() == set(found.domains)
    assert set(result["selection"]["ways"]) >= {EVERYTHING, RATER, "random"}
    assert result["windows"] == found.settings.meta_steps * found.settings.population
    assert {"training", "hvp", "scoring"} <= set(result["seconds"])
    assert len(json.dumps(result)) < 100_000


def test_the_page_shows_what_was_found(found, tmp_path):
    page = report.page(found)
    paths = write(page, tmp_path)
    pictures = [path for path in paths if path.suffix == ".png"]
    assert {path.stem for path in pictures} == {"ratings", "transfer", "course", "selection"}
    for path in pictures:
        assert matplotlib.image.imread(path)[..., :3].std() > 0.02, path
    written = (tmp_path / "index.html").read_text()
    agree, pairs = found.agreeing_pairs
    assert pairs == 6 and f"Of 6 pairs of domains, {agree} " in written
    means = found.mean_ratings()
    assert [row[0] for row in page.tables[0][1][1:]] == sorted(means, key=lambda domain: -means[domain])
    best = int(found.ratings.argmax())
    assert len(page.tables[0][1]) == 1 + len(found.domains)
    assert any(data.readable(found.evaluated.tokens[best]) == row[0] for row in report.extremes(found, True))


# --- its parts -------------------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_parts_of_a_text_do_not_overlap():
    ends = list(data.PARTS.values())
    assert ends[0][0] == 0 and ends[-1][1] == 1 and all(a[1] == b[0] for a, b in pairwise(ends))
    tokens = text.tokens(text.read("pydoc"))
    low, high = (int(x * len(tokens)) for x in data.PARTS["test"])
    where = tokens[low:high].unfold(0, 40, 1)
    for row in passages("pydoc", "test", 5, 40, generator()):
        assert bool((where == row).all(1).any())


def test_shuffling_keeps_the_characters_and_moves_some():
    clean = passages("pydoc", "pool", 50, 100, generator())
    bad = corrupted(clean, "shuffled", generator(1))
    assert torch.equal(bad.sort(1).values, clean[:, :50].sort(1).values)
    assert 0.1 < float((bad != clean[:, :50]).double().mean()) < 0.5


def test_replacing_touches_between_a_fifth_and_a_half():
    clean = passages("pydoc", "pool", 200, 200, generator())
    changed = (corrupted(clean, "replaced", generator(1)) != clean[:, :100]).double().mean(1)
    assert 0.28 < float(changed.mean()) < 0.40 and float(changed.min()) > 0.05 and float(changed.max()) < 0.7


def test_dropping_keeps_the_order():
    bad = corrupted(torch.arange(100).repeat(20, 1), "dropped", generator())
    assert bad.shape == (20, 50) and bool((bad.diff() > 0).all())
    assert 60 < float(bad[:, -1].double().mean()) < 95  # 50 characters of which 20 to 50% are missing


def test_a_pool_holds_what_it_says():
    pool = Pool.make(["pydoc", NOISE], "pool", 60, 33, 0.25, seed=0)
    assert len(pool) == 120 and pool.tokens.shape == (120, 33)
    assert [int((pool.corruption == i).sum()) for i in (1, 2, 3)] == [5, 5, 5]
    assert int(pool.where(NOISE, clean=False).sum()) == 0 and int(pool.where("pydoc", clean=True).sum()) == 45
    assert torch.equal(pool.tokens, Pool.make(["pydoc", NOISE], "pool", 60, 33, 0.25, seed=0).tokens)
    i = int(pool.where("pydoc", clean=False).nonzero()[0])
    assert pool.name(i) in {f"pydoc, {kind}" for kind in CORRUPTIONS}


def test_the_share_of_the_steps_that_a_curve_needs():
    curve = Curve([10, 20, 30, 40], [3.0, 2.5, 2.0, 2.2])
    assert share_needed(curve, 2.5) == 0.5 and share_needed(curve, 1.9) is None and share_needed(curve, 9.0) == 0.25


def test_the_rater_starts_fair_and_reads_bytes():
    rater = models.TextRater()
    tokens = passages("pydoc", "pool", 7, 33, generator())
    assert torch.equal(rater(tokens), torch.zeros(7))


def test_which_texts_are_taken(monkeypatch):
    monkeypatch.setattr(text, "installed", lambda: dict.fromkeys(text.DOMAINS) | {"state-of-the-union": "make data"})
    assert available(None) == list(data.ALWAYS)
    monkeypatch.setattr(text, "installed", lambda: dict.fromkeys(text.DOMAINS) | {"moby-dick": "make data"})
    assert available(None) == ["state-of-the-union", "shakespeare", "c++", "python", NOISE]


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"domains": ("pydoc",)}, errors.BadArgument, "at least two domains"),
        ({"domains": ("pydoc", "pydoc")}, errors.BadArgument, "at least two domains"),
        ({"domains": (NOISE, "pydoc")}, errors.BadArgument, "target.*to be a text"),
        ({"domains": ("pydoc", "klingon")}, errors.BadData, "klingon"),
        ({"each": 0}, errors.BadArgument, "at least one passage per domain; got 0"),
    ],
)
def test_bad_settings(changes, error, words):
    with pytest.raises(error, match=words):
        recipe.run(replace(recipe.Settings().quick(), **changes))


def test_a_corruption_that_is_none():
    with pytest.raises(errors.BadArgument, match="shuffled"):
        corrupted(torch.zeros(2, 8, dtype=torch.long), "torn", generator())
