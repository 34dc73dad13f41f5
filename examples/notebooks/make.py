"""Writes the notebooks from the examples: `python examples/notebooks/make.py`. A test holds that they agree.

An example's docstring becomes the first cell, its imports the second, and the paragraphs of `main` the others.
"""

from __future__ import annotations

import ast
import json
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = ("noisy_labels", "learning_rate_knots")


def notebook(name: str) -> dict[str, Any]:
    """The notebook of an example, in nbformat 4.5, without outputs."""
    text = (HERE.parent / f"{name}.py").read_text("utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    words = (ast.get_docstring(tree) or "").split("\n\nRun: ")[0]
    title, rest = words.split("\n", 1)
    before = "\n".join(lines[tree.body[0].end_lineno : main.lineno - 1]).replace(
        "from __future__ import annotations", ""
    )
    given = [f"{a.arg} = {ast.unparse(d)}" for a, d in zip(main.args.args, main.args.defaults, strict=True)]
    *body, last = main.body
    if not isinstance(last, ast.Return) or last.value is None:
        raise ValueError(f"expected main of {name}.py to end with what it found")
    inside = textwrap.dedent("\n".join(lines[body[0].lineno - 1 : body[-1].end_lineno]))
    found = ast.get_source_segment(text, last.value) or ""
    code = [before, *_paragraphs("\n".join([*given, inside])), found]
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": f"# {title.rstrip('.')}\n{rest}".strip()},
        *(
            {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "source": part.strip()}
            for part in code
        ),
    ]
    numbered = [{"id": f"cell-{i}", **cell} for i, cell in enumerate(cells)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": numbered, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _paragraphs(text: str) -> list[str]:
    """Top-level statements, in groups that blank lines separate."""
    lines, groups, end = text.splitlines(), [], 0
    for node in ast.parse(text).body:
        gap = any(not line.strip() for line in lines[end : node.lineno - 1])
        part = "\n".join(lines[end : node.end_lineno]).strip("\n")
        if gap or not groups:
            groups.append(part)
        else:
            groups[-1] += "\n" + part
        end = node.end_lineno or end
    return groups


def text_of(name: str) -> str:
    return json.dumps(notebook(name), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in NAMES:
        (HERE / f"{name}.ipynb").write_text(text_of(name), "utf-8")
