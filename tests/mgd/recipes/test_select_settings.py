"""The other settings of the recipe `select`: pairs of images and words, and passages of text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from selection_cases import complete, kept_by_kind, written

from mgd.errors import BadArgument, BadData
from mgd.recipes.select import run as recipe
from mgd.recipes.select.setting import Setting


def of_pairs(**changes):
    from mgd.recipes.data.emoji import load
    from mgd.recipes.select.emoji import EmojiSetting
    from mgd.recipes.select.emoji import Settings as EmojiSettings

    try:
        emoji = load()
    except BadData as error:
        pytest.skip(str(error))
    return EmojiSetting(emoji, replace(EmojiSettings().quick(), **changes))


@pytest.fixture(scope="module")
def pairs():
    return of_pairs()


def test_pairs_are_as_they_say(pairs):
    n = pairs.settings.pool
    matched = torch.tensor([given == true for given, true in zip(pairs.given, pairs.true, strict=True)])
    assert bool(matched[:n][pairs.kind == 0].all())
    assert int(matched[:n][pairs.kind == 1].sum()) <= 1  # two emoji share a name
    assert pairs.given.count("emoji") == 48 and int(matched[:n][pairs.kind == 2].sum()) == 48
    assert bool(matched[n:].all()) and pairs.numbers() == {"matched": 288, "mismatched": 256, "uninformative": 96}
    assert len(pairs.held[0]) + len(pairs._test[0]) + n <= len(pairs.true)
    assert len(pairs._test[0]) % 200 == 0


def test_contrastive_losses_and_ranks_are_those_of_the_definition(pairs, monkeypatch):
    from mgd.recipes.select.emoji import contrastive, features

    similar = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.arange(5)
    entropy = torch.nn.functional.cross_entropy
    both = entropy(similar, target, reduction="none") + entropy(similar.T, target, reduction="none")
    assert torch.allclose(contrastive(similar), both / 2)
    cosines = features(["red apple", "green apple", "zebra"]) @ features(["red apple"]).T
    assert cosines[0] == pytest.approx(1) and cosines[0] > cosines[1] > cosines[2]
    perfect, third = torch.eye(200), torch.eye(200).roll(1, 1) + torch.eye(200).roll(2, 1) + torch.eye(200) / 2
    monkeypatch.setattr(pairs, "call", lambda *_: perfect)
    assert pairs.test({}) == (1, 1)
    monkeypatch.setattr(pairs, "call", lambda *_: third)
    assert pairs.test({}) == (1, 0)


@pytest.fixture(scope="module")
def whole_pairs(pairs):
    return recipe.run(pairs)


def test_selection_drops_mismatched_pairs(whole_pairs):
    matched, mismatched, _ = kept_by_kind(whole_pairs)
    assert matched > mismatched + 0.15


@pytest.fixture(scope="module")
def found_pairs():
    """Too short for an effect: what is found is there, and is shown."""
    return recipe.run(of_pairs(steps=6, meta_steps=2, repeats=1))


def test_what_is_found_of_pairs_is_there_and_shown(found_pairs, tmp_path):
    complete(found_pairs)
    written(found_pairs, tmp_path, {"accuracy", "precision", "counts", "dropped", "kept"})


def of_passages(**changes):
    from mgd.recipes.data.text import installed
    from mgd.recipes.models import encoder
    from mgd.recipes.select.lora import CLASSES, OTHERS, LoraSetting
    from mgd.recipes.select.lora import Settings as LoraSettings

    missing = [text for name, text in installed().items() if name in CLASSES + OTHERS and text]
    if missing or encoder.installed() is None:
        pytest.skip(f"needs `make data`: {missing or encoder.INSTALL}")
    return recipe.run(LoraSetting(replace(LoraSettings().quick(), **changes)))


@pytest.fixture(scope="module")
def whole_passages():
    return of_passages()


def test_selection_drops_passages_with_wrong_labels(whole_passages):
    clean, wrong, _ = kept_by_kind(whole_passages)
    assert clean > wrong + 0.1


@pytest.fixture(scope="module")
def found_passages():
    """Too short for an effect, as of pairs."""
    return of_passages(steps=4, meta_steps=2)


def test_what_is_found_of_passages_is_there_and_shown(found_passages, tmp_path):
    complete(found_passages)
    written(found_passages, tmp_path, {"accuracy", "precision", "counts"})
    assert "is from" in (tmp_path / "index.html").read_text()


def test_layers_below_lora_computed_once_are_the_whole_encoder(found_passages):
    setting = found_passages.setting
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    tokens[:, :9] = torch.randint(1, 2000, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        upper = setting.problem.model(setting._below(tokens), tokens != 0)
        assert torch.allclose(upper, setting.whole(tokens), atol=1e-5)


def test_bad_sizes_of_the_other_settings_are_refused(pairs):
    from mgd.recipes.data.emoji import Captioned
    from mgd.recipes.select import emoji, lora

    few = Captioned(pairs.images[:300], tuple(pairs.true[:300]), ("",) * 300)
    with pytest.raises(BadArgument, match="and at most 100 together, as 200 of the 300 test; got 640 and 280"):
        emoji.EmojiSetting(few, pairs.settings)
    with pytest.raises(BadArgument, match=r"1\.\.6 layers; got 7"):
        lora.LoraSetting(lora.Settings(layers=7))
    with pytest.raises(BadArgument, match=r"at least a batch \(16\)"):
        lora.LoraSetting(lora.Settings(held_out=4))


def test_a_setting_says_what_it_lacks():
    with pytest.raises(TypeError, match="abstract"):
        Setting()


def test_the_command_refuses_what_another_setting_wants(capsys):
    from mgd.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main("recipe select --setting lora --uniform".split())
    assert ended.value.code != 0
