"""Processor time of a metagradient on several processes, of all of them together.

Run: torchrun --nproc-per-node 2 benchmarks/processes.py (or python benchmarks/processes.py, for one)
"""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F

import mgd
from mgd.recipes.models.gpt import GPT
from mgd_kernels import AdamW


def main(steps: int = 4, repeats: int = 2) -> None:
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    group = dist.group.WORLD if dist.is_initialized() else None
    torch.manual_seed(0)
    model, tokens = GPT(512, 64, 2, 256), torch.randint(512, (64, 65))

    def each(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    f = mgd.TrainingFunction(
        model,
        lambda model, batch, z: (z["weights"] * each(model, batch[0])).mean(),
        [(tokens[i], i) for i in (torch.randint(64, (16,)) for _ in range(steps))],
        optimizer=AdamW(lr=1e-3, eps_root=1e-8),
        objective=lambda model: each(model, tokens[:8]).mean(),
        per_example={"weights": lambda batch: batch[1]},
        microbatches=4,
        process_group=group,
        trace=False,
    )
    z, seconds = {"weights": torch.ones(64), "lr": torch.full((steps,), 1e-3)}, []
    f.metagradient(z)
    for _ in range(repeats):
        begin = time.process_time()
        result = f.metagradient(z)
        seconds.append(time.process_time() - begin)
    with f.ranks.call():
        everyone = f.ranks.objects(seconds)
    if f.ranks.rank == 0:
        total = ", ".join(f"{sum(each):.2f}" for each in zip(*everyone, strict=True))
        print(f"{f.ranks.size} processes: {total} s of processor time; value {result.value:.8f}")


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
