"""The layers of the package, read from its source: who may import whom, and how large a file may be."""

from __future__ import annotations

import ast
import statistics
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"mgd": ROOT / "python" / "mgd", "mgd_kernels": ROOT / "mgd_kernels"}
FOLDERS = ["python", "mgd_kernels", "tests", "benchmarks", "examples"]

# A room is a package or a module directly in python/mgd. Each may import the rooms named beside it, and itself.
# Imports inside functions and under TYPE_CHECKING count, too. "mgd" is the public interface, `mgd/__init__.py`.
ENGINE = "errors util ranks plan step results autodiff sweep identity function"
PUBLIC = f"{ENGINE} check diagnose tasks schedules integrations descent attribution rater"
MAY_IMPORT = {
    "errors": "",
    "util": "errors",
    "plan": "errors util",
    "ranks": "errors util",
    "step": "errors util plan ranks",
    "results": "errors util plan",
    "autodiff": "errors util plan ranks step",
    "sweep": "errors util plan ranks step results",  # not autodiff: a sweep is handed a step that knows its derivatives
    "identity": "errors util step autodiff",
    "function": "errors util ranks plan step results autodiff sweep identity",
    "check": ENGINE,
    "diagnose": f"{ENGINE} check",
    "tasks": ENGINE,
    "schedules": ENGINE,
    "integrations": f"{ENGINE} check schedules",
    "descent": f"{ENGINE} check schedules",
    "attribution": f"{ENGINE} check schedules",
    "rater": f"{ENGINE} check schedules",
    "mgd": PUBLIC,
    "ui": "errors util",
    "recipes.data": f"mgd {PUBLIC} ui",
    "recipes.models": f"mgd {PUBLIC} ui recipes.data",
    "recipes": f"mgd {PUBLIC} ui recipes.data recipes.models",
    "bench": f"mgd {PUBLIC} ui recipes.data recipes.models",
    "cli": f"mgd {PUBLIC} ui recipes.data recipes.models recipes bench",
}


@cache
def sources() -> dict[str, Path]:
    """Module names of both packages with their files."""
    return {
        ".".join((name, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
        for name, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*.py"))
    }


def python_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), path.name)


def imported_by(module: str, path: Path) -> set[str]:
    """The modules of either package that are named in import statements anywhere in the file."""
    modules, targets = sources(), set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                # What is compiled is no source file, and imports nothing.
                targets.add(submodule if submodule in modules or alias.name == "_core" else base)
    return {target for target in targets if target in modules}


@cache
def graph() -> dict[str, set[str]]:
    return {module: imported_by(module, path) for module, path in sources().items()}


def room(module: str) -> str:
    _, *parts = module.split(".")
    joined = ".".join(parts[:2])
    return joined if joined in MAY_IMPORT else parts[0] if parts else "mgd"


def is_kernels(module: str) -> bool:
    return module.split(".")[0] == "mgd_kernels"


def test_every_room_has_its_place():
    assert {room(module) for module in graph() if not is_kernels(module)} == set(MAY_IMPORT)


def test_rooms_import_lower_ones_only():
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        if not is_kernels(module)
        for target in sorted(targets)
        if not is_kernels(target) and room(target) not in (room(module), *MAY_IMPORT[room(module)].split())
    ]
    assert not wrong, "\n".join(wrong)


def test_the_kernels_stand_alone():
    wrong = [f"{m} imports {t}" for m, ts in graph().items() if is_kernels(m) for t in ts if not is_kernels(t)]
    assert not wrong, "\n".join(wrong)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in index:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], index[target])
        if lowest[node] == index[node]:
            start = stack.index(node)
            components.append(sorted(stack[start:]))
            del stack[start:]

    for node in edges:
        if node not in index:
            visit(node)
    return sorted(component for component in components if len(component) > 1)


def test_circles_are_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f", "a"}, "f": {"e"}}
    assert circles(edges) == [["b", "c"], ["e", "f"]]


def test_no_modules_import_each_other():
    wrong = circles(graph())
    assert not wrong, "\n".join(", ".join(component) for component in wrong)


def test_few_modules_stand_outside_the_rooms():
    assert len(list(PACKAGES["mgd"].glob("*.py"))) <= 12


def test_files_are_short():
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in python_files()}
    wrong = [f"{path.relative_to(ROOT)}: {length} lines" for path, length in lengths.items() if length > 400]
    assert not wrong, "\n".join(wrong)
    assert statistics.median(lengths.values()) < 200


def test_every_file_says_what_it_is():
    wrong = [str(path.relative_to(ROOT)) for path in python_files() if not ast.get_docstring(tree(path))]
    assert not wrong, "\n".join(wrong)


def test_every_package_says_what_it_looks_into():
    wrong = []
    for path in sources().values():
        words = (ast.get_docstring(tree(path)) or "").split()
        if path.name == "__init__.py" and path.parents[1].name != "recipes" and "look" not in " ".join(words).lower():
            wrong.append(str(path.relative_to(ROOT)))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line, target",
    [
        ("from mgd.plan import plan", "mgd.plan.plan"),
        ("def f():\n    import mgd.plan.plan", "mgd.plan.plan"),
        ("if TYPE_CHECKING:\n    from mgd.plan.plan import Plan", "mgd.plan.plan"),
        ("from .plan import Plan", "mgd.plan.plan"),
        ("from . import plan", "mgd.plan.plan"),
        ("from ..errors import BadData", "mgd.errors"),
        ("from mgd import TrainingFunction", "mgd"),
    ],
)
def test_imports_are_found_wherever_they_stand(tmp_path, line, target):
    path = tmp_path / "module.py"
    path.write_text(line)
    assert imported_by("mgd.plan.module", path) == {target}
