"""A descent in a directory: its state after every meta-step, what each training depends on, and the first training's
result, to judge again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

from mgd.descent.state import DescentState
from mgd.errors import StaleRun
from mgd.ranks.directory import SharedDirectory
from mgd.results import Metagradient, Report
from mgd.util.fingerprint import Identity

Validate = Callable[[Metagradient], float]


class DescentCheckpoint:
    """Saves `state` in a directory, after it was restored from there. `history.json` is for people to read.

    training_at: what the training of a meta-step depends on, at the variables of the start; None if all meta-steps have
    one training. The directory knows the first one by its own identity; each of the others is compared, and raises
    StaleRun if it is not the one that was saved.
    validate: gives scores that are compared across processes, so it must give the first training its score again;
    raises StaleRun if it does not.
    """

    def __init__(
        self,
        run: SharedDirectory,
        state: DescentState,
        validate: Validate | None,
        training_at: Callable[[int], Identity] | None,
    ):
        self._run, self._state, self._validate, self._training_at = run, state, validate, training_at
        saved = run.read("state")
        if saved is None:
            return
        if training_at is not None:
            for number in range(1, len(saved["history"])):
                run.check(("training", number), training_at(number), f" of training {number}")
        if validate is not None:
            first = run.need("first result")
            score = float(validate(Metagradient(**first | {"report": Report(**first["report"])})))
            before = saved["history"][0]["score"]
            if score != before and not (math.isnan(score) and math.isnan(before)):
                words = f"the score of the first training ({before!r} then, {score!r} now)"
                raise StaleRun(str(run.path), [words])
        state.load(saved)

    def save(self, result: Metagradient) -> None:
        """Save the state after a meta-step, whose training gave `result`."""
        history = self._state.history
        if self._training_at is not None and len(history) > 1:
            number = len(history) - 1
            self._run.write(("training", number), dict(self._training_at(number)))
        if self._validate is not None and len(history) == 1:
            self._run.write("first result", vars(result) | {"report": vars(result.report)})
        self._run.write("state", self._state.state())
        self._run.show("history.json", [asdict(step) for step in history])
