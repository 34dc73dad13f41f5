"""Run in a process of its own: how far memory rises in trainings and metagradients. Prints JSON.

memory_probe.py budgets STEPS '[{"host": 1000}, ...]' OPTIONS   above where it stood, by budget, and in training
memory_probe.py convnet STEPS '"METHOD"' BUDGET                 with a convnet of 10^6 parameters and its activations
memory_probe.py forward '[STEPS, ...]'                          of forward mode, for trainings of these lengths
memory_probe.py lora STEPS '[BUDGET, ...]'                      with adapters of a frozen transformer, captured
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from unrolled import unrolled

import mgd
from mgd.recipes.models.resnet import resnet9
from mgd_kernels import SGD, AdamW


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def rise(work: Callable[[], object]) -> int:
    """Bytes by which resident memory rises above where it stands now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again from VmRSS
    before = status("VmRSS")
    result = work()
    peak = status("VmHWM") - before
    del result
    return peak


def parts(model: nn.Module, shape: tuple[int, ...], steps: int, batch: int) -> dict:
    x, y = torch.randn(batch, *shape), torch.randint(4, (batch,))
    return {
        "model": model,
        "loss": lambda m, b, z: F.cross_entropy(m(b[0]), b[1]),
        "batches": [(x, y)] * steps,
        "objective": lambda m: F.cross_entropy(m(x), y),
    }


def dense(steps: int, width: int = 1024, **options) -> tuple[mgd.TrainingFunction, dict]:
    """About a million parameters, and activations that weigh next to nothing."""
    model = nn.Sequential(nn.Linear(512, width), nn.Tanh(), nn.Linear(width, 512), nn.Tanh(), nn.Linear(512, 4))
    made = parts(model, (512,), steps, 8)
    f = mgd.TrainingFunction(**made, optimizer=AdamW(lr=1e-3, eps_root=1e-8), **options)
    return f, {"lr": torch.full((steps,), 1e-3)}


def budgets(steps: int, given: list[dict], options: dict) -> dict:
    f, z = dense(2, 8, **options)
    f.metagradient(z)  # libraries, lazy imports
    f, z = dense(steps, **options)
    sizes, measured = f.plan().sizes, []
    training = rise(lambda: f.train(z))
    for budget in given:
        g = f.replaced(budget=mgd.Budget(**budget))
        reports: list[mgd.Report] = []
        peak = rise(lambda g=g, reports=reports: reports.append(g.metagradient(z).report))
        measured.append({"rise": peak, "plan": reports[0].plan["peak"], "store": reports[0].store})
    return {"training": training, "gradient": sizes.gradient, "budgets": measured}


def forward(lengths: list[int]) -> dict:
    def call(steps: int, width: int = 1024) -> Callable[[], object]:
        f, z = dense(steps, width)
        return lambda: f.jvp(z, z)

    call(2, 8)()  # libraries, lazy imports
    return {"rises": [rise(call(steps)) for steps in lengths]}


def convnet(steps: int, method: str, budget: dict) -> dict:
    def call(length: int, width: int) -> Callable[[], object]:
        made = parts(resnet9("group", width), (3, 32, 32), length, 8) | {"optimizer": SGD(lr=0.05, momentum=0.9)}
        model, loss, batches = made.pop("model"), made.pop("loss"), made.pop("batches")
        z = {"lr": torch.full((length,), 0.05)}
        if method == "unrolled":
            return lambda: unrolled(model, loss, batches, z, **made)
        f = mgd.TrainingFunction(model, loss, batches, **made, budget=mgd.Budget(**budget), trace=steps >= 32)
        return lambda: getattr(f, method)(z)

    call(2, 8)()  # libraries: torch's tracing alone takes 120 MB, once a process
    return {"rise": rise(call(steps, 24))}


class Adapted(nn.Module):
    """A frozen linear layer and a trained product of two thin ones."""

    def __init__(self, width: int, rank: int = 4):
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) + self.up(self.down(x))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query, self.value = Adapted(width), Adapted(width)
        self.out, self.wide, self.narrow = (
            nn.Linear(a, b).requires_grad_(False) for a, b in ((width, width), (width, 4 * width), (4 * width, width))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.query, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(x)))


def lora(steps: int, given: list[dict]) -> list[dict]:
    """Rise and bytes kept by budget."""

    def function(length: int, size: int) -> mgd.TrainingFunction:
        model = nn.Sequential(*(Block(128) for _ in range(3)), nn.Flatten(), nn.Linear(64 * 128, 4))
        return mgd.TrainingFunction(
            **parts(model, (64, 128), length, size), optimizer=AdamW(lr=1e-3, eps_root=1e-8), trace=True
        )

    function(2, 2).metagradient({"lr": torch.full((2,), 1e-3)})  # libraries: torch's tracing alone takes 120 MB
    f, z, measured = function(steps, 16), {"lr": torch.full((steps,), 1e-3)}, []
    for budget in given:
        g = f.replaced(budget=mgd.Budget(**budget))
        reports: list[mgd.Report] = []
        peak = rise(lambda g=g, reports=reports: reports.append(g.metagradient(z).report))
        measured.append({"rise": peak, "kept": reports[0].kept_bytes, "plan": reports[0].plan["peak"]["host"]})
    return measured


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    what, *arguments = sys.argv[1:]
    print(
        json.dumps(
            {"budgets": budgets, "forward": forward, "convnet": convnet, "lora": lora}[what](
                *map(json.loads, arguments)
            )
        )
    )
