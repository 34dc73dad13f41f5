"""`mgd recipe smoothness`."""

from __future__ import annotations

from mgd.recipes.options import make_settings, train_and_test
from mgd.ui.console import Session
from mgd.ui.options import Data, Device, Json, Out, Quick, Seed, Threads


def command(
    data: Data = None,
    out: Out = None,
    json: Json = None,
    seed: Seed = 0,
    threads: Threads = 1,
    quick: Quick = False,
    device: Device = "cpu",
) -> None:
    """Which choices make a training smooth, whether smooth ones can be predicted, and what accuracy they cost."""
    from mgd.recipes.smoothness import report
    from mgd.recipes.smoothness.recipe import Settings, run
    from mgd.util.devices import checked_device
    from mgd.util.packages import require

    require("intervals", "recipes", "scipy")
    checked_device(device)
    session = Session("recipe smoothness", out, json, threads)
    result = run(*train_and_test(data), make_settings(Settings, quick), seed, session.reporter, device)
    session.finish(report.page(result), result.to_dict())
