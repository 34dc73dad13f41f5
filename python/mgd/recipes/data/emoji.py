"""Emoji and their names: 32×32 colour pictures (Twitter's, CC-BY 4.0) with a short English name and a category."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mgd.errors import BadData
from mgd.recipes.data.places import folder

CELL, PITCH, BORDER = 32, 34, 1  # pixels of the sheet


@dataclass(frozen=True)
class Captioned:
    """images: uint8 `[n, 3, 32, 32]` on white. names: such as "grinning face". categories: such as "Flags"."""

    images: Tensor
    names: tuple[str, ...]
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def load(path: Path | None = None) -> Captioned:
    """All emoji of the package emoji-datasource-twitter that have a picture."""
    from PIL import Image

    path = path or folder("emoji", "make data")
    sheet_file, list_file = path / "img" / "twitter" / "sheets-clean" / "32.png", path / "emoji.json"
    try:
        entries = json.loads(list_file.read_text("utf-8"))
        with Image.open(sheet_file) as sheet:
            pixels = np.asarray(sheet.convert("RGBA"), np.float32)
    except (OSError, ValueError) as error:
        raise BadData(f"cannot read emoji from {path}: {error}") from error
    # The sheet is transparent; its pictures go on white.
    opaque = pixels[..., 3:] / 255
    white = (pixels[..., :3] * opaque + 255 * (1 - opaque)).round().astype(np.uint8)
    entries = sorted((e for e in entries if e.get("has_img_twitter")), key=lambda e: e["sort_order"])
    images = []
    for entry in entries:
        top, left = entry["sheet_y"] * PITCH + BORDER, entry["sheet_x"] * PITCH + BORDER
        images.append(white[top : top + CELL, left : left + CELL].transpose(2, 0, 1))
    return Captioned(
        torch.from_numpy(np.stack(images)),
        tuple(entry["name"].lower() for entry in entries),
        tuple(entry["category"] for entry in entries),
    )
