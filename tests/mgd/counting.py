"""A training that counts how often its loss is called, by step."""

import torch
from cases import cross_entropy, mlp, supervised

STEPS = 9


class Counter:
    """The loss, counting its calls by step."""

    def __init__(self, loss=cross_entropy):
        self.loss, self.calls = loss, []

    def __call__(self, model, batch, z):
        self.calls.append(int(batch[3]))
        return self.loss(model, batch, z)


def counted(loss=cross_entropy, z=None, **options):
    made = supervised(mlp(), (5,), STEPS, **{"trace": False} | options)
    counter = Counter(loss)
    batches = [(*batch, torch.full((6,), t)) for t, batch in enumerate(made.batches)]
    counter_loss = lambda model, batch, z: counter(model, (*batch[:3], batch[3][0]), z)
    return made.but(z, loss=counter_loss, batches=batches), counter
