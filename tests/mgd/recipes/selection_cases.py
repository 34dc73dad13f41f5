"""A small selection problem, and what every run of the recipe `select` must give."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mgd.recipes.select import SelectionProblem, report
from mgd.recipes.select import run as recipe
from mgd.ui.page import write
from mgd_kernels import AdamW

N, STEPS, B, AT = 12, 9, 4, 5


def problem(**changes) -> SelectionProblem:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(N, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    arguments = {
        "model": model,
        "pool": (x, y),
        "losses": lambda model, examples: (model(examples[0])[:, 0] - examples[1]).square(),
        "objective": lambda model: model(x[:5]).square().mean(),
        "optimizer": AdamW(lr=0.05, eps_root=1e-6),
        "steps": STEPS,
        "batch_size": B,
        "at": AT,
    }
    return SelectionProblem(**(arguments | changes))


def complete(found) -> None:
    settings = found.setting.settings
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert report["setting"] == found.setting.name
    assert len(report["trace"]) == settings.meta_steps
    assert sum(report["data"]["pool"].values()) == settings.pool
    assert set(report["choices"]) == set(found.choices) and len(report["choices"]) == 7
    for choice in report["choices"].values():
        assert len(choice["accuracies"]) == settings.repeats
        assert all(len(values) == settings.repeats for values in choice["further"].values())
    selected = report["choices"][recipe.SELECTED]
    kept = {kind: sum(numbers[1:]) for kind, numbers in report["counts_by_kind"].items()}
    assert sum(kept.values()) == selected["examples"] == len(found.selection.kept)
    assert report["gain_in_accuracy"][recipe.ALL] == pytest.approx(
        selected["accuracy"] - report["choices"][recipe.ALL]["accuracy"]
    )


def kept_by_kind(found) -> list[float]:
    """The share of each kind's examples that is used."""
    counts, kind = found.selection.counts, found.setting.kind
    return [float((counts[kind == i] > 0).double().mean()) for i in range(len(found.setting.kinds))]


def written(found, folder, pictures: set[str]) -> None:
    from matplotlib.image import imread

    paths = write(report.page(found), folder)
    assert {path.stem for path in paths} == pictures | {"index"}
    assert all(imread(path)[..., :3].std() > 0.02 for path in paths[1:])
