"""MAGIC (arXiv 2504.16430) as EleutherAI's bergson implements it, on the same training, where bergson is installed.

Its Trainer differentiates whole steps by reverse over reverse, from checkpoints on disk, with TorchOpt's optimizers.
It finds the gradient of the data weights alone.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import tempfile
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgd import TrainingFunction
from mgd.bench.baselines import Found, Unsupported
from mgd_kernels import SGD, AdamW


def _load() -> tuple[ModuleType, ModuleType]:
    """bergson's trainer, and torchopt."""
    try:
        return importlib.import_module("bergson.magic.trainer"), importlib.import_module("torchopt")
    except ImportError as error:
        raise Unsupported(f"bergson cannot be imported ({error}): pip install bergson") from error


class _Loss(nn.Module):
    """The training function's loss with the keyword arguments of bergson's batches."""

    def __init__(self, function: TrainingFunction):
        super().__init__()
        self.model, self.loss = copy.deepcopy(function.model), function.loss
        first = function.batches[0]
        self.named = isinstance(first, Mapping)
        self.one_label = not self.named and first[1].ndim == 1

    def forward(self, example_weight: Tensor, **inputs: Tensor) -> Tensor:
        batch: Any = inputs
        if not self.named:
            labels = inputs["labels"]
            batch = (inputs["input_ids"], labels[:, 0] if self.one_label else labels, None)
        return self.loss(self.model, batch, {"data_weights": example_weight})


class _Stream:
    """The batches, with their examples' weights: what the Trainer uses of bergson's DataStream."""

    def __init__(self, function: TrainingFunction, weights: Tensor):
        self.batches, self.weights = function.batches, nn.Parameter(weights.detach().clone())
        self.indices = function.per_example["data_weights"]
        self.device = weights.device

    @property
    def requires_grad(self) -> bool:
        return self.weights.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.weights.requires_grad = value

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, t: int) -> dict[str, Tensor]:
        batch = self.batches[t]
        if isinstance(batch, Mapping):  # of tensors by name, among them the labels
            return {**batch, "example_weight": self.weights[self.indices(batch)]}
        inputs, labels, index = batch
        if labels.ndim == 1:
            labels = torch.stack([labels, labels], 1)  # it counts the labels of all tokens but the first
        return {"input_ids": inputs, "labels": labels, "example_weight": self.weights[index]}


def _optimizer(torchopt: ModuleType, function: TrainingFunction, z: Mapping[str, Any]) -> Any:
    optimizer, h = function.optimizer, function.optimizer.defaults
    rates = z["lr"].tolist() if "lr" in z and z["lr"].ndim else [float(z.get("lr", h["lr"]))] * len(function)
    schedule = lambda step: rates[min(int(step), len(rates) - 1)]
    decay = float(z.get("weight_decay", h["weight_decay"]))
    if isinstance(optimizer, AdamW):
        betas = h["beta1"], h["beta2"]
        return torchopt.adamw(schedule, betas, h["eps"], eps_root=h["eps_root"], weight_decay=decay)
    if isinstance(optimizer, SGD) and optimizer.slots:
        return torchopt.sgd(schedule, h["momentum"], h["dampening"], decay, nesterov=optimizer.rule.nesterov)
    raise Unsupported(f"the comparison with bergson has no {type(optimizer).__name__} of this kind")


def magic(function: TrainingFunction, z: Mapping[str, Any]) -> Found:
    """The value, and the gradient of the data weights, with bergson's checkpoints every sqrt(T) steps."""
    if set(z) - {"lr", "weight_decay", "data_weights"} or "data_weights" not in z:
        raise Unsupported("bergson differentiates data weights alone")
    if function.microbatches > 1 or function.max_grad_norm is not None or function.optimizer.param_groups:
        raise Unsupported("the comparison with bergson has no microbatches, clipping or parameter groups")
    if len(list(function.model.named_parameters(remove_duplicate=False))) != len(list(function.model.parameters())):
        raise Unsupported("bergson trains tied weights as if they were not tied, which is another training")
    trainer, torchopt = _load()
    with (
        tempfile.TemporaryDirectory() as folder,
        sdpa_kernel(SDPBackend.MATH),
        contextlib.redirect_stderr(io.StringIO()),  # its progress bars
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        model, stream = _Loss(function), _Stream(function, z["data_weights"])
        bound, state = trainer.Trainer.initialize(model, _optimizer(torchopt, function, z))
        stream.requires_grad = False
        state = bound.train(state, stream, save_dir=folder)
        state.detach_()
        state.requires_grad = True
        trained = {name.removeprefix("model."): p for name, p in state.params.items()}
        call = _Call(copy.deepcopy(function.model), function)
        value = torch.func.functional_call(call, {f"model.{name}": p for name, p in trained.items()}, ())
        names = list(state.params)
        grads = dict(zip(names, torch.autograd.grad(value, [state.params[n] for n in names]), strict=True))
        slots = state.differentiable_tensors()[len(names) :]
        zeros = [torch.zeros_like(slot) for slot in slots]
        begin = trainer.BackwardState(grads, zeros, torch.zeros_like(stream.weights))
        found = bound.backward(folder, stream, begin, state)
    return value.detach(), {"data_weights": found.weight_grads.detach()}


class _Call(nn.Module):
    """The objective, as a module for `functional_call`."""

    def __init__(self, model: nn.Module, function: TrainingFunction):
        super().__init__()
        self.model, self.objective = model, function.objective

    def forward(self) -> Tensor:
        return self.objective(self.model)
