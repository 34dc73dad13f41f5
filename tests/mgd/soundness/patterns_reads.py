"""Data that Python reads: branches, loops, numbers and lengths. Each step is a function of its inputs."""

from __future__ import annotations

import numpy as np
import torch
from pattern import EXAMPLES, Training, errors, features, first, mean, pattern, randn, seeded, training
from torch import Tensor, nn


@pattern()
def divided_by_int_of_sum() -> Training:
    return training(
        lambda m, b, z: (errors(m, b, z) * b["mask"]).sum() / int(b["mask"].sum()), mask=first(lambda t: 3 + t % 3)
    )


@pattern()
def branch_on_batch() -> Training:
    def loss(m, b, z):
        e = errors(m, b, z)
        if b["mask"].sum() > 3:
            e = e * 2
        return e.mean()

    return training(loss, mask=first(lambda t: 3 + t % 2))


@pattern()
def branch_in_backward() -> Training:
    """The two branches have the same value, and differ in the gradient alone."""

    def loss(m, b, z):
        h = features(m, b["x"])
        o = m[2](h.abs().sign() * h if bool(b["mask"].all()) else h.detach() + 0 * h)
        return (z["w"][b["i"]] * o[:, 0]).mean()

    model = training(mean).model
    model[2].requires_grad_(False)  # so that nothing depends on the detached features' way to the output
    return training(loss, model, mask=first(lambda t: 8 if t > 3 else 5))


@pattern()
def early_exit() -> Training:
    def loss(m, b, z):
        h = features(m, b["x"])
        if bool(h.square().mean() < b["threshold"]):
            return (z["w"][b["i"]] * h.square().sum(1)).mean()
        return mean(m, b, z)

    return training(loss, threshold=lambda t, g: torch.tensor(0.0 if t % 3 else 9.0))


@pattern()
def loop_count_from_batch() -> Training:
    def loss(m, b, z):
        x = b["x"]
        for _ in range(int(b["n"])):
            x = x + features(m, x)[:, :4]
        return mean(m, b | {"x": x}, z)

    return training(loss, n=lambda t, g: torch.tensor(1 + t % 3))


@pattern()
def loop_until_converged() -> Training:
    """A fixed point of the parameters, to a tolerance that decides how many rounds there are."""

    def loss(m, b, z):
        h = torch.zeros(EXAMPLES, 4, dtype=torch.float64)
        while True:
            new = 0.5 * features(m, b["x"] + h)[:, :4]
            if float((new - h).detach().norm()) < 0.05:
                break
            h = new
        return mean(m, b | {"x": b["x"] + h}, z)

    return training(loss)


@pattern()
def tolist() -> Training:
    def loss(m, b, z):
        e = errors(m, b, z)
        return sum(e[k] * (1 + c) for k, c in enumerate(b["c"].tolist())) / 16

    return training(loss)


@pattern()
def numpy_in_loss() -> Training:
    return training(lambda m, b, z: (errors(m, b, z) * torch.as_tensor(np.sqrt(1 + b["c"].numpy()))).mean())


@pattern()
def dynamic_padding() -> Training:
    """As many examples as there are; every step another shape."""

    def cut(batch):
        return {key: value[: batch["n"]] for key, value in batch.items() if key != "n"}

    return training(mean, wrap=cut, n=lambda t, g: 1 + (3 * t) % 8)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = cell(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.cell(x)[1][0])
        return self.head(self.cell(x)[0][:, -1])


LENGTHS = [[4, 4, 1, 1, 2, 2, 3, 3], [4, 3, 2, 1, 2, 2, 3, 3], [4, 2, 2, 2, 2, 2, 3, 3]]


def recurrent(cell: type[nn.Module], packed: bool) -> Training:
    def loss(m, b, z):
        o = m(b["q"], b["n"]) if packed else m(b["q"])
        return (z["w"][b["i"]] * (o - b["y"]).square()[:, 0]).mean()

    held = randn(5, 4, 3, g=9)
    return training(
        loss,
        seeded(Recurrent, cell),
        objective=lambda m: m(held).square().mean(),
        q=lambda t, g: randn(EXAMPLES, 4, 3, g=g),
        n=lambda t, g: torch.tensor(LENGTHS[t % 3]),
    )


@pattern()
def packed_gru() -> Training:
    """Lengths of the same sum: the packed data have the same shape, the batch sizes differ."""
    return recurrent(nn.GRU, True)


@pattern()
def gru() -> Training:
    return recurrent(nn.GRU, False)


@pattern()
def lstm() -> Training:
    return recurrent(nn.LSTM, False)
