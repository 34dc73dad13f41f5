"""What the recipes' commands share: settings from options, and both parts of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from mgd.recipes.data import Images

Settings = TypeVar("Settings", bound=Any)


def make_settings(kind: Callable[[], Settings], quick: bool, **options: Any) -> Settings:
    """The settings of a recipe, or its quick ones, with the options that were given: those that are not None."""
    settings = kind().quick() if quick else kind()
    return replace(settings, **{name: value for name, value in options.items() if value is not None})


def train_and_test(folder: Path | None) -> tuple[Images, Images]:
    from mgd.recipes.data import load

    return load(folder), load(folder, train=False)
