"""Numbers that steps leave on the device, read together: to read one, the host waits for all that was launched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Look = Callable[[list[float]], None]
Found = TypeVar("Found")

EVERY = 64  # steps between two reads on an accelerator


class LookCloser(Exception):
    """What can be decided at its own step alone was taken for granted, and does not hold. The call is made again, with
    every number read at once."""


class Reads:
    """What is still to be looked at of the numbers of a training, in the order in which they came.

    every: steps between two reads. On the CPU, where nothing is waited for, each number is looked at as it comes.
    """

    def __init__(self, device: torch.device):
        self.every = 1 if _closely or device.type == "cpu" else EVERY
        self._waiting: list[tuple[Tensor, Look]] = []
        self._steps = 0

    @property
    def late(self) -> bool:
        """Whether numbers are looked at after their step."""
        return self.every > 1

    def later(self, numbers: Tensor, look: Look) -> None:
        """Call `look` with these numbers, as a flat list, once they are read. It raises where they are wrong."""
        if self.late:
            self._waiting.append((numbers.detach().reshape(-1), look))
        else:
            look(numbers.reshape(-1).tolist())

    def equal(self, x: Tensor, y: Tensor) -> bool:
        """Whether two tensors are equal. Where that is read after the step, it is taken for granted, and LookCloser
        raised if it does not hold."""
        if not self.late:
            return torch.equal(x, y)
        self.later((x != y).any(), _look_for_a_difference)
        return True

    def after_step(self) -> bool:
        """A step is done. Returns whether its numbers, and those before, have been looked at."""
        self._steps += 1
        if self._steps < self.every:
            return False
        self.settle()
        return True

    def settle(self) -> None:
        """Look at everything that waits; the error of the first step that has one is raised."""
        waiting, self._waiting, self._steps = self._waiting, [], 0
        if not waiting:
            return
        values = torch.cat([x.double() for x, _ in waiting]).tolist()
        start = 0
        for x, look in waiting:
            look(values[start : start + len(x)])
            start += len(x)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Nothing waits at the end of the block. Where it fails, an error of an earlier step comes first."""
        try:
            yield
        except Exception:
            self.settle()
            raise
        self.settle()


def _look_for_a_difference(values: list[float]) -> None:
    if values[0]:
        raise LookCloser


_closely = False  # calls take turns


def patiently(run: Callable[[], Found]) -> Found:
    """What `run` returns: the result of a training, which is made again, closely, where that turns out to be needed."""
    global _closely
    try:
        return run()
    except LookCloser:
        _closely = True
        try:
            return run()
        finally:
            _closely = False
