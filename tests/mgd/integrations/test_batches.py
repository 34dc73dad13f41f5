"""`mgd.batches`: what people load their data with, as batches that are the same whenever they are read."""

from __future__ import annotations

import dataclasses
import pickle
import random
from collections import UserDict

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import mgd
import mgd_kernels
from mgd.errors import BadArgument, BadBatch

X, Y = torch.arange(40.0).reshape(10, 4), torch.arange(10)


def generators():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


class Noisy(Dataset):
    """Examples with noise from all three generators, as augmentation makes it."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        noise = torch.rand(()) + float(np.random.rand()) + random.random()  # noqa: NPY002
        return X[i] + noise, Y[i]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_dataset_is_visited_once_per_epoch_in_an_order_that_is_drawn_once():
    data = mgd.batches(TensorDataset(X, Y), batch_size=3, epochs=2, seed=1)
    assert len(data) == 8 and data.examples == 10
    visited = torch.cat([data.indices_of(data[t]) for t in range(len(data))])
    assert visited[:10].sort().values.tolist() == visited[10:].sort().values.tolist() == list(range(10))
    assert visited[:10].tolist() != visited[10:].tolist()
    for x, y, i in data:
        assert torch.equal(x, X[i]) and torch.equal(y, Y[i])
    again = mgd.batches(TensorDataset(X, Y), batch_size=3, epochs=2, seed=1)
    assert again.order == data.order != mgd.batches(TensorDataset(X, Y), batch_size=3, epochs=2, seed=2).order
    assert [len(i) for *_, i in mgd.batches(TensorDataset(X, Y), batch_size=3, drop_last=True)] == [3, 3, 3]
    assert mgd.batches(TensorDataset(X, Y), batch_size=3, steps=6, seed=1).order == data.order[:6]
    unshuffled = mgd.batches(TensorDataset(X, Y), batch_size=5, shuffle=False)
    assert unshuffled.order == [(0, [0, 1, 2, 3, 4]), (0, [5, 6, 7, 8, 9])]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of packages that do not like forks
@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_the_same_at_every_reading_and_differs_between_epochs(workers):
    before = generators()
    loader = DataLoader(Noisy(), batch_size=5, shuffle=True, num_workers=workers)
    data = mgd.batches(loader, epochs=2)
    forward = list(data)
    backward = [data[t] for t in reversed(range(len(data)))][::-1]
    assert all(map(same, forward, backward)) and same(data[1], forward[1]) and same(data[-1], forward[3])
    assert all(map(same, forward, mgd.batches(DataLoader(Noisy(), batch_size=5, shuffle=True), epochs=2)))
    noise = [dict(zip(i.tolist(), (x - X[i])[:, 0].tolist(), strict=True)) for x, _, i in forward]
    assert all(abs((noise[0] | noise[1])[i] - (noise[2] | noise[3])[i]) > 1e-6 for i in range(10))
    assert generators() == before


def test_a_loader_is_left_as_it_is_and_its_sampler_used():
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=generator)
    data = mgd.batches(loader)
    assert [y.tolist() for _, y in loader] == [y.tolist() for _, y, _ in data]
    weighted = DataLoader(TensorDataset(X, Y), batch_size=4, sampler=WeightedRandomSampler([0.0] * 9 + [1.0], 8))
    assert mgd.batches(weighted).order == [(0, [9] * 4)] * 2


def test_batches_of_every_kind_get_indices():
    def as_dict(examples):
        return {"x": torch.stack([x for x, _ in examples])}

    def as_user_dict(examples):
        return UserDict(as_dict(examples))

    rows = [(X[i], Y[i]) for i in range(10)]
    for collate in (as_dict, as_user_dict):
        data = mgd.batches(rows, batch_size=4, collate=collate)
        assert type(data[0]) is type(collate(rows)) and torch.equal(data[0]["x"], X[data.indices_of(data[0])])
    data = mgd.batches(list(X), batch_size=4)
    assert torch.equal(data[0][0], X[data.indices_of(data[0])])
    alone = mgd.batches(DataLoader(list(X), batch_size=None, shuffle=True))
    assert len(alone) == 10 and torch.equal(alone[0][0], X[alone.indices_of(alone[0])[0]])
    assert pickle.loads(pickle.dumps(data)).order == data.order


def test_a_training_on_a_loader_has_the_metagradient_of_a_training_on_a_list():
    def loss(model, batch, z):
        x, y, _ = batch
        return (z["weights"] * (model(x)[:, 0] - y).square()).mean()

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    data = mgd.batches(DataLoader(Noisy(), batch_size=3, shuffle=True), epochs=3)

    def gradient(batches):
        f = mgd.TrainingFunction(
            model,
            loss,
            batches,
            optimizer=mgd_kernels.SGD(lr=1e-4),
            objective=lambda m: m(X).square().mean(),
            per_example={"weights": data.indices_of},
        )
        return f.metagradient({"weights": torch.ones(data.examples)}).grads["weights"]

    assert torch.equal(gradient(data), gradient(list(data)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


@dataclasses.dataclass
class Pair:
    x: torch.Tensor


@pytest.mark.parametrize(
    "arguments, text",
    [
        (lambda: (Stream(), {"batch_size": 2}), "a stream"),
        (lambda: (DataLoader(Stream()), {}), "a stream"),
        (lambda: ((x for x in X), {"batch_size": 2}), "a stream"),
        (lambda: (list(X), {}), "expected batch_size"),
        (lambda: (list(X), {"batch_size": 2, "epochs": 0}), "at least one epoch"),
        (lambda: (list(X), {"batch_size": 2, "epochs": 2, "steps": 3}), "either epochs"),
        (lambda: (list(X), {"batch_size": 20, "drop_last": True}), "at least one batch"),
        (lambda: (DataLoader(list(X)), {"batch_size": 2}), "batch_size as the DataLoader has it"),
    ],
)
def test_sources_that_do_not_repeat_are_refused(arguments, text):
    source, options = arguments()
    with pytest.raises(BadArgument, match=text):
        mgd.batches(source, **options)


def test_indices_that_have_no_place_are_refused():
    data = mgd.batches([Pair(x) for x in X], batch_size=1, collate=lambda examples: examples[0])
    with pytest.raises(BadBatch, match="indices=False"):
        data[0]
    with pytest.raises(BadBatch, match="'index'"):
        mgd.batches(list(X), batch_size=1, collate=lambda x: {"index": 1})[0]
    bare = mgd.batches(list(X), batch_size=2, indices=False)
    with pytest.raises(BadArgument, match="indices=True"):
        bare.indices_of(bare[0])
    with pytest.raises(IndexError):
        bare[5]
