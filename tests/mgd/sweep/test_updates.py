"""Parameters that some steps leave alone: a step's stretches do not depend on which steps were asked for before."""

import random

import torch

from mgd.ranks.ranks import Ranks
from mgd.ranks.shards import Shards
from mgd.sweep.updates import MOST_KNOWN, Updates
from mgd_kernels import AdamW, Arena


def test_stretches_are_those_of_a_fresh_look():
    shards = Shards(Ranks(), Arena({str(i): torch.zeros(3) for i in range(6)}), 1, True)
    draw, used = random.Random(0), Updates(AdamW(), shards, {"2": 1})
    for t in range(2 * MOST_KNOWN):
        used.skip(t, [i for i in range(6 if t > 20 else 4) if draw.random() < 0.3])  # later ones join in
        for step in (t, t + 1, draw.randrange(t + 1)):
            fresh = Updates(AdamW(), shards, {"2": 1})
            fresh.restore(used.record())
            lags, skipped = fresh._lags(step), set(fresh._skipped.get(step, ()))
            assert used._stretches(step) == fresh._stretches(step) == fresh._found(lags, skipped)
    assert len(used._known) <= MOST_KNOWN
