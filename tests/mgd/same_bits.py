"""Trainings of three architectures, and when two of their results are the same to the bit."""

import torch
from cases import convnet, language, mlp, supervised, weighted, weights
from torch.utils._pytree import tree_leaves

STEPS = 11


def cases():
    return {
        "mlp": supervised(mlp(0.3), (5,), STEPS, max_grad_norm=0.4, microbatches=2).but(
            loss=weighted, z={"data_weights": weights()}
        ),
        "convnet": supervised(convnet(), (1, 6, 6), STEPS),
        "gpt": language(STEPS),
    }


def same(a, b):
    return (
        torch.equal(a.value, b.value)
        and torch.equal(a.losses, b.losses)
        and all(torch.equal(x, y) for x, y in zip(tree_leaves(a.grads), tree_leaves(b.grads), strict=True))
        and all(torch.equal(a.model_state[name], b.model_state[name]) for name in b.model_state)
    )
