"""`mgd recipe mixture`."""

from __future__ import annotations

from typing import Annotated

import typer

from mgd.recipes.options import make_settings
from mgd.ui.console import Session
from mgd.ui.options import Json, Out, Quick, Seed, Threads


def command(
    out: Out = None,
    json: Json = None,
    seed: Seed = 0,
    threads: Threads = 1,
    quick: Quick = False,
    meta_steps: Annotated[int | None, typer.Option(min=1, help="Meta-steps of each descent.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Steps of every training.")] = None,
) -> None:
    """Find the shares of text sources by metagradients and by forward mode; compare with a grid and with shares by
    size."""
    from mgd.recipes.mixture import report
    from mgd.recipes.mixture.recipe import Settings, run
    from mgd.util.packages import require

    require("intervals", "recipes", "scipy")
    session = Session("recipe mixture", out, json, threads)
    settings = make_settings(Settings, quick, meta_steps=meta_steps, steps=steps)
    result = run(settings, seed, session.reporter)
    session.finish(report.page(result), result.to_dict())
