"""`mgd recipe rate`."""

from __future__ import annotations

from mgd.recipes.options import make_settings
from mgd.ui.console import Session
from mgd.ui.options import Device, Json, Out, Quick, Resume, Seed, Threads


def command(
    out: Out = None,
    json: Json = None,
    seed: Seed = 0,
    threads: Threads = 1,
    quick: Quick = False,
    resume: Resume = None,
    device: Device = "cpu",
) -> None:
    """Rate the passages of a mixed pool by what they teach about a target text (DataRater)."""
    from mgd.recipes.rate import report
    from mgd.recipes.rate.recipe import Settings, run
    from mgd.util.devices import checked_device
    from mgd.util.packages import require

    checked_device(device)
    require("statistics", "recipes", "scipy", "sklearn")
    session = Session("recipe rate", out, json, threads)
    result = run(make_settings(Settings, quick, seed=seed), session.reporter, resume, device)
    session.finish(report.page(result), result.to_dict())
