"""The notebooks are those that the examples make, and a kernel executes them."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_notebooks", NOTEBOOKS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebooks_are_those_of_the_examples(make):
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(make.NAMES)
    for name in make.NAMES:
        assert (NOTEBOOKS / f"{name}.ipynb").read_text("utf-8") == make.text_of(name), (
            "python examples/notebooks/make.py"
        )


@pytest.mark.filterwarnings("ignore")  # of Jupyter's packages
@pytest.mark.parametrize(
    "name, holds",
    [
        ("noisy_labels", lambda found: found["found"] > 0.6 and found["after"] > found["before"]),
        ("learning_rate_knots", lambda found: found["best"] < 0.5 * found["first"]),
    ],
)
def test_the_notebook_is_executed(name, holds):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    # As the example's own test: one thread.
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import torch; torch.set_num_threads(1)"))
    nbclient.NotebookClient(notebook, timeout=300).execute()
    (last,) = notebook.cells[-1].outputs
    assert holds(ast.literal_eval(last["data"]["text/plain"]))
    assert json.loads((NOTEBOOKS / f"{name}.ipynb").read_text("utf-8"))["cells"][-1]["outputs"] == []  # none committed
