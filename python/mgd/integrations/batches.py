"""Batches from what people have: a `DataLoader`, a dataset of torch or of Hugging Face's `datasets`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from mgd.errors import BadArgument, BadBatch
from mgd.step.rng import seed_of
from mgd.util.text import describe

INDEX = "index"  # the key under which a batch that is a mapping has the indices of its examples


def batches(
    source: DataLoader | Dataset | Sequence[Any],
    *,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    collate: Callable[[list[Any]], Any] | None = None,
    seed: int = 0,
    indices: bool = True,
) -> RecordedBatches:
    """The batches of a training as a sequence, one per step, each the same whenever it is read.

    The order of the examples is drawn once. Each batch is made when it is read, so examples may lie on disk;
    `list(batches(...))` makes all of them now. Augmentation, masking and whatever else draws from the generators of
    torch, numpy or Python draws the same at each reading: from a stream of (`seed`, epoch, example).

    source: a `DataLoader`, whose sampler, batches, workers and `collate_fn` are used and which is left as it is; or
    what has `len()` and `[i]`, such as a `datasets.Dataset`, with the four arguments after `steps`.
    epochs: passes over the source. steps: this many batches instead, of as many passes as they take.
    batch_size: examples per step. shuffle: in a new order for each epoch. drop_last: leave out a last batch that is
    smaller. collate: makes a batch of a list of examples, `torch.utils.data.default_collate` by default.
    indices: add the examples' indices in the source to each batch, int64 `[batch]`: under the key `"index"` if the
    batch is a mapping, at the end if it is a tuple, a list or a tensor. `per_example={"weights": data.indices_of}`
    reads them, where `data` is what this returns.

    Raises BadArgument for a stream (an `IterableDataset`, a generator), whose order cannot be repeated.
    """
    if isinstance(source, DataLoader):
        given = {"batch_size": batch_size, "collate": collate, "drop_last": drop_last or None}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise BadArgument(f"expected {wrong[0]} as the DataLoader has it; got another one: set it there")
        loader = source
    else:
        _check_indexable(source)
        if batch_size is None:
            raise BadArgument("expected batch_size, the number of examples per step, for a dataset; got none")
        sampler: Any = RandomSampler(cast(Any, source)) if shuffle else SequentialSampler(cast(Any, source))
        loader = DataLoader(
            cast(Any, source),
            batch_sampler=BatchSampler(sampler, batch_size, drop_last),
            collate_fn=collate or default_collate,
        )
    _check_indexable(loader.dataset)
    if epochs < 1:
        raise BadArgument(f"expected at least one epoch; got {epochs}")
    if steps is not None and (steps < 1 or epochs > 1):
        raise BadArgument(f"expected either epochs, or at least one step; got steps={steps} and epochs={epochs}")
    return RecordedBatches(loader, _order(loader, epochs, steps, seed), seed, indices)


class RecordedBatches(Sequence):
    """See `batches`. order: of each step, the epoch and the indices of its examples. examples: in the source."""

    def __init__(self, loader: DataLoader, order: list[tuple[int, list[int]]], seed: int, indices: bool):
        self.order, self.examples, self.indices = order, len(cast(Sized, loader.dataset)), indices
        self._made = _Batches(loader.dataset, loader.collate_fn, loader.batch_sampler is not None, order, seed)
        self._workers = {
            "num_workers": loader.num_workers,
            "multiprocessing_context": loader.multiprocessing_context,
            "worker_init_fn": loader.worker_init_fn,
            "prefetch_factor": loader.prefetch_factor,
        }
        self._stream: Iterator[Any] | None = None  # of batches made by workers
        self._next, self._way = 0, 1  # the step that it gives next, and 1 or -1

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.order)

    def __getitem__(self, step: Any) -> Any:
        if isinstance(step, slice):
            return [self[t] for t in range(*step.indices(len(self)))]
        if not -len(self) <= step < len(self):  # which also ends a loop over the batches
            raise IndexError(f"expected a step in 0..{len(self) - 1}; got {step}")
        t = step % len(self)
        batch = self._from_workers(t) if self._workers["num_workers"] else self._made[t]
        return self._with_index(batch, torch.tensor(self.order[t][1])) if self.indices else batch

    def indices_of(self, batch: Any) -> Tensor:
        """The indices of the examples of a batch, int64 `[batch]`: a function for `per_example`."""
        if not self.indices:
            raise BadArgument("expected batches with the indices of their examples; these have none: set indices=True")
        return batch[INDEX] if _is_mapping(batch) else batch[-1]

    def _from_workers(self, t: int) -> Any:
        """Batch `t` from worker processes, which go on making those that come next, forward or backward."""
        if self._stream is None or t != self._next:
            turns = self._stream is not None and self._way > 0 and self._next - 2 <= t < self._next
            self._way = -1 if turns else 1
            steps = range(t, len(self)) if self._way > 0 else range(t, -1, -1)
            loader: DataLoader = DataLoader(
                cast(Any, self._made), batch_size=None, sampler=cast(Any, steps), **cast(Any, self._workers)
            )
            with _generators_kept():
                self._stream = iter(loader)
        self._next = t + self._way
        try:
            return next(self._stream)
        except BaseException:
            self._stream = None
            raise

    def _with_index(self, batch: Any, index: Tensor) -> Any:
        if _is_mapping(batch):
            if INDEX in batch:
                raise BadBatch(f"expected batches without the key {INDEX!r}, which is added; set indices=False")
            batch[INDEX] = index
            return batch
        if isinstance(batch, Tensor):
            return batch, index
        if type(batch) in (tuple, list):
            return (*batch, index)
        raise BadBatch(
            f"expected a batch that is a mapping, a tuple, a list or a tensor, to which its examples' indices can be "
            f"added; got {describe(batch)}: set indices=False, and let the collator add them"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stream": None}  # worker processes stay here

    def __repr__(self) -> str:
        return f"RecordedBatches({len(self)} steps, {self.examples} examples)"


class _Batches(Dataset):
    """Makes the batch of a step, anywhere: what is random in it follows from its place."""

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[Any], Any],
        batched: bool,
        order: list[tuple[int, list[int]]],
        seed: int,
    ):
        self.dataset, self.collate, self.batched, self.order, self.seed = dataset, collate, batched, order, seed

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> Any:
        epoch, indices = self.order[step]
        with _generators_kept():
            examples = [self._example(epoch, i) for i in indices]
            _seed(self.seed, len(self.order) + step, 0)
            return self.collate(examples if self.batched else examples[0])

    def _example(self, epoch: int, index: int) -> Any:
        _seed(self.seed, epoch, index)
        return self.dataset[index]


class _generators_kept:
    """The generators of torch (on the CPU), numpy and Python are as they were at the end of the block."""

    def __enter__(self) -> None:
        self.states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002

    def __exit__(self, *error: Any) -> None:
        torch.set_rng_state(self.states[0])
        np.random.set_state(self.states[1])  # noqa: NPY002
        random.setstate(self.states[2])


def _seed(seed: int, *place: int) -> None:
    number = seed_of(seed, *place)
    torch.default_generator.manual_seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002  what people's augmentation draws from
    random.seed(number)


def _order(loader: DataLoader, epochs: int, steps: int | None, seed: int) -> list[tuple[int, list[int]]]:
    """Of each step, its epoch and the indices of its examples. The loader's own generators are left as they were."""
    numbers: DataLoader = DataLoader(
        cast(Any, range(len(cast(Sized, loader.dataset)))),
        collate_fn=lambda step: step if isinstance(step, list) else [step],
        generator=loader.generator,
        **cast(Any, _sampling(loader)),
    )
    own = {id(x): x for x in (loader.generator, getattr(loader.sampler, "generator", None)) if x is not None}
    states = [(generator, generator.get_state()) for generator in own.values()]
    order: list[tuple[int, list[int]]] = []
    with _generators_kept():
        for epoch in itertools.count() if steps else range(epochs):
            _seed(seed, epoch, 0)
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(epoch)
            order += [(epoch, step) for step in numbers]
            if not order or (steps and len(order) >= steps):
                break
    for generator, state in states:
        generator.set_state(state)
    if not order:
        raise BadArgument("expected at least one batch; got a source without examples (or with drop_last)")
    return order[:steps]


def _sampling(loader: DataLoader) -> dict[str, Any]:
    if loader.batch_sampler is None:
        return {"batch_size": None, "sampler": loader.sampler}
    return {"batch_sampler": loader.batch_sampler}


def _check_indexable(source: Any) -> None:
    if isinstance(source, IterableDataset) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise BadArgument(
            f"expected a DataLoader, or a dataset with len() and [i]; got {type(source).__name__}, a stream whose "
            "order cannot be repeated: make a list of its batches, if they fit in memory"
        )


def _is_mapping(batch: Any) -> bool:
    return hasattr(batch, "keys") and hasattr(batch, "__setitem__")
