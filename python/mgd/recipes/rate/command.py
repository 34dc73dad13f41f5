"""`mgd recipe rate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgd.ui.console import Session
from mgd.ui.options import Json, Out, Quick, Seed, Threads

Resume = Annotated[
    Path | None,
    typer.Option("--resume", metavar="DIR", help="Keep the learning there, and continue one that was interrupted."),
]


def command(
    out: Out = None,
    json: Json = None,
    seed: Seed = 0,
    threads: Threads = 1,
    quick: Quick = False,
    resume: Resume = None,
) -> None:
    """Rate the passages of a mixed pool by what they teach about a target text (DataRater)."""
    from mgd.recipes.rate import report
    from mgd.recipes.rate.recipe import Settings, run

    session = Session("recipe rate", out, json, threads)
    settings = Settings(seed=seed)
    found = run(settings.quick() if quick else settings, session.reporter, resume)
    session.finish(report.page(found), found.to_dict())
