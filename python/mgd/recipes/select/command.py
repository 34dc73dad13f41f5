"""`mgd recipe select`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from mgd.options import Data, Json, Out, Quick, Seed, Threads

Budget = Annotated[int | None, typer.Option("--budget", help="Keep the sum of the counts: exchange, not up and down.")]
Shard = Annotated[int | None, typer.Option("--shard", help="Candidates a meta-step, drawn anew; by default the pool.")]
Uniform = Annotated[bool, typer.Option("--uniform", help="Wrong labels of any other class, not of a similar one.")]
MetaSteps = Annotated[int | None, typer.Option("--meta-steps", min=1, help="Trainings with a metagradient.")]


def command(
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
    """Select training images by metagradients: wrong labels, copies and noise go."""
    from mgd.data import load
    from mgd.recipes.form import Session
    from mgd.recipes.select import report
    from mgd.recipes.select.images import Settings
    from mgd.recipes.select.run import run

    session = Session("recipe select", out, json, threads)
    settings = Settings(seed=seed, budget=budget, shard=shard, uniform=uniform)
    settings = settings.quick() if quick else settings
    if budget is not None:
        settings = replace(settings, highest=1)
    if meta_steps is not None:
        settings = replace(settings, meta_steps=meta_steps)
    found = run(load(data), load(data, train=False), settings, session.talk)
    session.finish(report.page(found), found.to_dict())
