"""`mgd recipe lr-schedule`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mgd.recipes.data import load
from mgd.ui.console import Session
from mgd.ui.options import Data, Json, Out, Quick, Seed, Threads


def command(
    data: Data = None,
    out: Out = None,
    json: Json = None,
    seed: Seed = 0,
    threads: Threads = 1,
    quick: Quick = False,
    meta_steps: Annotated[int | None, typer.Option(min=1, help="Of metagradient descent.")] = None,
    knots: Annotated[int | None, typer.Option(min=1, help="Of the schedule; as many as steps set every step.")] = None,
    outer: Annotated[float | None, typer.Option(help="Learning rate of Adam on the logarithms of the knots.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep every training there, and continue from what it holds.")
    ] = None,
) -> None:
    """Find a learning-rate schedule by metagradients, and compare with a grid, random search, TPE and CMA-ES."""
    from mgd.recipes.lr_schedule import report
    from mgd.recipes.lr_schedule.recipe import Settings, run

    session = Session("recipe lr-schedule", out, json, threads)
    settings = Settings().quick() if quick else Settings()
    given: dict[str, Any] = {"meta_steps": meta_steps, "knots": knots, "outer": outer}
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    found = run(load(data), load(data, train=False), settings, seed, resume, session.reporter)
    session.finish(report.page(found), found.to_dict())
