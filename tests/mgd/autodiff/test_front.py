"""The front of captured steps: what it keeps alive."""

import gc
import weakref

import torch
from cases import cross_entropy, mlp, supervised


def test_a_captured_training_is_let_go_of():
    """Dynamo keeps its caches for the life of the process; data of the loss must not hang on them."""

    class Data:
        pass

    def captured() -> weakref.ref:
        data = Data()
        loss = lambda model, batch, z, data=data: cross_entropy(model, batch, z)
        f = supervised(mlp(), (5,), 2).but(loss=loss).function(trace=True)
        assert f.metagradient({"lr": torch.full((2,), 0.1, dtype=torch.float64)}).report.execution == "captured"
        return weakref.ref(data)

    reference = captured()
    gc.collect()
    assert reference() is None
