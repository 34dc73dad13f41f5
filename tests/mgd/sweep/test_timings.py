"""Seconds by kind of work."""

from __future__ import annotations

import torch
from cases import mlp, supervised

from mgd.sweep.timings import Timings


def test_a_report_has_the_work_that_was_done():
    case = supervised(mlp(), (5,), 6)
    function = case.function()
    for _ in range(2):
        report = function.metagradient(case.z).report
        assert all(seconds > 0 for seconds in report.seconds.values()), report.seconds
        assert {"training", "update", "hvp", "optimizer vjp"} <= set(report.seconds)


def test_costs_make_no_entries():
    timings = Timings()
    for kind in ("training", "update"):
        with timings.timed(kind):
            sum(range(1000))
    with timings.timed("hvp"), timings.part("hvp, residuals kept"):
        sum(range(1000))
    costs = timings.costs(None, torch.device("cpu"))
    assert costs is not None and costs.hvp > costs.hvp_kept
    assert set(timings.seconds) == {"training", "update", "hvp"}
