"""The examples, and the page docs/descent.md, run and do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pages import run_page

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_learning_rate_knots(capsys):
    history = load("learning_rate_knots").main(steps=20, rounds=4)
    assert history[-1] < 0.9 * history[0]
    assert capsys.readouterr().out.count("held-out loss") == 4


def test_the_page_on_descent_runs_from_top_to_bottom():
    run_page("descent.md", blocks=3)


def test_the_page_on_rating():
    run_page("recipes/rate.md", blocks=1)
