"""Shapes that depend on the data: masks, mining, experts. Each step is a function of its inputs."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from pattern import EXAMPLES, Training, errors, features, first, mean, pattern, seeded, training
from torch import Tensor, nn

ZERO_AND_ONE = first(lambda t: [5, 3, 2, 1, 1, 0, 2, 5][t])


@pattern()
def plain() -> Training:
    return training(mean)


@pattern()
def mask_mean() -> Training:
    """The count of the mask enters the backward pass as a divisor, and differs at the last step only."""
    return training(lambda m, b, z: errors(m, b, z)[b["mask"]].mean(), mask=first(lambda t: 1 if t == 7 else 5))


@pattern()
def mask_mean_of_varying_count() -> Training:
    return training(lambda m, b, z: errors(m, b, z)[b["mask"]].mean(), mask=first(lambda t: 3 + t % 4))


@pattern()
def two_masks_broadcast() -> Training:
    """Two counts that are equal at first; then one of them is 1 and broadcasts."""

    def loss(m, b, z):
        e = errors(m, b, z)
        return (e[b["mask"]] * e[b["other"]]).sum() / 16

    start = lambda t: 3 if t < 4 else (5 if t < 6 else 7)
    return training(
        loss, mask=first(lambda t: 5 if t < 4 else 3), other=lambda t, g: torch.arange(EXAMPLES) >= start(t)
    )


@pattern()
def mask_down_to_one() -> Training:
    def loss(m, b, z):
        c = errors(m, b, z)[b["mask"]]
        return (c - c.mean()).square().sum() + (c.square().mean() + 0.1).sqrt() + c.sum()

    return training(loss, mask=first(lambda t: [5, 3, 2, 1, 1, 2, 3, 5][t]))


@pattern()
def mask_down_to_nothing() -> Training:
    def loss(m, b, z):
        e = errors(m, b, z)
        c = e[b["mask"]]
        return (c - c.sum() / EXAMPLES).square().sum() + e.mean()

    return training(loss, mask=ZERO_AND_ONE)


@pattern()
def outer_product_of_masked() -> Training:
    def loss(m, b, z):
        e = errors(m, b, z)
        c = e[b["mask"]]
        return (c[:, None] * c[None]).sum() / 8 + e.mean()

    return training(loss, mask=ZERO_AND_ONE)


@pattern()
def softmax_of_masked() -> Training:
    def loss(m, b, z):
        c = features(m, b["x"])[b["mask"]]
        return ((c @ c.T).softmax(1) @ c).square().sum() + mean(m, b, z)

    return training(loss, mask=ZERO_AND_ONE)


@pattern()
def first_of_masked() -> Training:
    def loss(m, b, z):
        e = errors(m, b, z)
        c = e[b["mask"]]
        return (c * e[:1] + c * c[:1]).sum() / 8 + e.mean()

    return training(loss, mask=ZERO_AND_ONE)


@pattern()
def layer_norm_of_masked() -> Training:
    def loss(m, b, z):
        h = F.layer_norm(m[0](b["x"])[b["mask"]], (6,))
        return m[2](torch.tanh(h)).square().sum() / 8 + mean(m, b, z)

    return training(loss, mask=ZERO_AND_ONE)


@pattern()
def reshaped_masked() -> Training:
    def loss(m, b, z):
        h = m[0](b["x"])[b["mask"]]
        c = torch.cat([h, h * h]).reshape(-1, 3)
        return (c.t().contiguous().view(-1) * 2).sin().sum() / 8 + mean(m, b, z)

    return training(loss, mask=ZERO_AND_ONE)


@pattern()
def token_into_mask() -> Training:
    """`x[mask] = token`, with a token that is trained."""

    def loss(m, b, z):
        x = b["x"].clone()
        x[b["mask"]] = m[0].weight[0]
        return mean(m, b | {"x": x}, z)

    return training(loss, mask=first(lambda t: 3 + t % 4))


@pattern()
def masked_select() -> Training:
    return training(
        lambda m, b, z: torch.masked_select(errors(m, b, z), b["mask"]).mean(), mask=first(lambda t: 2 + t % 5)
    )


@pattern()
def mask_from_parameters() -> Training:
    def loss(m, b, z):
        e = errors(m, b, z)
        return e[e > 0.5].mean() + 0.1 * e.mean()

    return training(loss)


@pattern()
def hard_examples_by_topk() -> Training:
    return training(lambda m, b, z: errors(m, b, z).topk(3).values.mean())


@pattern()
def hard_examples_by_topk_of_batch() -> Training:
    """The number of hard examples is a Python number in the batch."""
    return training(lambda m, b, z: errors(m, b, z).topk(b["k"]).values.mean(), k=lambda t, g: 1 + t % 4)


@pattern()
def hard_examples_by_numpy() -> Training:
    """Which examples are hard is found in numpy, from the parameters."""

    def loss(m, b, z):
        e = errors(m, b, z)
        return e[torch.from_numpy(np.argsort(e.detach().numpy())[-3:].copy())].mean()

    return training(loss)


@pattern()
def online_triplets() -> Training:
    def loss(m, b, z):
        h = features(m, b["x"])
        same = (b["c"][:, None] == b["c"][None]) & ~torch.eye(EXAMPLES, dtype=torch.bool)
        i, j = torch.nonzero(same, as_tuple=True)
        return (z["w"][b["i"]][i] * (h[i] - h[j]).square().sum(1)).mean() + mean(m, b, z)

    return training(loss)


@pattern()
def contrastive_with_masks() -> Training:
    def loss(m, b, z):
        h = F.normalize(features(m, b["x"]), dim=1)
        eye = torch.eye(EXAMPLES, dtype=torch.bool)
        logits = (h @ h.T / 0.5).masked_fill(eye, -torch.inf)
        positive = (b["c"][:, None] == b["c"][None]) & ~eye
        log_p = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~positive, 0.0)
        return -(z["w"][b["i"]] * log_p.sum(1) / positive.sum(1).clamp(min=1)).mean() + mean(m, b, z)

    return training(loss)


@pattern()
def mean_of_each_class_by_unique() -> Training:
    def loss(m, b, z):
        classes, inverse = torch.unique(b["c"], return_inverse=True)
        sums = torch.zeros(len(classes), dtype=torch.float64).index_add(0, inverse, errors(m, b, z))
        return (sums / EXAMPLES).square().mean()

    return training(loss, c=lambda t, g: torch.randint(1 + t % 4, (EXAMPLES,), generator=g))


@pattern()
def divided_by_number_of_classes() -> Training:
    return training(lambda m, b, z: errors(m, b, z).sum() / b["c"].unique().numel() / 4)


@pattern()
def class_weights_by_bincount() -> Training:
    def loss(m, b, z):
        counts = torch.bincount(b["c"], minlength=3)
        return (errors(m, b, z) * (1 / (1 + counts.double()))[b["c"]]).sum()

    return training(loss)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList([nn.Linear(4, 1) for _ in range(3)])


class IndexedExperts(Experts):
    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(1)
        expert, out = p.argmax(1), torch.zeros(len(x), 1, dtype=x.dtype)
        for k, f in enumerate(self.experts):
            rows = torch.where(expert == k)[0]
            out = out.index_add(0, rows, torch.tanh(f(x[rows])) * p[rows, k, None])
        return out


class SortedExperts(Experts):
    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(1)
        order = p.argmax(1).argsort(stable=True)
        counts = torch.bincount(p.argmax(1), minlength=3).tolist()
        parts = [torch.tanh(f(part)) for f, part in zip(self.experts, x[order].split(counts), strict=True)]
        return torch.cat(parts)[order.argsort()] * p.max(1, keepdim=True).values


class SkippingExperts(Experts):
    """As Mixtral in transformers: only the experts that were hit, and a branch for those without a token."""

    def forward(self, x: Tensor) -> Tensor:
        p, k = self.gate(x).softmax(1).topk(2)
        out = torch.zeros(len(x), 1, dtype=x.dtype)
        hit = F.one_hot(k, 3).permute(2, 1, 0)
        for e in (hit.sum((1, 2)) > 0).nonzero():
            slot, rows = torch.where(hit[e[0]])
            out.index_add_(0, rows, torch.tanh(self.experts[int(e)](x[rows])) * p[rows, slot, None])
        return out


@pattern()
def experts_by_index() -> Training:
    return training(mean, seeded(IndexedExperts))


@pattern()
def experts_by_sorting() -> Training:
    return training(mean, seeded(SortedExperts))


@pattern()
def experts_that_were_hit() -> Training:
    return training(mean, seeded(SkippingExperts))
