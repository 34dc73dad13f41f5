"""Prefetching: the store reads what the coming actions need, behind the computation."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from mgd.plan.actions import Action, Advance, Drop, Load, Reverse, Save
from mgd.sweep.damage import Key
from mgd.sweep.history import History

WINDOW = 8  # entries on their way at a time; how much of them is read is up to the store's free buffers
HORIZON = 64  # actions looked at before their turn, at most


class Prefetcher:
    """The actions from `position` on; while they are performed, the store reads what the next ones need.

    The reads of an action follow from the plan alone, so their order is known before its turn. Each is requested as
    soon as it can be: an entry that is written in between once it is written, one that is needed twice a second time
    once the first was read. It listens to what happens to the history's entries.
    """

    def __init__(self, actions: Iterator[Action], history: History, position: int):
        self._actions, self._history = actions, history
        self._queue: deque[Action] = deque()  # looked at, not yet performed
        self._coming: deque[tuple[Key, int]] = deque()  # reads to ask for, each after so many puts of its key
        self._asked: set[Key] = set()
        self._puts: Counter[Key] = Counter()
        # Where the looking stands: the training step, and what of the plan's changes the store will have seen by then.
        self._position = position
        self._front: dict[Key, tuple[int, bool]] = {}  # puts, and whether the entry is there
        history.listener = self

    def __iter__(self) -> Iterator[Action]:
        while True:
            self._ask()
            if not self._queue and not self._look():
                return
            yield self._queue.popleft()

    # --- as the history's listener -----------------------------------------------------------------------------

    def put(self, key: Key) -> None:
        self._puts[key] += 1
        self._asked.discard(key)
        self._ask()

    def got(self, key: Key) -> None:
        self._asked.discard(key)
        self._ask()

    def reads_again(self, key: Key) -> bool:
        return any(key == coming for coming, _ in self._coming)

    def removed(self, key: Key) -> None:
        self._asked.discard(key)

    # --- looking -----------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Ask for the next reads, as far as they are known and can be had by now."""
        keys: list[Key] = []
        while len(self._asked) < WINDOW:
            if not self._coming:
                if len(self._queue) < HORIZON and self._look():
                    continue
                break
            key, puts = self._coming[0]
            if key in self._asked or self._puts[key] < puts:
                break
            self._coming.popleft()
            if self._history.stored(key):
                self._asked.add(key)
                keys.append(key)
        if keys and self._history.store is not None:
            self._history.store.prefetch(keys)

    def _look(self) -> bool:
        """Look at one more action; False when there is none."""
        action = next(self._actions, None)
        if action is None:
            return False
        self._queue.append(action)
        if isinstance(action, Save):
            self._change(("snapshot", action.step), self._history.stores(action.tier))
        elif isinstance(action, Drop):
            self._change(("snapshot", action.step), None)
        elif isinstance(action, Load):
            self._read(("snapshot", action.step))
            self._position = action.step
        elif isinstance(action, Reverse):
            self._read(("gradient", action.step))
            self._position = action.step
        elif isinstance(action, Advance):
            written = action.log is not None and self._history.stores(action.log)
            for t in range(self._position, action.stop):
                if not self._read(("gradient", t)) and written and not self._history.logged(t):
                    self._change(("gradient", t), True)
            self._position = action.stop
        return True

    def _change(self, key: Key, there: bool | None) -> None:
        """The entry will be in the store, in memory (False) or nowhere."""
        puts, _ = self._front.get(key, (self._puts[key], False))
        self._front[key] = puts + bool(there), bool(there)

    def _read(self, key: Key) -> bool:
        """The entry will be read, if it will be in the store; returns whether."""
        puts, there = self._front.get(key, (0, self._history.stored(key)))
        if there:
            self._coming.append((key, puts))
        return there
