"""What is right: training unrolled as one autograd graph with plain SGD, and central finite differences.

Nothing of the package is used but the definition of each step's random stream. The model's tensors are replaced in
place, and the loss is called once per step, as in a training loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pattern import Training
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgd.step.rng import seed_of


def reference(build: Callable[[], Training]) -> tuple[Tensor, dict[str, Tensor]]:
    """The value and the gradient of every metaparameter."""
    training = build()
    z = {key: value.detach().clone().requires_grad_() for key, value in training.z.items()}
    value = unrolled(training, z, graph=True)
    grads = torch.autograd.grad(value, list(z.values()), allow_unused=True, materialize_grads=True)
    return value.detach(), dict(zip(z, grads, strict=True))


def slope(build: Callable[[], Training], direction: dict[str, Tensor], h: float = 1e-5) -> float:
    """The derivative of the value in this direction of the metaparameters, each training with fresh state."""

    def at(shift: float) -> float:
        training = build()
        return float(unrolled(training, {k: v + shift * direction[k] for k, v in training.z.items()}, graph=False))

    return (at(h) - at(-h)) / (2 * h)


def differences(build: Callable[[], Training], h: float = 1e-5) -> tuple[Tensor, dict[str, Tensor]]:
    """As `reference`, by central differences in every element."""
    training = build()
    grads = {}
    for key, value in training.z.items():
        zeros = {k: torch.zeros_like(v) for k, v in training.z.items()}
        units = torch.eye(value.numel(), dtype=value.dtype)
        slopes = [slope(build, zeros | {key: unit.reshape(value.shape)}, h) for unit in units]
        grads[key] = torch.tensor(slopes, dtype=value.dtype).reshape(value.shape)
    return unrolled(training, training.z, graph=False), grads


def unrolled(training: Training, z: dict[str, Tensor], *, graph: bool) -> Tensor:
    """The objective after training. graph: every step's gradient keeps its graph."""
    model = training.model
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    metaparameters = {key: value for key, value in z.items() if key != "lr"}
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
        for t, batch in enumerate(training.batches):
            torch.manual_seed(seed_of(0, t))
            buffers = {name: b.clone() for name, b in buffers.items()}
            with Replaced(model, parameters, buffers) as replaced:
                loss = training.loss(model, batch, metaparameters)
                grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=graph, allow_unused=True)
            buffers = replaced.left
            updated = {
                name: p if g is None else p - z["lr"][t] * g
                for (name, p), g in zip(parameters.items(), grads, strict=True)
            }
            parameters = updated if graph else {name: p.detach().requires_grad_() for name, p in updated.items()}
        torch.manual_seed(seed_of(0, len(training.batches)))
        with Replaced(model, parameters, {name: b.clone() for name, b in buffers.items()}):
            value = training.objective(model)
    return value if graph else value.detach()


class Replaced:
    """Inside the block, the model holds these tensors wherever its own stand. left: its buffers at the end."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor]):
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        self.tensors = {id(own[name]): tensor for name, tensor in (parameters | buffers).items()}
        self.model, self.names = model, list(buffers)

    def __enter__(self) -> Replaced:
        self.saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for module in self.model.modules():
            for registry in (module._parameters, module._buffers):
                self.saved.append((registry, dict(registry)))
                registry.update({k: self.tensors[id(v)] for k, v in registry.items() if id(v) in self.tensors})
        return self

    def __exit__(self, *_: Any) -> None:
        left = dict(self.model.named_buffers())
        self.left = {name: left[name] for name in self.names}
        for registry, before in self.saved:
            registry.clear()
            registry.update(before)
