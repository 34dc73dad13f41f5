"""The search for the fastest layout, where it can be spared."""

from __future__ import annotations

import random

from mgd.plan.budget import Budget, Costs, Sizes
from mgd.plan.plan import plan
from mgd.plan.search import Search


def test_a_full_log_without_a_rival_is_what_the_search_finds(monkeypatch):
    draw, spared = random.Random(0), 0
    unrivalled = Search.unrivalled
    for _ in range(200):
        sizes = Sizes(draw.choice((100, 3_000, 10**6)), draw.choice((50, 1_000)))
        step = 10 ** draw.uniform(-5, -2)
        costs = Costs(step=step, hvp=step * draw.uniform(0.5, 4), update=step * 10 ** draw.uniform(-3, 0.5))
        T, room = draw.randint(2, 40), draw.choice((10**4, 10**5, 10**9))
        request = T, sizes, Budget(host=room + sizes.snapshot), costs
        answers: list[bool] = []

        def noting(search, layout, answers=answers):
            answers.append(unrivalled(search, layout))
            return answers[-1]

        monkeypatch.setattr(Search, "unrivalled", noting)
        short = plan(*request)
        monkeypatch.setattr(Search, "unrivalled", lambda search, layout: False)
        assert short.to_dict() == plan(*request).to_dict()
        spared += any(answers)
    assert 50 < spared < 200  # both ways were taken
