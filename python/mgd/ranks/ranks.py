"""Who takes part in a training: one process, or the ranks of a process group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from mgd.errors import BadArgument, RanksDisagree

Made = TypeVar("Made")


class Ranks:
    """One process, which is all there are. `ProcessRanks` has the same methods across several; each of them is then
    called by every rank, in the same order."""

    rank, size = 0, 1

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """A public call of every rank. An error of one of them ends that of the others, too."""
        yield

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Give `parts[r]` to rank r, flat, and receive `sizes[r]` elements of the same dtype from it."""
        return list(parts)

    def joined(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """The flat tensors of all ranks, of these sizes, one after the other."""
        return own

    def objects(self, value: Any) -> list[Any]:
        """The values of all ranks, which must be picklable."""
        return [value]

    def numbers(self, own: Tensor) -> Tensor:
        """Numbers `[n, ...]` of every rank, of one shape, in the order of the ranks: `[size n, ...]`."""
        return own

    def first(self, make: Callable[[], Made]) -> Made:
        """What rank 0 makes; it must be picklable."""
        return make()

    def every(self, holds: bool) -> bool:
        """Whether something holds on every rank."""
        return all(self.objects(holds))

    def check_same(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Raise RanksDisagree unless these facts are the same on every rank."""

    def memory(self) -> int | None:
        """Bytes of memory that are free for each process; None: what the system has."""
        return None

    def split(self, count: int) -> tuple[Ranks, int]:
        """So many groups of neighbours, of which each process is in one: the ranks of that group, and its number.
        Raises BadArgument unless `count` divides the number of processes."""
        self._check_split(count)
        return Ranks(), 0

    def _check_split(self, count: int) -> None:
        if count < 1 or self.size % count:
            raise BadArgument(f"expected groups that divide {self.size} processes; got {count}")

    def check_divides(self, microbatches: int) -> None:
        if microbatches % self.size:
            raise BadArgument(
                f"expected microbatches to be a multiple of the number of processes, so that each evaluates as many; "
                f"got microbatches={microbatches} and {self.size} processes"
            )


def check_facts(all_facts: Sequence[Mapping[str, Any]]) -> None:
    """Raise RanksDisagree where a rank's facts are not those of rank 0."""
    first = all_facts[0]
    for rank, facts in enumerate(all_facts):
        names = [name for name in {**first, **facts} if first.get(name) != facts.get(name)]
        if names:
            raise RanksDisagree(names, f"what rank {rank} has is not what rank 0 has")
