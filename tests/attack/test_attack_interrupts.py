"""Interrupts (Ctrl-C) at random moments of a metagradient, with its log in memory, on a disk, and in a directory."""

from __future__ import annotations

import gc
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from interruptions import same, training
from torch.overrides import _get_current_function_mode_stack

from mgd import Budget


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("where", ["memory", "disk", "directory"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a file that was just opened
def test_interrupts_at_random_moments_of_a_run(tmp_path: Path, full: bool, where: str):
    disk = Budget(host="64kB", disk=(tmp_path, "100MB")) if where == "disk" else None
    f, z = training(10, trace=False, budget=disk)
    resume = tmp_path / "run" if where == "directory" else None
    chance, interrupted = random.Random(0), 0
    expected = f.metagradient(z)
    begin = time.perf_counter()
    f.metagradient(z, resume=resume)
    seconds = time.perf_counter() - begin
    before, stream = [(p, p.clone()) for p in f.model.parameters()], torch.get_rng_state()

    def interrupt(*_):
        raise Interrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(150 if full else 5):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + chance.random() * seconds)
                f.metagradient(z, resume=resume)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (Interrupt, RuntimeError) as error:  # torch's own code may meet the interrupt half-way
                found: BaseException | None = error
                while not isinstance(found, Interrupt):
                    assert found is not None, repr(error)
                    found = found.__context__
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert not _get_current_function_mode_stack()
            after = f.model.parameters()
            assert all(p is q and torch.equal(q, copy) for (p, copy), q in zip(before, after, strict=True))
            assert torch.equal(torch.get_rng_state(), stream)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert interrupted
    gc.collect()
    assert not list(tmp_path.glob("mgd-scratch-*"))
    assert same(f.metagradient(z, resume=resume), expected)
