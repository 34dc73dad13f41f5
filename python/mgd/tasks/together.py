"""Which trainings run together, and when: those of one kind wait for each other, until they fill the memory.

Of a list, nobody's code runs between the tasks, so what they read is looked at when they are run. A generator may
change whatever it likes before it makes the next task; so all that a task reads is copied before that.

Tasks with `trace=True` run together at once, and a warning says where they cannot. By default they do as soon as that
pays (`mgd.tasks.account`), and nothing is said.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mgd.autodiff.gathered import NotRecorded
from mgd.errors import BadArgument, BadObjective, MetagradientError
from mgd.function import TrainingFunction
from mgd.plan.training import SHARE
from mgd.step.start import Start
from mgd.sweep.resident import most_bytes
from mgd.tasks.account import FIRST, Account, account_of
from mgd.tasks.group import Doubt, Group
from mgd.tasks.recorded import Task, batched, may_share, recorded_task, same_settings, same_start, versions
from mgd.util.system import free_memory

MOST = 64  # trainings at once: more gain nothing, and leave the caches

MOST_KINDS = 8  # that are looked for


@dataclass
class Found:
    """Of so many trainings: the sum of the values, float64 `[]`, and that of their gradients, by the keys of z."""

    count: int
    value: Tensor
    gradients: dict[str, Any] | None


@dataclass(eq=False)
class _Kind:
    """Trainings that differ in batches and objectives alone: one of them, before its first step, and the bytes that
    those that wait may take."""

    f: TrainingFunction
    start: Start
    room: int


class _Changes(BadObjective):
    """Objectives were evaluated, and cannot be evaluated as if they were not."""


def results(tasks: Iterable[TrainingFunction], z: Mapping[str, Any], wanted: bool) -> Iterator[Found]:
    """The results of all trainings, of several in one. wanted: with their gradients."""
    with Together(z, wanted, tasks if type(tasks) in (list, tuple) else None) as together:
        for f in tasks:
            if not isinstance(f, TrainingFunction):
                raise BadArgument(f"expected tasks to be training functions; got {type(f).__name__}")
            yield from together.add(f)
        yield from together.rest()


class Together:
    """Takes trainings one by one, and gives the results of those that need not wait any longer.

    tasks: all of them, where they are there, so that nobody's code runs between them.
    """

    def __init__(self, z: Mapping[str, Any], wanted: bool, tasks: Any = None):
        self.z, self.wanted, self.still = z, wanted, tasks is not None
        self._most = math.ceil(len(tasks) / math.ceil(len(tasks) / MOST)) if tasks else MOST
        self._kinds: list[_Kind] = []
        self._waiting: dict[Hashable, list[Task]] = {}
        self._bytes = 0
        self._calls = contextlib.ExitStack()
        self._inside: Any = None  # the model of the call that this is inside of
        self._came: Counter[Account] = Counter()  # tasks of each account so far, and those of a list that are to come
        self._left = Counter([a for a in map(self._account_of, tasks or ()) if a is not None])

    def __enter__(self) -> Together:
        return self

    def __exit__(self, *error: Any) -> None:
        self._calls.__exit__(*error)
        for account, count in self._came.items():
            account.expected = count

    def add(self, f: TrainingFunction, again: bool = False) -> Iterator[Found]:
        """again: it was here before, and its like are counted."""
        account, together = self._account_of(f), may_share(f)
        if account is not None:
            together = self._pays(account, again)
        elif together:
            together = _asked(f)
        kind, task = self._measured(f, account) if together else (None, None)
        if task is not None and kind is not None and self._bytes + task.bytes(self.wanted) > kind.room:
            yield from self.rest()
            if kind not in self._kinds:  # code of the user's has run since
                kind, task = self._measured(f, account)
        if task is None:
            yield from self.rest()
            yield self._alone(f, account)
            return
        key = id(task.start), task.graphs()
        waiting = self._waiting.setdefault(key, [])
        if waiting and task.copied:
            task.share(waiting[0])
        waiting.append(task)
        self._bytes += task.bytes(self.wanted)
        if len(waiting) >= self._most:
            yield from self._run(key)

    # --- whether that pays -------------------------------------------------------------------------------------

    def _account_of(self, f: Any) -> Account | None:
        """That of a task which runs together with others only where that pays."""
        if not isinstance(f, TrainingFunction) or not may_share(f) or _asked(f):
            return None
        return account_of(f, self.z, self.wanted)

    def _pays(self, account: Account, again: bool) -> bool:
        before, left = self._came[account], self._left[account]
        if not again:
            self._came[account] += 1
            self._left[account] -= self.still
        if account.bought or account.refused:
            return account.pays(self._size(account), left)
        # Whoever begins in the middle of a call has groups of other sizes than in the next one.
        begins = before == 0 or account.measured == FIRST if self.still else before == 0 or before >= account.expected
        if not (begins and account.pays(self._size(account), left)):
            return False
        if self.still:  # what is left by groups of one size: each takes graphs of its own
            self._most = min(range(MOST, MOST // 2, -1), key=lambda size: left % size if left > MOST else -size)
        return True

    def _size(self, account: Account) -> int:
        """How many tasks of a kind may run at once."""
        count = self._came[account] + self._left[account]
        return min(self._most, count if self.still else max(count, account.expected))

    def _measured(self, f: TrainingFunction, account: Account | None) -> tuple[_Kind | None, Task | None]:
        """As `_recorded`, with a look at the clock."""
        if account is None:
            return self._recorded(f)
        evaluator: Any = f._evaluator
        graphs, start = evaluator.made, time.perf_counter()
        kind, task = self._recorded(f)
        seconds = time.perf_counter() - start
        if task is None:
            account.failed(seconds)
        elif evaluator.made > graphs:
            account.recorded(seconds)
            task.account = account
        else:
            task.account, task.seconds = account, seconds
        return kind, task

    def rest(self) -> Iterator[Found]:
        """The results of all that wait."""
        while self._waiting:
            yield from self._run(next(iter(self._waiting)))

    def _call(self, f: TrainingFunction) -> contextlib.AbstractContextManager:
        """As every call of a training function. Those of a list are one."""
        if not self.still:
            return f._guarded()
        if self._inside is not f.model:
            self._leave()
            self._calls.enter_context(f._guarded())
            self._inside = f.model
        return contextlib.nullcontext()

    def _leave(self) -> None:
        self._inside = None
        self._calls.close()

    # --- recorded ----------------------------------------------------------------------------------------------

    def _recorded(self, f: TrainingFunction) -> tuple[_Kind | None, Task | None]:
        """The training, recorded, and its kind, where it can run with others."""
        with self._call(f):
            try:
                kind = self._kind_of(f)
                if kind.room == 0:
                    return kind, None
                start = kind.start if self.still else f._start(self.z)
                task = recorded_task(f, start, self.still)
            except NotRecorded as error:
                if _asked(f) and not error.told:
                    _warn(f, str(error))
                return None, None
            except MetagradientError:  # which the training by itself will raise
                return None, None
        if not self.still:
            kind = self._begins_as(task, kind)
        return kind, task if 2 * task.bytes(self.wanted) <= kind.room else None

    def _kind_of(self, f: TrainingFunction) -> _Kind:
        for kind in self._kinds:
            if same_settings(f, kind.f):
                return kind
        return self._new_kind(f, f._start(self.z))

    def _new_kind(self, f: TrainingFunction, start: Start) -> _Kind:
        arena = start.arena
        request = f._plan_request(start.step.shards, start.buffers)
        sizes = request.sizes()
        room = min(most_bytes(request), int(SHARE * free_memory()))
        least = (len(f) if self.wanted else 1) * (sizes.snapshot + sizes.gradient)
        plain = arena.device.type == "cpu" and set(arena.dtypes) == {arena.dtype}
        room = room if plain and 2 * least <= room else 0  # two of them must fit
        self._kinds = [*self._kinds[1 - MOST_KINDS :], _Kind(f, start, room)]
        return self._kinds[-1]

    def _begins_as(self, task: Task, kind: _Kind) -> _Kind:
        """The kind of a task whose model, or z, may have changed since the last one."""
        for each in reversed(self._kinds):
            if same_settings(task.f, each.f) and same_start(task.start, each.start):
                task.start = each.start
                return each
        return self._new_kind(task.f, task.start)

    # --- run ---------------------------------------------------------------------------------------------------

    def _run(self, key: Hashable) -> Iterator[Found]:
        waiting = self._waiting.pop(key)
        count, at_once, account = len(waiting), True, waiting[0].account
        if account is not None:
            count, at_once = account.part(count, count + self._left[account])
        tasks, rest = waiting[:count], waiting[count:]
        if rest:
            self._waiting[key] = rest
        self._bytes -= sum([task.bytes(self.wanted) for task in tasks])
        start, mapped = time.perf_counter(), tasks[0].mapped()
        try:
            with self._call(tasks[0].f):
                found = self._at_once(tasks, at_once)
        except _Changes:
            raise
        except (Doubt, MetagradientError, RuntimeError) as error:
            if account is not None:
                account.failed(time.perf_counter() - start)
            elif type(error) is RuntimeError:  # perhaps of an objective, which is not evaluated again
                raise
            yield from self._one_by_one(tasks, error)
            return
        if account is not None:
            seconds = time.perf_counter() - start + sum([task.seconds for task in tasks])
            account.ran(count, at_once, tasks[0].mapped() > mapped, seconds)
        yield found
        if tasks[0].objective is None:
            yield from self._again()

    def _at_once(self, tasks: list[Task], at_once: bool) -> Found:
        group = Group(tasks, at_once)
        end, steps = group.train(self.wanted)
        values, adjoint = group.objectives(end, self.wanted)
        if tasks[0].objective is None and not self._untouched(tasks):
            raise _Changes(
                "expected an objective that changes nothing; that of a task changes what the training of another one "
                "reads, and depends on their order. Set trace=False to have each training after the last one's"
            )
        gradients = None if adjoint is None else group.go_back(steps, adjoint)
        for each in {batched(step) for step in tasks[0].steps}:
            if each.in_turn and tasks[0].account is not None:
                tasks[0].account.refused = True  # in turn is as slow as one by one
            elif each.in_turn:
                _warn(tasks[0].f, each.in_turn)
        return Found(len(tasks), values.double().sum(), gradients)

    def _untouched(self, tasks: list[Task]) -> bool:
        """Whether trainings still read what they read, after their objectives were evaluated."""
        if any(versions(task) != task.versions for task in tasks):
            return False
        last = tasks[-1]
        reads = last.start.meta.first_read
        try:
            return recorded_task(last.f, last.start, still=True).reads_as(last)
        except (NotRecorded, MetagradientError):
            return False
        finally:
            last.start.meta.first_read = reads

    def _again(self) -> Iterator[Found]:
        """Code of the user's has run: what waits, and was not copied, is recorded anew."""
        if not self.still:
            return
        tasks = [task for waiting in self._waiting.values() for task in waiting]
        self._waiting, self._bytes = {}, 0
        self._kinds.clear()
        for task in tasks:
            yield from self.add(task.f, again=True)

    def _one_by_one(self, tasks: list[Task], doubt: Exception) -> Iterator[Found]:
        for task in tasks:
            if not self.still and not self._unchanged(task):
                yield self._as_recorded(task, doubt)
                continue
            yield self._alone(task.f, task.account)
        yield from self._again()

    def _as_recorded(self, task: Task, doubt: Exception) -> Found:
        """A task that has changed since: by its graphs, from what was copied."""
        try:
            with self._call(task.f):
                return self._at_once([task], False)
        except (Doubt, MetagradientError) as error:
            raise BadArgument(
                "expected tasks that stay as they are when the next one is asked for; the data of one, or what its "
                f"objective reads, has changed. It was to be run by itself, since {doubt}, and by its graphs {error}. "
                "Give each task tensors and names of its own, or set trace=False"
            ) from None

    def _unchanged(self, task: Task) -> bool:
        with self._call(task.f):
            try:
                now = recorded_task(task.f, task.f._start(self.z), still=False)
            except (NotRecorded, MetagradientError):
                return False
        return same_start(now.start, task.start) and now.reads_as(task)

    def _alone(self, f: TrainingFunction, account: Account | None) -> Found:
        """As any training."""
        self._leave()
        start = time.perf_counter()
        result = f.metagradient(self.z) if self.wanted else None
        value = (f.value(self.z) if result is None else result.value).double()
        if account is not None:
            evaluator: Any = f._evaluator
            account.ran_alone(time.perf_counter() - start, self._size(account), evaluator.payoff.nodes)
        self._kinds.clear()
        if value.ndim:
            raise BadArgument(f"expected tasks of one objective each, a scalar; got one of shape {list(value.shape)}")
        return Found(1, value, None if result is None else result.grads)


def _asked(f: TrainingFunction) -> bool:
    """Whether it was asked for a training that may share that it does."""
    return bool(getattr(f._evaluator, "at_once", False))


_warned: weakref.WeakSet[Any] = weakref.WeakSet()


def _warn(f: TrainingFunction, why: str) -> None:
    """Once for trainings of one model and loss."""
    if f._evaluator not in _warned:
        _warned.add(f._evaluator)
        warnings.warn(
            f"mgd runs tasks one after another that it cannot run together: {why}", RuntimeWarning, stacklevel=2
        )
