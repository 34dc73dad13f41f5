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

NUMERICS, TILES, LOSSES = (Path(__file__).with_name(f"triton_{name}.py") for name in ("operators", "tiles", "losses"))


def run(*arguments: str, **environment: str) -> str:
    """Run Python in a process of its own, for which alone `environment` holds: the interpreter patches Triton."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done.stdout


def numerics(*arguments: object) -> None:
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    options = "-q", "-p", "no:cacheprovider", "-p", "no:xdist"
    output = run("-m", "pytest", *options, *map(str, arguments), **environment)
    assert " passed" in output and "failed" not in output, output


def test_numerics():
    numerics(NUMERICS, TILES, LOSSES, "-k", "not shipped or sm_90-64")


def test_numerics_of_every_tile():
    numerics(TILES, "-k", "shipped")


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


ATTENTION = """
import json, sys
import torch
from mgd_kernels import aot_operators

print(json.dumps(aot_operators.attention_rows(sys.argv[1], **eval(sys.argv[2]))))
"""
# What a program may have; sm_80's tiles fit the smaller GPUs of its kind, too.
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def attention_spills_nothing(target: str, options: str, count: int, kernel: str = "") -> None:
    """kernel: the only one that is looked at, if any. count: how often those are launched."""
    rows = [row for row in json.loads(run("-c", ATTENTION, target, options)) if kernel in row["kernel"]]
    assert len(rows) == count
    for row in rows:
        assert row["spills"] == row["scalar_spills"] and row["shared"] <= SHARED[target], row
        assert row["tensor_memory"] == 0, row  # which one program takes from the others


def test_attention_of_a_common_width_spills_nothing():
    attention_spills_nothing("sm_100", "{'heads': (64,), 'masks': (torch.float32,)}", 7)


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
def test_attention_spills_nothing_to_memory(target):
    attention_spills_nothing(target, "{}", 15)
    attention_spills_nothing(target, "{'masks': (torch.float32,)}", 6, "mask_gradient")


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("mask", "count"), [("bool", 15), ("float32", 21)])
def test_attention_spills_nothing_with_masks_and_dropout_on_the_newest(mask, count, dropout):
    attention_spills_nothing("sm_100", f"{{'masks': (torch.{mask},), 'dropout': {dropout}}}", count)


CHANNELS = """
import json, sys
from mgd_kernels import aot_operators

print(json.dumps(aot_operators.channel_norm_rows(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
def test_norms_of_channels_spill_nothing_and_read_wide(target):
    """Batch and group norm of channels of 1,024 elements, and of 49, which begin anywhere."""
    rows = json.loads(run("-c", CHANNELS, target))
    assert len(rows) == 12 and len({row["kernel"] for row in rows}) == 3
    for i, row in enumerate(rows):
        assert row["spills"] == row["scalar_spills"] == 0 and row["registers"] <= 128, row
        assert row["vector_bytes"] == (16 if i < 6 else 4), row


LOSS = """
import json, sys
from mgd_kernels import aot_operators

print(json.dumps(aot_operators.loss_rows(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
def test_losses_spill_nothing_and_read_wide(target):
    """Rows of an odd number of elements begin anywhere."""
    rows = json.loads(run("-c", LOSS, target))
    assert len(rows) == 16 and {row["kernel"] for row in rows} == {"loss_kernel", "twice_kernel"}
    for i, row in enumerate(rows):
        assert row["spills"] == row["scalar_spills"] == 0 and row["registers"] <= 128, row
        assert row["vector_bytes"] == 16 if i < 8 else row["vector_bytes"] >= 4, row
