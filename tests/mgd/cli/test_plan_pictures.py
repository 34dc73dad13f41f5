"""The picture of a plan, and the table of schedules that docs/planning.md shows."""

import pytest

from mgd.cli.plan_plot import draw, trace
from mgd.cli.plan_table import compare
from mgd.plan.budget import Budget, Sizes
from mgd.plan.plan import plan


@pytest.mark.parametrize("residuals", [0, 1, 8])
def test_trace_and_picture(tmp_path, residuals):
    """The picture's data are the plan's: its strokes add up to the predicted computation, its bytes peak where said."""

    made = plan(40, Sizes(snapshot=3, gradient=1, residuals=residuals), Budget(host=40, disk=("runs", 20)))
    strokes, history = trace(made)
    computed = sum(end - begin for _, begin, end, _, _ in strokes)
    costs = made.costs
    hvps = 40 * costs.hvp - made.steps_kept * (costs.hvp - costs.hvp_kept)
    assert computed == pytest.approx(made.model_steps * costs.step + made.update_steps * costs.update + hvps)
    assert (made.steps_kept > 0) == (residuals > 0)
    assert {tier: max(held[tier] for _, held in history) for tier in made.limits} == made.peak
    assert set(history[-1][1].values()) == {0}
    draw(made, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_comparison_table():

    lines = compare(1000, 300).splitlines()
    assert lines[0] == "1,000 steps, room for 300 gradients (100 snapshots)"
    revolve = next(line for line in lines if line.startswith("revolve")).split()
    assert revolve[1:5] == ["100", "0", "1,898", "2,898"]  # t(1000, 100) = 2 * 1000 - C(102, 101), and 1000
