"""The baseline of data poisoning: gradient cancelling (Lu et al. 2023, arXiv 2303.03592, section 4).

Parameters that classify badly are chosen first; then the pixels of the poisoned images are fitted such that there the
gradient of the poisoned training set vanishes. A training that reached them would stay there, but nothing makes it
reach them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Cancelled:
    """images: of the poisoned indices, `[k, ...]`. radius: of the corruption, in norms of the clean parameters.
    residual: norm of the training set's gradient at the target, with the poison in it and before. target_accuracy: at
    the target, on held-out images."""

    images: Tensor
    radius: float
    residual: float
    residual_before: float
    target_accuracy: float


def corrupted(
    model: nn.Module, clean: Mapping[str, Tensor], images: Tensor, labels: Tensor, radius: float, steps: int = 20
) -> Parameters:
    """Parameters within `radius · |clean|` of the clean ones (Euclidean norm) with a high loss on these images:
    gradient ascent with steps of a constant length, projected to the ball (Sun et al. 2020, gradient-based parameter
    corruption; their single step is `steps=1`)."""
    names = [name for name, _ in model.named_parameters()]
    start = {name: clean[name].detach() for name in names}
    limit = radius * _norm(list(start.values()))
    theta = dict(start)
    length = limit if steps == 1 else 2.5 * limit / steps
    for _ in range(steps):
        leaves = {name: x.clone().requires_grad_() for name, x in theta.items()}
        loss = F.cross_entropy(functional_call(model, leaves, (images,)), labels)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        scale = length / _norm(grads).clamp(min=1e-12)
        moved = [theta[name] + scale * g - start[name] for name, g in zip(names, grads, strict=True)]
        inside = (limit / _norm(moved).clamp(min=1e-12)).clamp(max=1.0)
        theta = {name: start[name] + inside * d for name, d in zip(names, moved, strict=True)}
    return theta


def cancel(
    model: nn.Module,
    target: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    poisoned: Tensor,
    *,
    low: float = 0.0,
    high: float = 1.0,
    steps: int = 300,
    rate: float = 0.03,
) -> tuple[Tensor, float, float]:
    """Pixels of the images `poisoned` in [low, high] at which the mean gradient of all `images` at `target` is small:
    projected Adam on half its squared norm, from the images as they are. Gives them, and the norm before and after."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in target.items()}
    rest = torch.ones(len(images), dtype=torch.bool, device=images.device).index_fill(0, poisoned, False)

    def gradient(x: Tensor, y: Tensor, graph: bool = False) -> list[Tensor]:
        loss = F.cross_entropy(functional_call(model, leaves, (x,)), y, reduction="sum") / len(images)
        return list(torch.autograd.grad(loss, list(leaves.values()), create_graph=graph))

    clean = gradient(images[rest], labels[rest])
    x = images[poisoned].clone().requires_grad_()
    y = labels[poisoned]
    optimizer = torch.optim.Adam([x], lr=rate)
    norms: list[float] = []
    best = x.detach().clone()
    for _ in range(steps + 1):
        squares = torch.stack([(a + b).square().sum() for a, b in zip(clean, gradient(x, y, True), strict=True)]).sum()
        norm = float(squares.detach().sqrt())
        if not norms or norm < min(norms):
            best = x.detach().clone()
        norms.append(norm)
        optimizer.zero_grad()
        # In units of the start, since a square of small gradients falls below Adam's eps.
        (0.5 * squares / max(norms[0], 1e-12) ** 2).backward()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(low, high)
    return best, norms[0], min(norms)


def tuned(
    model: nn.Module,
    clean: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    poisoned: Tensor,
    held_out: tuple[Tensor, Tensor],
    judge: Callable[[Tensor], float],
    *,
    radii: tuple[float, ...],
    steps: int,
    low: float = 0.0,
    high: float = 1.0,
    tick: Callable[[str], None] = lambda note: None,
) -> tuple[Cancelled, dict[float, float]]:
    """Gradient cancelling at the radius whose poison is the best by `judge(images of the poisoned indices)`, the
    held-out accuracy of models trained on it (the lower the better); and what the judge said of every radius."""
    found: list[tuple[float, Cancelled]] = []
    for radius in radii:
        target = corrupted(model, clean, *held_out, radius)
        x, before, after = cancel(model, target, images, labels, poisoned, low=low, high=high, steps=steps)
        with torch.no_grad():
            right = functional_call(model, target, (held_out[0],)).argmax(1) == held_out[1]
        found.append((judge(x), Cancelled(x, radius, after, before, float(right.double().mean()))))
        tick(f"radius {radius:g}")
    best = min(found, key=lambda pair: pair[0])[1]
    return best, {cancelled.radius: score for score, cancelled in found}


def _norm(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.stack([x.square().sum() for x in tensors]).sum().sqrt()
