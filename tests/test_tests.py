"""The test files themselves: their names, what they import, and the list of those that are not fast."""

import ast
import re
from itertools import chain
from pathlib import Path

FOLDER = Path(__file__).parent
TESTS = sorted(FOLDER.rglob("test_*.py"))


def test_test_files_have_names_of_their_own():
    names = [path.name for path in TESTS]
    assert not {name for name in names if names.count(name) > 1}


def test_no_test_imports_another():
    names = {path.stem for path in TESTS}
    wrong = []
    for path in TESTS:
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        modules = chain(
            (node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)),
            (alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names),
        )
        wrong += [f"{path.relative_to(FOLDER)}: {name}" for name in modules if name.rpartition(".")[2] in names]
    assert not wrong, "\n".join(wrong)


def test_what_is_listed_as_long_or_slow_is_there():
    sources = {path.name: path.read_text("utf-8") for path in TESTS}
    wrong = []
    for line in (FOLDER / "durations.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            marker, entry = line.split()
            file, name = entry.split("::")
            if marker not in ("long", "slow") or not re.search(rf"def {name}\(", sources.get(file, "")):
                wrong.append(line)
    assert not wrong, "\n".join(wrong)
