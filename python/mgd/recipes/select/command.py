"""`mgd recipe select`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgd.recipes.options import make_settings, train_and_test
from mgd.ui.options import Data, Device, Json, Out, Quick, Seed, Threads

if TYPE_CHECKING:
    from mgd.recipes.select.setting import Setting


class Name(str, Enum):
    images = "images"
    emoji = "emoji"
    lora = "lora"


WHAT = "images: a classifier. emoji: a contrastive image-text model. lora: fine-tuning of a pretrained text encoder."
Which = Annotated[Name, typer.Option("--setting", help=WHAT)]
Budget = Annotated[int | None, typer.Option("--budget", help="Keep the sum of the counts at this: exchange examples.")]
Shard = Annotated[int | None, typer.Option("--shard", help="Candidates per meta-step, drawn anew; default: the pool.")]
Uniform = Annotated[bool, typer.Option("--uniform", help="Images: wrong labels are of any class, not a similar one.")]
MetaSteps = Annotated[int | None, typer.Option("--meta-steps", min=1, help="Number of trainings with a metagradient.")]


def command(
    setting: Which = Name.images,
    data: Data = None,
    out: Out = None,
    json: Json = None,
    seed: Seed = 0,
    threads: Threads = 1,
    quick: Quick = False,
    meta_steps: MetaSteps = None,
    budget: Budget = None,
    shard: Shard = None,
    uniform: Uniform = False,
    device: Device = "cpu",
) -> None:
    """Select training data by metagradients: drop wrong labels, copies and noise."""
    if setting is not Name.images and (data is not None or uniform):
        raise typer.BadParameter(f"--data and --uniform are for images; not for {setting.value}")
    from mgd.recipes.select import report
    from mgd.recipes.select.run import run
    from mgd.ui.console import Session
    from mgd.util.devices import checked_device

    checked_device(device)
    session = Session("recipe select", out, json, threads)
    options = {"seed": seed, "budget": budget, "shard": shard, "meta_steps": meta_steps}
    options["highest"] = None if budget is None else 1
    result = run(make(setting, quick, options, data, uniform, device), session.reporter)
    session.finish(report.page(result), result.to_dict())


def make(
    name: Name,
    quick: bool,
    options: dict[str, Any],
    data: Path | None = None,
    uniform: bool = False,
    device: str = "cpu",
) -> Setting:
    """The setting of this name, in its quick form or not, with those of its `Settings` changed that are not None."""
    if name is Name.emoji:
        from mgd.recipes.data.emoji import load as load_emoji
        from mgd.recipes.select import emoji

        return emoji.EmojiSetting(load_emoji(), make_settings(emoji.Settings, quick, **options), device)
    if name is Name.lora:
        from mgd.recipes.select import lora

        return lora.LoraSetting(make_settings(lora.Settings, quick, **options), device)
    from mgd.recipes.select import images

    settings = make_settings(images.Settings, quick, uniform=uniform, **options)
    return images.ImageSetting(*train_and_test(data), settings, device)
