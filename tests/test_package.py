"""What is shipped: the source distribution holds what a build needs, and bounds are those that are tested."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile

import pytest

import mgd
from pages import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_oldest_releases_are_those_that_the_project_allows():
    listed = PROJECT[PROJECT.index("\ndependencies = [") :].split("]", 1)[0]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed))
    oldest = dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text("utf-8"), re.MULTILINE)
    )
    assert set(bounds) == set(oldest)
    for name, bound in bounds.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", oldest[name]), name


def test_the_source_distribution_holds_what_a_build_needs(tmp_path):
    pytest.importorskip("scikit_build_core")
    build = "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.iterdir()
    assert archive.name == f"mgd_kernels-{mgd.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "mgd_kernels", "python"], cwd=ROOT, capture_output=True, text=True
    )
    needed = {*tracked.stdout.split(), "CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"}
    assert len(needed) > 100 and needed <= names, needed - names
    assert not [
        name for name in names if name.endswith((".so", ".pyc")) or name.startswith((".venv", "build", ".data"))
    ]


def test_the_package_is_built_and_tried_outside_this_folder():
    """`make package`: a compiler for minutes, so `make bench` runs it."""
    done = subprocess.run(["make", "package"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "most harmful examples have a wrong label" in done.stdout and f"mgd {mgd.__version__}" in done.stdout
