"""Trainings on a device that is not the CPU: the checks beside this file, in a process of their own.

Torch keeps a device that it was told of, and sizes its autograd threads before; other tests should not meet it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pretended
import pytest

CHECKS = sorted(path.name for path in Path(__file__).parent.glob("checks_*.py"))


@pytest.mark.skipif(pretended.missing() is not None, reason=str(pretended.missing()))
def test_on_a_pretended_device():
    """A check that hangs says where, and does not take the suite with it."""
    options = ["-q", "--timeout=200", "--show-capture=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, *CHECKS]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-20_000:] + done.stderr[-2_000:]
