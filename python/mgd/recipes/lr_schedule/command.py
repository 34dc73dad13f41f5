"""`mgd recipe lr-schedule`."""

from __future__ import annotations

from typing import Annotated

import typer

from mgd.recipes.options import make_settings, train_and_test
from mgd.ui.console import Session
from mgd.ui.options import Data, Device, Json, Out, Quick, Resume, Seed, Threads


def command(
    data: Data = None,
    out: Out = None,
    json: Json = None,
    seed: Seed = 0,
    threads: Threads = 1,
    quick: Quick = False,
    meta_steps: Annotated[int | None, typer.Option(min=1, help="Meta-steps of the metagradient descent.")] = None,
    knots: Annotated[
        int | None, typer.Option(min=1, help="Knots of the schedule; by default each step has its own rate.")
    ] = None,
    outer: Annotated[float | None, typer.Option(help="Learning rate of Adam on the logarithms of the rates.")] = None,
    wrong: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of wrong labels in a fixed half of the steps.")
    ] = None,
    resume: Resume = None,
    device: Device = "cpu",
) -> None:
    """Find a learning-rate schedule by metagradients, and compare with a grid, TPE and CMA-ES."""
    from mgd.recipes.lr_schedule import report
    from mgd.recipes.lr_schedule.recipe import Settings, run
    from mgd.util.devices import checked_device
    from mgd.util.packages import require

    require("searches and intervals", "recipes", "cma", "optuna", "scipy")
    checked_device(device)
    session = Session("recipe lr-schedule", out, json, threads)
    settings = make_settings(Settings, quick, meta_steps=meta_steps, knots=knots, outer=outer, wrong=wrong)
    result = run(*train_and_test(data), settings, seed, resume, session.reporter, device)
    session.finish(report.page(result), result.to_dict())
