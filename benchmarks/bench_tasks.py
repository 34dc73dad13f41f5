"""In total, from the first call on: `mean_over` by default, against its tasks one by one and with `trace=True`.

Cumulative processor time of the three, which take turns, and the largest ratio of the default to the better of the
others, after the first call. Run: python benchmarks/bench_tasks.py --json FILE
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from mgd import mean_over
from mgd.bench.short import WORKLOADS

CASES = [("sines", 16, 25), ("images", 16, 20), ("sines", 4, 70)]  # workload, tasks a call, calls
WAYS = {"default": None, "one by one": None, "trace=True": True}


def total(workload: str, tasks: int, calls: int, steps: int = 5) -> dict[str, Any]:
    torch.manual_seed(0)
    problems = {way: WORKLOADS[workload](tasks, steps) for way in WAYS}
    functions = {way: [problems[way].function(i, trace=WAYS[way]) for i in range(tasks)] for way in WAYS}
    seconds, ratios = {way: [0.0] for way in WAYS}, []
    for _ in range(calls):
        for way in WAYS:
            leaves, spec = tree_flatten(problems[way].z())
            z = tree_unflatten([x.clone().requires_grad_() for x in leaves], spec)
            start = time.process_time()
            if way == "one by one":
                for f in functions[way]:
                    f.metagradient(z)
            else:
                mean_over(functions[way], z).backward()
            seconds[way].append(seconds[way][-1] + time.process_time() - start)
        ratios.append(seconds["default"][-1] / min(seconds["one by one"][-1], seconds["trace=True"][-1]))
    worst = max(range(1, calls), key=ratios.__getitem__)
    found = {"workload": workload, "tasks": tasks, "steps": steps, "worst": ratios[worst], "call": worst + 1}
    return found | {"last": ratios[-1], "seconds": {way: each[1:] for way, each in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    path = parser.parse_args().json
    torch.set_num_threads(1)
    found = [total(*case) for case in CASES]
    for each in found:
        print(
            f"{each['workload']}, {each['tasks']} tasks a call: {each['worst']:.2f} at worst, in call {each['call']}; "
            f"{each['last']:.2f} after {len(each['seconds']['default'])}"
        )
    if path is not None:
        path.write_text(json.dumps(found) + "\n", "utf-8")


if __name__ == "__main__":
    main()
