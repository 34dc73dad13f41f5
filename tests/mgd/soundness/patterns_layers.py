"""Layers and operators by name: attention, recurrences, scatter, complex numbers. Each step is pure."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pattern import EXAMPLES, REFUSABLE, Training, errors, features, mean, pattern, randn, seeded, training
from patterns_operators import on_inputs, weighted
from torch import Tensor, nn
from torch.nn.utils import parametrizations


@pattern()
def focal_loss() -> Training:
    def loss(m, b, z):
        log_p = m(b["x"]).log_softmax(1).gather(1, b["c"][:, None])[:, 0]
        return -weighted((1 - log_p.exp()) ** 2 * log_p, b, z)

    return training(loss, classifier(), objective=on_inputs(5, 4))


def classifier(out: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, out)))


@pattern()
def ignored_labels() -> Training:
    def loss(m, b, z):
        labels = b["c"].masked_fill(b["x"][:, 0] > 0.8, -100)
        logits = m(b["x"] * z["w"][b["i"], None])
        return F.cross_entropy(logits, labels, ignore_index=-100)

    return training(loss, classifier(), objective=on_inputs(5, 4))


@pattern(REFUSABLE, differences=True)
def ctc() -> Training:
    def loss(m, b, z):
        log_p = m(b["q"] * z["w"][None, :, None]).log_softmax(-1)
        return F.ctc_loss(log_p, b["labels"], torch.full((EXAMPLES,), 6), b["n"])

    return training(
        loss,
        classifier(),
        objective=on_inputs(5, 4),
        q=lambda t, g: randn(6, EXAMPLES, 4, g=g),
        labels=lambda t, g: torch.randint(1, 3, (EXAMPLES, 2), generator=g),
        n=lambda t, g: torch.tensor([1, 2] * 4),
    )


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(10, 4, mode=mode), nn.Linear(4, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(tokens)))


@pattern(REFUSABLE, differences=True)
def embedding_bag() -> Training:
    held = torch.arange(10).view(5, 2)
    return training(
        lambda m, b, z: weighted((m(b["tokens"]) - b["y"]).square()[:, 0], b, z),
        seeded(Bag, "mean"),
        objective=lambda m: m(held).square().mean(),
        tokens=lambda t, g: torch.randint(10, (EXAMPLES, 3), generator=g),
    )


class Tied(nn.Module):
    """The matrix is embedding and output layer; `padding_idx` keeps gradients of the first from one of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embed(tokens).cumsum(1))) @ self.embed.weight.T


@pattern(honest=False)
def tied_embedding_with_padding() -> Training:
    def loss(m, b, z):
        tokens = b["tokens"]
        each = F.cross_entropy(m(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], ignore_index=0, reduction="none")
        return weighted(each.sum(1), b, z) / 4

    held = torch.arange(14).view(2, 7) % 7
    return training(
        loss,
        seeded(Tied),
        objective=lambda m: m(held).square().mean(),
        tokens=lambda t, g: torch.randint(7, (EXAMPLES, 5), generator=g),
    )


class Normed(nn.Module):
    """Weight normalisation of a linear layer, in arithmetic."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.v, self.bias = nn.Parameter(layer.weight.detach().clone()), layer.bias
        self.g = nn.Parameter(self.v.detach().norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.g * self.v / self.v.square().sum(1, keepdim=True).sqrt(), self.bias)


def weight_normed(norm) -> Training:
    return training(mean, seeded(lambda: nn.Sequential(norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 1))))


@pattern(plain=lambda: weight_normed(Normed))
def weight_norm() -> Training:
    """The second derivative of torch's fused kernel is wrong; the reference is written out."""
    return weight_normed(parametrizations.weight_norm)


@pattern(honest=False)
def spectral_norm() -> Training:
    """Power iteration in buffers, under no_grad, at every call in training mode."""
    make = lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 1))
    return training(mean, seeded(make))


@pattern()
def weight_standardisation() -> Training:
    def loss(m, b, z):
        w = m[0].weight
        w = (w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True) + 1e-5).sqrt()
        h = torch.tanh(F.linear(b["x"], w, m[0].bias))
        return weighted((m[2](h) - b["y"]).square()[:, 0], b, z)

    return training(loss)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.head(h.transpose(1, 2).flatten(2).mean(1))


def sequences(t: int, g: torch.Generator) -> Tensor:
    return randn(EXAMPLES, 5, 4, g=g)


@pattern()
def attention_with_padding() -> Training:
    def loss(m, b, z):
        mask = (torch.arange(5) < b["n"][:, None])[:, None, None]
        return weighted((m(b["q"], mask) - b["y"]).square()[:, 0], b, z)

    return training(
        loss,
        seeded(Attention),
        objective=on_inputs(5, 5, 4),
        q=sequences,
        n=lambda t, g: torch.randint(1, 6, (EXAMPLES,), generator=g),
    )


@pattern()
def attention_with_mask_if_needed() -> Training:
    """The mask is left out where nothing is padded, as in transformers."""

    def loss(m, b, z):
        mask = torch.arange(5) < b["n"][:, None]
        mask = None if mask.all() else mask[:, None, None]
        return weighted((m(b["q"], mask) - b["y"]).square()[:, 0], b, z)

    n = lambda t, g: torch.full((EXAMPLES,), 5 if t % 2 else 3)
    return training(loss, seeded(Attention), objective=on_inputs(5, 5, 4), q=sequences, n=n)


@pattern()
def encoder_layer_with_dropout() -> Training:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
            return self.head(self.layer(x, src_key_padding_mask=padding).mean(1))

    def loss(m, b, z):
        padding = torch.arange(5) >= b["n"][:, None]
        return weighted((m(b["q"], padding) - b["y"]).square()[:, 0], b, z)

    held = randn(5, 5, 4, g=9)
    return training(
        loss,
        seeded(Encoder),
        objective=lambda m: m(held).square().mean(),  # in training mode
        q=sequences,
        n=lambda t, g: torch.randint(2, 6, (EXAMPLES,), generator=g),
    )


@pattern()
def convolution_and_pooling() -> Training:
    make = lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.GELU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(9, 1))
    loss = lambda m, b, z: weighted((m(b["s"]) - b["y"]).square()[:, 0], b, z)
    return training(loss, seeded(make), objective=on_inputs(5, 1, 8), s=lambda t, g: randn(EXAMPLES, 1, 8, g=g))


@pattern()
def einsum() -> Training:
    def loss(m, b, z):
        h = features(m, b["x"])
        return weighted(torch.einsum("bi,ij,bj->b", h, m[0].weight @ m[0].weight.T, h), b, z) + mean(m, b, z)

    return training(loss)


@pattern()
def spectrum() -> Training:
    def loss(m, b, z):
        f = torch.fft.rfft(features(m, b["x"]), dim=1)
        phase = torch.view_as_complex(torch.stack([f.real.cos(), f.imag.sin()], -1))
        return weighted((f * phase.conj()).abs().square().sum(1), b, z) / 8 + mean(m, b, z)

    return training(loss)


@pattern()
def cumulative() -> Training:
    def loss(m, b, z):
        h = features(m, b["x"])
        return weighted(h.cumsum(1).logcumsumexp(1).sum(1) * (1.5 + h).cumprod(1)[:, -1], b, z) / 9 + mean(m, b, z)

    return training(loss)


@pattern()
def sorting() -> Training:
    """Sliced Wasserstein distance: sorted projections; ranks, medians and quantiles."""

    def loss(m, b, z):
        h = m(b["x"])[:, 0]
        gap = (h.sort().values - b["y"][:, 0].sort().values).square()
        return weighted(gap, b, z) + h.quantile(0.3).square() + h.median() * 0.1

    return training(loss)


@pattern()
def graph_messages() -> Training:
    """Scatter, index_put with accumulation, and index_add, over edges of the batch."""

    def loss(m, b, z):
        h, (i, j) = features(m, b["x"]), b["edges"]
        out = torch.zeros_like(h).scatter_add(0, i[:, None].expand(-1, 6), h[j])
        out = out.index_put((j,), h[i].sin(), accumulate=True)
        best = torch.zeros_like(h).scatter_reduce(0, i[:, None].expand(-1, 6), h[j], "amax", include_self=False)
        return weighted((m[2](torch.tanh(out + best)) - b["y"]).square()[:, 0], b, z)

    return training(loss, edges=lambda t, g: torch.randint(EXAMPLES, (2, 9), generator=g))


@pattern()
def linear_algebra() -> Training:
    def loss(m, b, z):
        h = features(m, b["x"])
        c = h.T @ (z["w"][b["i"], None] * h) / EXAMPLES + torch.eye(6, dtype=h.dtype)
        solved = torch.linalg.solve(c, h.T).square().mean()
        return torch.linalg.cholesky(c).diagonal().log().sum() + solved + mean(m, b, z)

    return training(loss)


@pattern()
def interpolation_and_padding() -> Training:
    def loss(m, b, z):
        h = F.pad(features(m, b["x"])[:, None], (2, 2), mode="reflect")
        h = F.interpolate(h, scale_factor=1.5, mode="linear")
        return weighted(F.avg_pool1d(h, 3).square().sum((1, 2)), b, z) / 8 + mean(m, b, z)

    return training(loss)


@pattern()
def recurrence() -> Training:
    def loss(m, b, z):
        h, states = torch.zeros(EXAMPLES, 4, dtype=torch.float64), []
        for t in range(5):
            h = 0.5 * h + features(m, b["x"] + h + t / 5)[:, :4]
            states.append(h)
        return mean(m, b | {"x": torch.stack(states).mean(0)}, z)

    return training(loss)


@pattern()
def autocast_inside() -> Training:
    """float64 is not cast, so that the numbers stay comparable; the region and its cache are there."""

    def loss(m, b, z):
        with torch.autocast("cpu", torch.bfloat16):
            o = m(b["x"])
            with torch.autocast("cpu", enabled=False):
                return weighted((o - b["y"]).square()[:, 0], b, z)

    return training(loss)


class CountingBuffer(nn.Module):
    """A branch on a buffer: part of the state, so the step is pure."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.d = nn.Linear(4, 6), nn.Linear(6, 1)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = torch.tanh(self.f(x))
        return self.d(h if self.calls > 4 else h.detach())


@pattern()
def branch_on_buffer() -> Training:
    return training(mean, seeded(CountingBuffer))


class RunningScale(nn.Module):
    """A running average in a buffer that carries derivatives from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 1)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        o = self.f(x)
        self.scale.mul_(0.9).add_(0.1 * o.square().mean())
        return o / self.scale


@pattern()
def differentiable_buffer() -> Training:
    return training(mean, seeded(RunningScale))


@pattern()
def errors_of_two_views() -> Training:
    """The model is called three times per step, at other shapes."""

    def loss(m, b, z):
        a, c = features(m, b["x"]), features(m, b["x"][:, [1, 0, 3, 2]])
        half = m(b["x"][:4]).square().mean()
        return errors(m, b, z).mean() + weighted((a - c).square().sum(1), b, z) + half

    return training(loss)
