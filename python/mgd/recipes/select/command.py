"""`mgd recipe select`."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgd.ui.options import Data, Json, Out, Quick, Seed, Threads

if TYPE_CHECKING:
    from mgd.recipes.select.setting import Setting


class Name(str, Enum):
    images = "images"
    emoji = "emoji"
    lora = "lora"


WHAT = "images: a classifier. emoji: a contrastive image-text model. lora: fine-tuning of a pretrained text encoder."
Which = Annotated[Name, typer.Option("--setting", help=WHAT)]
Budget = Annotated[int | None, typer.Option("--budget", help="Keep the sum of the counts: exchange, not up and down.")]
Shard = Annotated[int | None, typer.Option("--shard", help="Candidates a meta-step, drawn anew; by default the pool.")]
Uniform = Annotated[bool, typer.Option("--uniform", help="Images: wrong labels of any class, not of a similar one.")]
MetaSteps = Annotated[int | None, typer.Option("--meta-steps", min=1, help="Trainings with a metagradient.")]


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
) -> None:
    """Select training data by metagradients: wrong labels, copies and noise go."""
    if setting is not Name.images and (data is not None or uniform):
        raise typer.BadParameter(f"--data and --uniform are for images; not for {setting.value}")
    from mgd.recipes.select import report
    from mgd.recipes.select.run import run
    from mgd.ui.console import Session

    session = Session("recipe select", out, json, threads)
    given = {"seed": seed, "budget": budget, "shard": shard, "meta_steps": meta_steps}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if budget is not None:
        changes["highest"] = 1
    found = run(make(setting, quick, changes, data, uniform), session.reporter)
    session.finish(report.page(found), found.to_dict())


def make(name: Name, quick: bool, changes: dict[str, Any], data: Path | None = None, uniform: bool = False) -> Setting:
    """The setting of this name, its quick form or not, with some of its `Settings` changed."""
    if name is Name.emoji:
        from mgd.recipes.data.emoji import load as load_emoji
        from mgd.recipes.select import emoji

        s = emoji.Settings()
        return emoji.EmojiSetting(load_emoji(), replace(s.quick() if quick else s, **changes))
    if name is Name.lora:
        from mgd.recipes.select import lora

        t = lora.Settings()
        return lora.LoraSetting(replace(t.quick() if quick else t, **changes))
    from mgd.recipes.data import load
    from mgd.recipes.select import images

    u = images.Settings(uniform=uniform)
    return images.ImageSetting(load(data), load(data, train=False), replace(u.quick() if quick else u, **changes))
