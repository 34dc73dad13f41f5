"""The Trainer of EleutherAI's bergson (MAGIC, arXiv 2504.16430) on the fused drop-in: the same data weights' gradient.

Skipped where bergson is not installed; it brings transformers and datasets, so it is no dependency of the tests.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mgd_kernels.integrations import torchopt as fused

torchopt = pytest.importorskip("torchopt")
bergson = pytest.importorskip("bergson.magic.trainer", reason="bergson is not installed")


class Regression(nn.Module):
    """A loss with the keyword arguments that bergson's batches have."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, input_ids, labels, example_weight):
        error = (self.net(input_ids) - labels).square().mean(-1)
        return (example_weight * error).mean()


class Stream:
    """Batches of one data set, weighted by example: the part of bergson's DataStream that its Trainer uses."""

    def __init__(self, steps: int, size: int):
        torch.manual_seed(1)
        self.inputs, self.labels = torch.randn(steps * size, 4), torch.randn(steps * size, 1)
        self.weights = nn.Parameter(torch.ones(steps * size))
        self.steps, self.size, self.device = steps, size, torch.device("cpu")

    @property
    def requires_grad(self):
        return self.weights.requires_grad

    @requires_grad.setter
    def requires_grad(self, value):
        self.weights.requires_grad = value

    def __len__(self):
        return self.steps

    def __getitem__(self, i):
        rows = slice(i * self.size, (i + 1) * self.size)
        return {
            "input_ids": self.inputs[rows],
            "labels": self.labels[rows],
            "example_weight": self.weights[rows],
        }


def data_weight_gradient(transformation, folder):
    torch.manual_seed(0)
    trainer, state = bergson.Trainer.initialize(Regression(), transformation)
    stream = Stream(9, 8)
    stream.requires_grad = False
    state = trainer.train(state, stream, save_dir=str(folder))
    state.detach_()
    state.requires_grad = True
    torch.manual_seed(2)
    x, y = torch.randn(32, 4), torch.randn(32, 1)
    objective = torch.func.functional_call(Regression(), state.params, (x, y, torch.ones(32)))
    names = list(state.params)
    grads = dict(zip(names, torch.autograd.grad(objective, [state.params[n] for n in names]), strict=True))
    slots = state.differentiable_tensors()[len(names) :]
    backward = bergson.BackwardState(grads, [torch.zeros_like(t) for t in slots], torch.zeros_like(stream.weights))
    return objective.detach(), trainer.backward(str(folder), stream, backward, state).weight_grads


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_trainer_runs_on_the_fused_transformation(name, tmp_path):
    schedule = lambda step: 0.05 * (1 - float(step) / 9)  # as bergson's, called with the step
    settings = {"adamw": {"eps_root": 1e-6, "betas": (0.9, 0.95)}, "sgd": {"momentum": 0.9, "weight_decay": 0.01}}[name]
    torch.set_default_dtype(torch.float64)
    try:
        expected = data_weight_gradient(getattr(torchopt, name)(schedule, **settings), tmp_path / "torchopt")
        found = data_weight_gradient(getattr(fused, name)(schedule, **settings), tmp_path / "fused")
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected[1].abs().min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
