"""The weight of every text in the training of a small GPT, on as many processes as torchrun starts.

A third of the texts follow another grammar than those that the model is judged by. One metagradient with respect to
the weights of all texts finds them. Each process evaluates its microbatches and owns its part of optimizer state, log
and adjoint; the numbers are those of one process, bit by bit.

Run: python examples/distributed.py (a few seconds)
Or:  torchrun --standalone --nproc-per-node 2 examples/distributed.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import mgd
from mgd_kernels import AdamW

VOCABULARY, LENGTH, WIDTH = 12, 16, 32


def texts(n: int, grammar: int) -> torch.Tensor:
    """Random texts `[n, LENGTH + 1]` in which most letters follow from the one before."""
    follows = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(grammar))
    tokens = torch.randint(VOCABULARY, (n, LENGTH + 1))
    for i in range(1, LENGTH + 1):
        tokens[:, i] = torch.where(torch.rand(n) < 0.8, follows[tokens[:, i - 1]], tokens[:, i])
    return tokens


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.1, batch_first=True, norm_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embedding(tokens) + self.position, src_mask=self.mask))


def each_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of every text, `[n]`."""
    return F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def main(n: int = 96, steps: int = 40) -> dict[str, float]:
    if "RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    group = dist.group.WORLD if dist.is_initialized() else None

    torch.manual_seed(0)  # the same on every process, as are model, batches and z
    other = torch.zeros(n, dtype=torch.bool).index_fill(0, torch.randperm(n)[: n // 3], True)
    train = torch.where(other[:, None], texts(n, grammar=2), texts(n, grammar=1))
    held_out = texts(64, grammar=1)

    f = mgd.TrainingFunction(
        GPT(),
        lambda model, batch, z: (z["weights"] * each_loss(model, batch[0])).mean(),
        [(train[i], i) for i in (torch.randperm(n)[:16] for _ in range(steps))],
        optimizer=AdamW(lr=3e-3, eps_root=1e-8),
        objective=lambda model: each_loss(model, held_out).mean(),
        per_example={"weights": lambda batch: batch[1]},
        microbatches=4,
        process_group=group,
        trace=False,  # for steps of milliseconds a capture does not pay
    )
    result = f.metagradient({"weights": torch.ones(n)})
    worst = result.grads["weights"].topk(int(other.sum())).indices
    found = other[worst].float().mean().item()
    if f.ranks.rank == 0:
        print(f"{f.ranks.size} processes: held-out loss {result.value:.6f}, metagradient {worst.tolist()[:4]} ...")
        print(f"{found:.0%} of the {len(worst)} most harmful texts are of the other grammar (chance: 33%)")
    return {"found": found, "value": result.value.item()}


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
