"""What a metagradient takes on 1, 2 and 4 processes, beside the forecast of `mgd.plan.scale` (docs/scale.md).

Processor time of all processes together, wall time, bytes that each sends and writes to disk, and the growth of its
memory. The forecast takes from here the seconds of one process, and of a byte that is exchanged. Each process has one
thread and, where there are enough, a core of its own.

Run: python benchmarks/processes.py [--json FILE] (some minutes). By torchrun: one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import mgd
from mgd.plan.scale import DEVICES, Forecast, Scale
from mgd.recipes.models.gpt import GPT
from mgd.util.system import fields
from mgd_kernels import AdamW

V, STEPS, REPEATS = 4, 4, 4
EXCHANGED = 1 << 22  # bytes that each rank gives to all, to time an exchange


def wide() -> tuple[torch.nn.Module, torch.Tensor, Any]:
    """Parameters that outweigh activations, for memory and traffic."""
    model, x = torch.nn.Sequential(*(torch.nn.Linear(1600, 1600) for _ in range(3))), torch.randn(64, 1600)
    return model, x, lambda model, x: model(x).square().mean(1)


def gpt() -> tuple[torch.nn.Module, torch.Tensor, Any]:
    """A model that computes, for processor time."""
    model, tokens = GPT(512, 64, 2, 256), torch.randint(512, (64, 65))
    return model, tokens, lambda m, x: F.cross_entropy(m(x[:, :-1]).transpose(1, 2), x[:, 1:], reduction="none").mean(1)


def training(
    made: Any, group: Any, steps: int = STEPS, **options: Any
) -> tuple[mgd.TrainingFunction, dict[str, torch.Tensor]]:
    model, data, each = made
    f = mgd.TrainingFunction(
        model,
        lambda model, batch, z: (z["weights"] * each(model, batch[0])).mean(),
        [(data[i], i) for i in (torch.randint(64, (16,)) for _ in range(steps))],
        optimizer=AdamW(lr=1e-4, eps_root=1e-8),
        objective=lambda model: each(model, data[:8]).mean(),
        per_example={"weights": lambda batch: batch[1]},
        microbatches=V,
        process_group=group,
        trace=False,
        **options,
    )
    return f, {"weights": torch.ones(64), "lr": torch.full((steps,), 1e-4)}


def measure(group: Any) -> dict[str, Any]:
    """Of this rank: growth of its memory, bytes, and seconds of its processor, the least of some repeats."""
    torch.manual_seed(0)
    if os.environ.get("MALLOC_MMAP_THRESHOLD_"):
        f, z = training(wide(), group)
        before, start = getattr(f.ranks, "sent", 0), memory("VmRSS")
        f.metagradient(z)
        return {"memory": memory("VmHWM") - start, "sent": getattr(f.ranks, "sent", 0) - before}
    with tempfile.TemporaryDirectory() as folder:
        f, z = training(wide(), group, budget=mgd.Budget(disk=(folder, "1GB")), schedule="log")
        report = f.metagradient(z).report
        written = report.plan["bytes_moved"]["disk"]["written"]
        found = {"written": report.store["write"]["bytes"], "entries": written / report.plan["sizes"]["gradient"]}
    for steps in (STEPS, 2 * STEPS):
        f, z = training(gpt(), group, steps)
        seconds, wall = [], []
        for _ in range(1 + REPEATS):
            begin, clock, before = time.process_time(), time.perf_counter(), getattr(f.ranks, "sent", 0)
            f.metagradient(z)
            seconds.append(time.process_time() - begin)
            wall.append(time.perf_counter() - clock)
        found[f"seconds of {steps} steps"], found["wall"] = min(seconds[1:]), min(wall[1:])
        found[f"sent in {steps} steps"] = getattr(f.ranks, "sent", 0) - before
    return found | {"exchange": exchange_seconds(f)}


def memory(name: str) -> int:
    """Bytes of this process, as the system counts them."""
    return int(fields(Path("/proc/self/status"))[name].split()[0]) << 10


def exchange_seconds(f: mgd.TrainingFunction) -> float:
    """Processor seconds of this rank per byte that it sends."""
    if f.ranks.size == 1:
        return 0.0
    part, times = torch.zeros(EXCHANGED // 4), []
    with f.ranks.call():
        for _ in range(10):
            begin = time.process_time()
            torch.cat(f.ranks.exchange([part] * f.ranks.size, [part.numel()] * f.ranks.size))
            times.append(time.process_time() - begin)
    return sorted(times)[len(times) // 2] / (EXCHANGED * (f.ranks.size - 1))


def work() -> None:
    """One of the processes; the first one prints what all have measured."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    cores, rank = sorted(os.sched_getaffinity(0)), int(os.environ.get("RANK", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) <= len(cores):
        os.sched_setaffinity(0, cores[rank : rank + 1])
    group = dist.group.WORLD if dist.is_initialized() else None
    found, ranks = measure(group), training(gpt(), group)[0].ranks
    with ranks.call():
        everyone = ranks.objects(found)
    if ranks.rank == 0:
        print(json.dumps(everyone))
    if dist.is_initialized():
        dist.destroy_process_group()


def launched(size: int, **environment: str) -> dict[str, list[float]]:
    """What each of so many processes has measured."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    command = [sys.executable, "-W", "ignore", *launch, __file__, "--work"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    ranks = json.loads(run.stdout.splitlines()[-1])
    return {key: [rank[key] for rank in ranks] for key in ranks[0]}


def compared() -> dict[str, Any]:
    """Measured and forecast, by the number of processes."""
    rows: dict[str, Any] = {}
    parameters, plan = sum(p.numel() for p in wide()[0].parameters()), training(wide(), None)[0].plan()
    whole = fixed = 0.0
    for size in (1, 2, 4):
        # Every tensor has pages of its own, which it gives back: what is measured is then what is held.
        found = launched(size, MALLOC_MMAP_THRESHOLD_="65536") | launched(size)
        scale = Scale(parameters, size, microbatches=V // size)
        forecast = Forecast(scale, DEVICES["h100"], 1.0, 1.0, plan)
        seconds, twice = found[f"seconds of {STEPS} steps"], found[f"seconds of {2 * STEPS} steps"]
        if size == 1:  # what each process does, however few steps it makes
            whole, fixed = twice[0], max(0.0, 2 * seconds[0] - twice[0])
        exchanged = sum(x * y for x, y in zip(found["exchange"], found[f"sent in {2 * STEPS} steps"], strict=True))
        working = scale.owned_bytes + scale.working_bytes - scale.gradient_width * parameters  # the model was there
        measured = {key: max(found[key]) for key in ("sent", "written", "memory")} | {"seconds": sum(twice)}
        predicted = {
            "sent": forecast.network_bytes,
            "written": found["entries"][0] * scale.sizes.gradient,
            "memory": working + sum(plan.peak.values()) // size,
            "seconds": whole + (size - 1) * fixed + exchanged,
        }
        ratios = {key: measured[key] / value for key, value in predicted.items() if value}
        rows[str(size)] = {"measured": measured, "predicted": predicted, "measured / predicted": ratios}
        rows[str(size)]["wall"] = max(found["wall"])
        to_one = {
            "wall": rows[str(size)]["wall"] / rows["1"]["wall"],
            "processor time": measured["seconds"] / rows["1"]["measured"]["seconds"],
        }
        print(
            size, "processes, measured / predicted:", ", ".join(f"{key} {ratio:.2f}" for key, ratio in ratios.items())
        )
        print("   to one process:", ", ".join(f"{key} {ratio:.3f}" for key, ratio in to_one.items()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    if arguments.work or "RANK" in os.environ:
        return work()
    rows = compared()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
