"""One of several processes is killed: the others say so and end, and the same call then gives the same bits."""

from __future__ import annotations

import random
import signal

import pytest
import rank_victim
import torch
from torch.utils._pytree import tree_flatten

from mgd_kernels import _core

KILLS = {False: 1, True: 20}  # by whether the attack is in full size
CHANGES = 60  # calls that change a rank's disk, about, in a run of which nothing is left


@pytest.fixture(scope="module")
def reference():
    """What one process finds."""
    return tree_flatten(rank_victim.metagradient())


def right(folder, size, reference):
    for rank in range(size):
        found, spec = tree_flatten(torch.load(folder / f"{rank}.pt"))
        assert spec == reference[1] and all(map(torch.equal, found, reference[0]))


@pytest.mark.filterwarnings("ignore")
def test_one_rank_is_killed_at_random(tmp_path, full, reference):
    if not hasattr(_core, "store_inject"):
        pytest.skip("the extension was built without the CMake option MGD_FAULT_INJECTION")
    rng, died, before = random.Random(0), 0, rank_victim.shared_memory()
    for i in range(KILLS[full]):
        directory = tmp_path / str(i)
        kind = ("step", "change")[i % 2]
        moment = rng.randrange(2), kind, rng.randrange(1, 12 if kind == "step" else CHANGES)
        codes = rank_victim.run(2, tmp_path / f"{i} killed", directory, moment)
        if codes == [0, 0]:
            right(tmp_path / f"{i} killed", 2, reference)  # it was done before
        else:
            other = 1 - moment[0]
            assert (codes[moment[0]], codes[other]) == (-signal.SIGKILL, 0), (moment, codes)
            text = (tmp_path / f"{i} killed" / f"{other}.txt").read_text()
            assert text.startswith("RankFailed") and f"rank {moment[0]} died" in text, (moment, text)
            died += 1
            size = rng.choice([2, 2, 4])
            assert rank_victim.run(size, tmp_path / f"{i} resumed", directory) == [0] * size, moment
            right(tmp_path / f"{i} resumed", size, reference)
        assert list(directory.iterdir()) == [], moment
        assert rank_victim.left_running() == []
    assert died >= 0.8 * KILLS[full]
    assert rank_victim.shared_memory() <= before
