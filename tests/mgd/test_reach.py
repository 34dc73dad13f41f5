"""Modules that only long tests, or tests with data that may be missing, would reach otherwise: in small."""

import pytest
import torch
import torch.nn.functional as F

from mgd.cli import main as cli
from mgd.recipes.select import emoji, lora
from mgd_kernels import __main__ as overview
from mgd_kernels import backends


@pytest.mark.parametrize("name", cli.PROFILES)
def test_profiles_have_help(capsys, name):
    with pytest.raises(SystemExit) as end:
        cli.main(["profile", name, "--help"])
    assert not end.value.code and "--json" in capsys.readouterr().out


def test_contrastive_losses_are_those_of_the_definition():
    similar = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, columns = (F.cross_entropy(x, torch.arange(5), reduction="none") for x in (similar, similar.T))
    assert torch.allclose(emoji.contrastive(similar), (rows + columns) / 2)


def test_names_that_share_words_are_similar():
    cosines = emoji.features(["red apple", "green apple", "zebra"]) @ emoji.features(["red apple"]).T
    assert cosines[0] == pytest.approx(1) and cosines[0] > cosines[1] > cosines[2]


def test_passages_are_of_their_texts_and_do_not_overlap(monkeypatch):
    texts = {name: " ".join(f"{name}{i}" for i in range(400)) for name in lora.CLASSES + lora.OTHERS}
    monkeypatch.setattr(lora, "read", lambda name: texts[name].encode())
    source = torch.tensor([0, 3, 1, 0, 2, 4, 0])
    passages = lora.passages(source, torch.Generator().manual_seed(0))
    assert len(set(passages)) == len(source)
    for i, passage in zip(source.tolist(), passages, strict=True):
        assert texts[(lora.CLASSES + lora.OTHERS)[i]].index(passage) % len(passage) == 0


def test_the_overview_names_every_backend():
    lines = overview.report().splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(backends())]] == list(backends())


def test_triton_tiles_are_powers_of_two():
    """As `tl.arange` needs them."""
    pytest.importorskip("triton")
    from mgd_kernels.backends import triton_kernels

    for block in (triton_kernels.BLOCK, triton_kernels.VJP_BLOCK):
        assert block & (block - 1) == 0 and triton_kernels.options(block)["num_warps"] >= 1


def test_tiles_of_attention_are_powers_of_two():
    """As `tl.dot` needs them, whose sides have 16 elements at least."""
    pytest.importorskip("triton")
    from mgd_kernels import aot_operators  # noqa: F401
    from mgd_kernels.backends import (  # noqa: F401
        triton_attention,
        triton_attention_kernels,
        triton_channel_kernels,
        triton_loss_kernels,
        triton_nn_kernels,
    )

    tiles = [
        tile for kernels in triton_attention.TILES.values() for blocks in kernels.values() for tile in blocks.values()
    ]
    for side in {*triton_attention.BLOCKS, triton_attention.CHUNK, *(n for tile in tiles for n in tile[:2])}:
        assert side >= 16 and side & (side - 1) == 0
