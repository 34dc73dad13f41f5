"""The schedules side by side: `python -m mgd.cli.plan_table`, the tables of docs/planning.md.

Sizes are in units of one gradient: a snapshot is three (Adam's parameters and moments), and the update costs 1/50
of a model step.
"""

from __future__ import annotations

import argparse

from mgd.errors import BudgetTooSmall
from mgd.plan.budget import Budget, Sizes
from mgd.plan.plan import SCHEDULES, plan
from mgd.util.text import table

_SIZES = Sizes(snapshot=3, gradient=1)


def compare(T: int, gradients: int) -> str:
    """Every schedule of T steps, with room for this many gradients."""
    head = ["schedule", "snapshots", "logged", "replayed", "model steps", "updates", "room", "time / training"]
    rows = []
    for schedule in SCHEDULES:
        try:
            made = plan(T, _SIZES, Budget(host=gradients), schedule=schedule)
        except BudgetTooSmall as error:
            rows.append([schedule, *[""] * 5, f"needs {error.needs:,}", ""])
            continue
        layout = made.layout
        counts = (
            layout.outer.total + layout.inner.total,
            sum(layout.log),
            made.model_steps - T,
            made.model_steps,
            made.update_steps,
            sum(made.peak.values()),
        )
        rows.append([schedule, *(f"{count:,}" for count in counts), f"{made.predicted_seconds / T:.2f}"])
    title = f"{T:,} steps, room for {gradients:,} gradients ({gradients // 3:,} snapshots)"
    return "\n".join([title, "", *table(head, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000, help="training steps")
    parser.add_argument(
        "--room", type=int, nargs="+", default=[48, 600, 3_000, 12_000, 30_000], help="budgets, in gradients"
    )
    arguments = parser.parse_args()
    print("\n\n".join(compare(arguments.steps, room) for room in arguments.room))


if __name__ == "__main__":
    main()
