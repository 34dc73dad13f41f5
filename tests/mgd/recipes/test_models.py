"""The models of recipes: every choice of the ResNet changes what it says it changes, and has second derivatives."""

import itertools

import pytest
import torch
from torch import nn

from mgd.errors import BadArgument
from mgd.recipes.models.gpt import GPT
from mgd.recipes.models.resnet import NORMS, ORDERS, POOLS, resnet9


@pytest.mark.parametrize("norm, pool, order", list(itertools.product(NORMS, POOLS, ORDERS)))
def test_every_resnet_has_its_choices_and_second_derivatives(norm, pool, order):
    torch.manual_seed(0)
    model = resnet9(norm, 8, 5, 1, pool=pool, order=order)
    kinds = [type(m) for m in model.modules()]
    assert (nn.GroupNorm in kinds, nn.BatchNorm2d in kinds) == (norm == "group", norm == "batch")
    assert (nn.MaxPool2d in kinds, nn.AvgPool2d in kinds) == (pool == "max", pool == "average")
    first = [type(m) for m in model[0]]
    assert first.index(nn.GELU) == (1 if order == "activation-first" else 2)
    x = torch.randn(4, 1, 8, 8)
    loss = nn.functional.cross_entropy(model(x), torch.arange(4))
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), parameters, allow_unused=True)
    assert all(bool(g.isfinite().all()) for g in second if g is not None) and float(second[0].abs().sum()) > 0


def test_the_scale_multiplies_the_logits():
    x = torch.randn(2, 3, 16, 16)
    models = []
    for scale in (1.0, 0.125):
        torch.manual_seed(0)
        models.append(resnet9(scale=scale))
    assert torch.allclose(models[1](x), 0.125 * models[0](x))


@pytest.mark.parametrize(
    "choice, says",
    [
        ({"norm": "layer"}, "expected norm to be one of"),
        ({"pool": "min"}, "expected pool to be one of .* got 'min'"),
        ({"order": "none"}, "expected order"),
        ({"width": 12}, "expected width to be a multiple of 8; got 12"),
    ],
)
def test_an_unknown_choice_is_named(choice, says):
    with pytest.raises(BadArgument, match=says):
        resnet9(**choice)


def test_the_gpt_sees_no_future_and_ties_its_embeddings():
    torch.manual_seed(0)
    model = GPT(vocabulary=11, context=8, layers=2, width=16, heads=2).eval()
    tokens = torch.randint(11, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    assert a.shape == (2, 8, 11) and torch.allclose(a[:, :5], b[:, :5], atol=1e-6)
    assert not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-3)
    assert model.head.weight is model.token.weight
