"""The peak of resident memory, of processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def peak() -> int:
    """Of this process, in MB. Not `ru_maxrss`, which begins at the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10


def growth(program: str, *arguments: str) -> int:
    """What a program prints that imports this module."""
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True, env=environment)
    return int(done.stdout)
