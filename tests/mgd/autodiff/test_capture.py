"""Which trainings share their graphs."""

from dataclasses import dataclass

import torch
from cases import mlp

from mgd.autodiff.capture import evaluator_for


@dataclass
class Criterion:
    scale: float

    def loss(self, model, batch, z):
        return self.scale * model(batch).square().mean()


class Hashed(Criterion):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_trainings_of_one_loss_share_what_was_captured():
    model, criterion = mlp(), Hashed(1.0)
    assert evaluator_for(model, criterion.loss, None) is evaluator_for(model, criterion.loss, None)
    assert evaluator_for(model, Hashed(1.0).loss, None) is not evaluator_for(model, criterion.loss, None)


def test_a_method_of_something_without_a_hash_is_a_loss_as_any_other():
    model, criterion = mlp(), Criterion(1.0)
    assert evaluator_for(model, criterion.loss, None).describe() == "eager"


def test_settings_of_dynamo_are_set_only_while_it_captures():
    from mgd.autodiff.front import MOST_GRAPHS, _compiled

    seen = []

    def backend(module, examples):
        seen.append(torch._dynamo.config.recompile_limit)
        return module.forward

    before = torch._dynamo.config.recompile_limit
    run = _compiled(lambda x: x + 1, backend)
    run(torch.ones(2)), run(torch.ones(2))
    assert seen == [MOST_GRAPHS] and torch._dynamo.config.recompile_limit == before != MOST_GRAPHS
