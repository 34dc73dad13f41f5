"""The comparison in plain torch finds the metagradient, and says what it cannot do."""

from __future__ import annotations

import pytest
import torch
from command_cases import CLOSE

from mgd.bench import baselines, methods, workloads, workloads_lora
from mgd.bench.cases import load
from mgd_kernels import SGD, Adam, AdamW, RMSprop


def tiny(name: str) -> workloads.Workload:
    return {
        "small": lambda: workloads.small(6),
        "convnet-batch": lambda: workloads.convnet("batch", 2, width=8),
        "gpt": lambda: workloads.gpt(2),
        "lora": lambda: workloads_lora.lora(2, size=2, length=8, count=2),
    }[name]()


@pytest.mark.parametrize("name", ["small", "convnet-batch", "gpt", "lora"])
def test_plain_torch_finds_the_metagradient(name):
    workload = tiny(name)
    if name == "lora":  # on two examples a step, float32 leaves three digits of their weights' gradient
        workload.model.double()
    dtype = next(workload.model.parameters()).dtype
    function, z = workload.function(trace=False), {key: value.to(dtype) for key, value in workload.z().items()}
    wanted = function.metagradient(z)
    assert all(float(g.norm()) > 0 for g in wanted.grads.values())
    for method in (baselines.unrolled, baselines.states, baselines.sqrt):
        value, grads = method(function, z)
        torch.testing.assert_close(value, wanted.value, rtol=1e-5, atol=0)
        assert max(methods.differences(grads, wanted.grads).values()) < CLOSE, method.__name__


def test_the_lora_workload_has_as_many_snippets_of_each_class():
    labels = [label for _, label in workloads_lora.snippets(3)]
    assert labels == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(lr=0.1, weight_decay=1e-2),
        SGD(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=1e-2),
        SGD(lr=0.1, momentum=0.9, nesterov=True, decoupled=True, weight_decay=1e-2),
        Adam(lr=1e-3, eps_root=1e-6, weight_decay=1e-2),
        AdamW(lr=1e-3, eps_root=1e-6),
        RMSprop(lr=1e-3, eps_root=1e-6),
    ],
    ids=lambda o: type(o).__name__ + "-".join(getattr(getattr(o, "rule", None), "slots", ())),
)
def test_plain_torch_knows_the_update_rules_clipping_and_microbatches(optimizer):
    workload = workloads.small(5)
    function = workload.function(trace=False).replaced(optimizer=optimizer, max_grad_norm=0.5, microbatches=2)
    z = {"lr": torch.full((5,), 1e-2), "data_weights": torch.ones(workload.examples)}
    wanted = function.metagradient(z)
    for method in (baselines.unrolled, baselines.sqrt):
        assert max(methods.differences(method(function, z)[1], wanted.grads).values()) < CLOSE


def test_plain_training_takes_the_same_steps():
    workload = workloads.small(5)
    function = workload.function().replaced(optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=1e-2), max_grad_norm=0.5)
    z = {"lr": torch.linspace(0.1, 0.02, 5), "data_weights": torch.ones(workload.examples)}
    training = baselines.Training(function, z)
    wanted = function.train(z).parameters
    for _ in range(2):
        training.reset()
        training()
        for name, parameter in training.model.named_parameters():
            torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-5, atol=1e-6)


def test_what_plain_torch_cannot_do_is_said():
    workload = workloads.small(2)
    groups = AdamW(param_groups=[{"params": "0.*", "lr": 0.1}])
    with pytest.raises(baselines.Unsupported, match="parameter groups"):
        baselines.unrolled(workload.function().replaced(optimizer=groups), workload.z())
    with pytest.raises(baselines.Unsupported, match="one objective"):
        baselines.states(workload.function().replaced(objective=workload.objectives(2)), workload.z())


def test_many_objectives_have_the_mean_of_one():
    case = load("small", 4)
    one, many = (methods.METHODS[name].prepare(case)() for name in ("eager", "objectives"))
    torch.testing.assert_close(one.value, many.value, rtol=1e-5, atol=0)
    assert max(methods.differences(many.grads, one.grads).values()) < CLOSE
