"""The list of GPUs that were tested."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mgd.bench.gpu import BEGIN, END

ROOT = Path(__file__).parents[3]


def test_every_gpu_in_the_list_has_numbers_behind_a_gate_that_held():
    text = (ROOT / "docs/install.md").read_text("utf-8")
    listed = text[text.index(BEGIN) : text.index(END)].splitlines()[3:]
    for line in listed:
        gpu, *_, file = (cell.strip() for cell in line.strip("|").split("|"))
        found = json.loads((ROOT / "benchmarks/results" / file.strip("`")).read_text("utf-8"))
        assert gpu in found["machine"]["accelerators"] and all(check["holds"] for check in found["gate"])
        assert found["workloads"] and found["kernels"]["rows"]
    claims = (ROOT / "README.md").read_text("utf-8")
    assert bool(listed) != bool(re.search(r"No GPU has run the GPU\s+kernels", claims))
