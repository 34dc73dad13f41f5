"""Sums over microbatches in an order that depends on their number alone, not on who evaluates which."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
Place = tuple[int, int]  # (level, index): the microbatches index 2^level to (index + 1) 2^level - 1


class Blocks(Generic[T]):
    """Sums of values, one per microbatch, over blocks of 2^j that begin at multiples of their length.

    Two neighbours become one block as soon as both are there, in whatever order they come. So a rank that has some of
    the microbatches makes the very additions of one that has all. merge: the sum of two; it may change both.
    """

    def __init__(self, merge: Callable[[T, T], T]):
        self._merge = merge
        self._held: dict[Place, T] = {}

    def add(self, index: int, value: T, level: int = 0) -> None:
        while (level, index ^ 1) in self._held:
            other = self._held.pop((level, index ^ 1))
            value = self._merge(other, value) if index & 1 else self._merge(value, other)
            level, index = level + 1, index >> 1
        self._held[level, index] = value

    def joins(self, index: int) -> bool:
        """Whether the value of this microbatch would be added to that of its left neighbour at once."""
        return bool(index & 1) and (0, index ^ 1) in self._held

    def items(self) -> list[tuple[Place, T]]:
        """What is not yet part of a larger block, in the order of the microbatches."""
        held = list(self._held.items())
        return held if len(held) == 1 else sorted(held, key=lambda item: item[0][1] << item[0][0])

    def total(self) -> T:
        """The sum over all microbatches, of which there is at least one."""
        return functools.reduce(self._merge, [value for _, value in self.items()])


def places(microbatches: Iterable[int]) -> list[Place]:
    """The blocks that the sums over these microbatches become."""
    blocks: Blocks[None] = Blocks(lambda _, __: None)
    for index in microbatches:
        blocks.add(index, None)
    return [place for place, _ in blocks.items()]
