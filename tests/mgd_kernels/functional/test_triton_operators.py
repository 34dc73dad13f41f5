"""Triton's operators: their numerics (on a GPU, else in Triton's interpreter), and what their kernels compile to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

NUMERICS = Path(__file__).with_name("triton_operators.py")


def run(*arguments: str, **environment: str) -> str:
    """Run Python in a process of its own, for which alone `environment` holds: the interpreter patches Triton."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done.stdout


def test_numerics():
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(NUMERICS), **environment)
    assert " passed" in output and "failed" not in output, output


CODE = """
import json, sys
from mgd_kernels import aot_operators

print(json.dumps(aot_operators.rows(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_nothing_spills_and_accesses_are_wide(target):
    """As `python -m mgd_kernels.aot_operators` prints. Rows of 64 elements leave one or two to a thread."""
    rows = json.loads(run("-c", CODE, target))
    assert len({row["kernel"] for row in rows}) == 8
    for row in rows:
        assert row["spills"] == 0 and row["registers"] <= 128 and row["vector_bytes"] >= 4, row
