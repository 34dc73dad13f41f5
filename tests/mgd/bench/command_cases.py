"""How the tests of the benchmarks run a command, and measure memory in this process."""

from __future__ import annotations

import pytest

from mgd.bench import peak
from mgd.cli import main as cli

# Float32 rounding of sums over a batch, carried through a few steps of Adam: measured up to 2e-5.
CLOSE = 2e-4


def run(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    assert (end.value.code or 0) == code, out.err
    return " ".join(out.out.split()), out.err


def in_this_process(source, method, steps=None, device="cpu", options=None, rounds=0, core=None):
    request = {"source": source, "method": method, "steps": steps, "device": device, "rounds": rounds, "core": core}
    return peak._answer(request | {"options": options or {}})
