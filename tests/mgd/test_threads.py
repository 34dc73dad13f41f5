"""Calls from several threads: the numbers of one thread, and a model that is as it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from cases import mlp, supervised
from same_bits import same
from torch import nn


def with_dropout():
    model = mlp()
    return supervised(nn.Sequential(*model[:2], nn.Dropout(0.3), *model[2:]), (5,))


def test_calls_of_one_model_and_of_several_do_not_mix():
    one, other = with_dropout(), with_dropout()
    functions = [one.function(), one.function(seed=1), other.function(seed=2)]
    expected = [f.metagradient(one.z) for f in functions]
    before = [(p, p.clone()) for p in one.model.parameters()]
    with ThreadPoolExecutor(6) as pool:
        calls = [(i, pool.submit(functions[i].metagradient, one.z)) for _ in range(8) for i in range(3)]
        assert all(same(call.result(), expected[i]) for i, call in calls)
    after = list(one.model.parameters())
    assert all(p is q and torch.equal(q, copy) for (p, copy), q in zip(before, after, strict=True))


def test_a_call_inside_a_call_of_the_same_thread():
    """An objective that trains another model."""
    inner, outer = with_dropout(), with_dropout()
    f = inner.function()
    factor = f.value(inner.z)
    nested = outer.but(objective=lambda model: outer.objective(model) * f.value(inner.z))
    alone = outer.but(objective=lambda model: outer.objective(model) * factor)
    assert same(nested.metagradient(), alone.metagradient())
