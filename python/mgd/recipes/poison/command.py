"""`mgd recipe poison`."""

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
    """Measure how much a few perturbed training images cost a training, and which checks find them."""
    from mgd.recipes.poison import report
    from mgd.recipes.poison.recipe import Settings, run
    from mgd.util.devices import checked_device

    checked_device(device)
    session = Session("recipe poison", out, json, threads)
    train, test = train_and_test(data)
    settings = make_settings(Settings, quick, seed=seed).fitting(len(train))
    result = run(train, test, settings, session.reporter, device)
    session.finish(report.page(result), result.to_dict())
