"""Texts by domain, and emoji with their names: what the readers make of what is there, and what they say otherwise."""

import json

import numpy as np
import pytest
import torch

from mgd.errors import BadData
from mgd.recipes.data import emoji, text


def test_texts_of_every_installation_are_there_and_ascii():
    for domain in ("python", "c++", "pydoc"):
        read = text.read(domain)
        assert len(read) > 100_000 and max(read) < 128
        assert text.installed()[domain] is None
    assert b"def " in text.read("python") and b"#include" in text.read("c++") and b" the " in text.read("pydoc")


def test_bytes_become_tokens_and_back():
    content = text.read("pydoc")[:1000]
    tokens = text.tokens(content)
    assert tokens.dtype == torch.int64 and bytes(tokens.tolist()) == content


def test_a_text_that_is_not_installed_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("MGD_DATA", str(tmp_path))
    text.read.cache_clear()
    with pytest.raises(BadData, match="moby-dick: make data, or set MGD_DATA"):
        text.read("moby-dick")
    assert "make data" in text.installed()["moby-dick"]
    with pytest.raises(BadData, match=r"expected one of the texts .* got 'klingon'"):
        text.read("klingon")


def test_a_text_is_read_from_where_mgd_data_points(monkeypatch, tmp_path):
    (tmp_path / "moby-dick" / "data").mkdir(parents=True)
    (tmp_path / "moby-dick" / "data" / "data.txt").write_text("Call me Ishmaël.", "utf-8")
    monkeypatch.setenv("MGD_DATA", str(tmp_path))
    text.read.cache_clear()
    assert text.read("moby-dick") == b"Call me Ishmal."
    text.read.cache_clear()


@pytest.fixture
def sheet(tmp_path):
    """Two emoji side by side, a column and a row of transparent border around each, the second one half transparent."""
    from PIL import Image

    pixels = np.zeros((34, 68, 4), np.uint8)
    pixels[1:33, 1:33] = (255, 0, 0, 255)
    pixels[1:33, 35:67] = (0, 0, 0, 128)
    folder = tmp_path / "img" / "twitter" / "sheets-clean"
    folder.mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "32.png")
    common = {"sheet_y": 0, "category": "Symbols", "has_img_twitter": True}
    entries = [
        {"name": "GREY", "sheet_x": 1, "sort_order": 2, **common},
        {"name": "RED", "sheet_x": 0, "sort_order": 1, **common},
        {"name": "NONE", "sheet_x": 0, "sort_order": 0, **common, "has_img_twitter": False},
    ]
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    return tmp_path


def test_emoji_are_cut_from_the_sheet_and_put_on_white(sheet):
    found = emoji.load(sheet)
    assert (found.names, found.categories, len(found)) == (("red", "grey"), ("Symbols", "Symbols"), 2)
    assert found.images.shape == (2, 3, 32, 32) and found.images.dtype == torch.uint8
    assert found.images[0].flatten(1).unique(dim=1).flatten().tolist() == [255, 0, 0]
    assert found.images[1].unique().tolist() == [127]


def test_a_broken_sheet_is_named(sheet):
    (sheet / "emoji.json").write_text("[")
    with pytest.raises(BadData, match="cannot read emoji from"):
        emoji.load(sheet)
