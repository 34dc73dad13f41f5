"""Processor time per step of the network of `mgd bench overhead`, of two source trees in turn, and its ratio.

    taskset -c 0 python benchmarks/overhead_ratio.py ANOTHER_TREE [ROUNDS]

Each tree has its own process, which computes while the other waits; a busy machine disturbs both alike. The other tree
needs the extension module: `git worktree add ANOTHER_TREE COMMIT`, and a copy of `mgd_kernels/_core*.so`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

STEPS = 256
CALLS = "metagradient", "train"


def compute(tree: str) -> None:
    """Microseconds per step of every call whose name comes in by stdin."""
    sys.path[:0] = [f"{tree}/python", tree]
    import mgd
    import mgd_kernels
    from mgd.bench import overhead

    for module in (mgd, mgd_kernels):
        assert Path(module.__file__).is_relative_to(tree), module.__file__
    function, z = overhead.smallest(STEPS)
    for name in CALLS * 2:  # captures, and plans by what that took
        getattr(function, name)(z)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.thread_time()
        getattr(function, line.strip())(z)
        print(1e6 * (time.thread_time() - start) / STEPS, flush=True)


def main(other: str, rounds: int) -> None:
    trees = {"other": str(Path(other).resolve()), "this": str(Path(__file__).resolve().parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = {
        name: subprocess.Popen([sys.executable, __file__, "--compute", tree], env=environment, **pipes)
        for name, tree in trees.items()
    }
    for process in processes.values():
        assert process.stdout.readline().strip() == "ready"
    for call in CALLS:
        found: dict[str, list[float]] = {name: [] for name in processes}
        for i in range(rounds):
            for name in sorted(processes, reverse=i % 2 == 1):
                process = processes[name]
                process.stdin.write(call + "\n")
                process.stdin.flush()
                found[name].append(float(process.stdout.readline()))
        ratio = statistics.median(b / a for a, b in zip(found["other"], found["this"], strict=True))
        other_least, least = min(found["other"]), min(found["this"])
        print(f"{call}: median ratio {ratio:.3f}", end="; ")
        print(f"least {other_least:.0f} and {least:.0f} µs a step: {least / other_least:.3f}", flush=True)
    for process in processes.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    if sys.argv[1] == "--compute":
        compute(sys.argv[2])
    else:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 25)
