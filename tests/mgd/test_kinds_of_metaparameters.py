"""What papers differentiate, kind by kind: against unrolled backpropagation and finite differences, in float64.

docs/how-to/metaparameters.md names the kinds, and shows each.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, adamw, assert_exact, errors, generator, language, mlp, supervised
from torch import nn
from torch.nn.utils import parametrize

import mgd
from mgd_kernels import SGD

STEPS, EXAMPLES, SOURCES = 6, 20, 4


def normal(*shape, seed=3):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def each(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def base(loss, z, **options):
    found = supervised(mlp(), (5,), steps=STEPS)
    found.z.clear()
    source = torch.arange(EXAMPLES) % SOURCES
    batches = [(x, y, i, source[i], torch.full((len(i),), t)) for t, (x, y, i) in enumerate(found.batches)]
    return found.but(z, loss=loss, batches=batches, **options)


def tokens():
    found = language(steps=4)
    found.z.clear()

    def loss(model, batch, z):
        logits = model(batch[0][:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2), batch[0][:, 1:], reduction="none")
        return (z["token_weights"] * losses).mean()

    z = {"token_weights": 1 + 0.2 * normal(12, 6)}
    return found.but(z, loss=loss, per_example={"token_weights": lambda batch: batch[1]})


def classes(loss=lambda model, batch, z: F.cross_entropy(model(batch[0]), batch[1], weight=z["class_weights"])):
    return base(loss, {"class_weights": torch.tensor([0.8, 1.0, 1.3], dtype=torch.float64)})


def classes_written_out():
    """torch has no derivative with respect to these weights."""

    def loss(model, batch, z):
        weights = z["class_weights"][batch[1]]
        return (weights * each(model, batch)).sum() / weights.sum()

    return classes(loss)


def clusters():
    loss = lambda model, batch, z: (z["cluster_weights"] * each(model, batch)).mean()
    z = {"cluster_weights": 1 + 0.2 * normal(SOURCES)}
    return base(loss, z, per_example={"cluster_weights": lambda batch: batch[3]})


def mixture():
    loss = lambda model, batch, z: (SOURCES * z["mixture"][batch[3]] * each(model, batch)).mean()
    return base(loss, {"mixture": normal(SOURCES).softmax(0)})


def curriculum():
    loss = lambda model, batch, z: (z["curriculum"][0][batch[3]] * each(model, batch)).mean()
    z = {"curriculum": 1 + 0.2 * normal(STEPS, SOURCES)}
    return base(loss, z, per_example={"curriculum": lambda batch: batch[4][:1]})


def loss_parameters():
    def loss(model, batch, z):
        hidden = torch.tanh(each(model, batch)[:, None] @ z["loss"]["first"])  # a network from losses to weights
        return ((hidden @ z["loss"]["second"]).sigmoid()[:, 0] * each(model, batch)).mean()

    return base(loss, {"loss": {"first": normal(1, 4), "second": normal(4, 1)}})


def per_tensor(key="lr", steps=()):
    found = supervised(mlp(), (5,), steps=STEPS)
    groups = [{"params": name} for name, _ in found.model.named_parameters()]
    found.z.clear()
    rates = 0.01 * (1 + 0.3 * normal(*steps, 1 + len(groups)).tanh())
    return found.but({key: rates}, optimizer=adamw(param_groups=groups))


class Scaled(nn.Module):
    """A tensor as where it began plus `rates` times what is trained, so that every element has a rate of its own."""

    def __init__(self, start):
        super().__init__()
        self.register_buffer("start", start.detach().clone())
        self.rates = nn.Parameter(torch.ones_like(start))

    def forward(self, moved):
        return self.start + self.rates * moved


def per_element():
    found = supervised(mlp(), (5,), steps=STEPS)
    layer = found.model[0]
    parametrize.register_parametrization(layer, "weight", Scaled(layer.weight), unsafe=True)
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()
    name = "0.parametrizations.weight.0.rates"
    fixed = {"params": "*.rates", "lr": 0.0, "weight_decay": 0.0}
    found.z.clear()
    z = {"init": {name: (1 + 0.2 * normal(*layer.weight.shape))}}
    return found.but(z, optimizer=adamw(weight_decay=0.0, param_groups=[fixed]))


def distillation():
    found = supervised(mlp(), (5,), steps=STEPS, optimizer=SGD(lr=0.1))
    loss = lambda model, batch, z: F.cross_entropy(model(z["pixels"]), z["labels"].softmax(1))
    z = {"pixels": normal(4, 5), "labels": normal(4, CLASSES), "lr": torch.tensor(0.3, dtype=torch.float64)}
    return found.but(z, loss=loss, batches=[torch.zeros(1)] * STEPS)


KINDS = {
    "weights per token": tokens,
    "class weights": classes_written_out,
    "cluster weights": clusters,
    "a mixture of sources": mixture,
    "a curriculum": curriculum,
    "parameters of a loss": loss_parameters,
    "a rate per tensor": per_tensor,
    "a rate per tensor and step": lambda: per_tensor(steps=(STEPS,)),
    "a weight decay per tensor": lambda: per_tensor("weight_decay"),
    "a rate per element": per_element,
    "a distilled data set": distillation,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_exact(kind):
    case = KINDS[kind]()
    assert_exact(case)
    checked = mgd.check(case.function(trace=False), case.z, steps=(1e-3, 1e-5))
    assert checked.passed, checked
    assert all(key.relative_error < 1e-6 for key in checked.keys.values()), checked


def test_class_weights_are_those_that_torch_takes():
    found, expected = classes().metagradient(), classes_written_out().unrolled()
    assert max(errors(found, expected).values()) < 1e-10


def test_weights_of_tokens_are_read_by_their_batch_alone():
    case = tokens()
    gradient = case.metagradient().grads["token_weights"]
    seen = torch.cat([index for _, index in case.batches]).unique()
    assert gradient[seen].all() and not gradient[[i for i in range(12) if i not in seen]].any()


def test_a_rate_per_element_is_that_of_the_update():
    """Adam's step does not depend on the gradient's scale: an element with twice the rate moves twice as far."""
    case = per_element()
    name = "0.parametrizations.weight.0.rates"
    case = case.but(
        optimizer=adamw(weight_decay=0.0, eps=0.0, eps_root=0.0, param_groups=[{"params": "*.rates", "lr": 0.0}])
    )
    case = case.but(batches=case.batches[:1], z={"init": {name: torch.ones(8, 5).double()}})
    rates = torch.ones(8, 5).double()
    rates[0, 0] = 2.0
    moved = []
    for z in (torch.ones(8, 5).double(), rates):
        trained = case.function().train({"init": {name: z}}).parameters
        moved.append(z * trained["0.parametrizations.weight.original"])
    torch.testing.assert_close(moved[1], rates * moved[0])
