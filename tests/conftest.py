"""One thread for all tests, and the fast ones among them: `pytest --fast`, or `make test-fast`.

tests/durations.txt lists the tests that are long, about 0.3 s or more; every other test is fast. It lists slow ones,
too: evidence that belongs in `make bench`, which the ordinary suite leaves out.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

# The models are small, and threads that wait for each other cost more than they compute.
torch.set_num_threads(1)

TESTS = Path(__file__).parent
PACKAGES = [TESTS.parent / "python" / "mgd", TESTS.parent / "mgd_kernels"]
hypothesis.settings.register_profile("fast", max_examples=10)


def listed() -> dict[str, str]:
    """The marker of each `file::name`: of the test of that name, or of the tests that use the fixture of that name."""
    lines = (TESTS / "durations.txt").read_text("utf-8").splitlines()
    entries = [line.split() for line in lines if line and not line.startswith("#")]
    return {name: marker for marker, name in entries}


MARKERS = listed()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="run the tests that are neither long nor slow")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.fast:
        config.option.markexpr = "not long and not slow"
        hypothesis.settings.load_profile("fast")


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_itemcollected(item: pytest.Item) -> None:
    for name in (getattr(item, "originalname", item.name), *getattr(item, "fixturenames", ())):
        if marker := MARKERS.get(f"{item.path.name}::{name}"):
            item.add_marker(marker)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first: of several processes, none has such a file left when the others are done."""
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in long)


TOUCHED: set[str] = set()  # the files of the modules that the processes of this run imported


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The fast tests, run as a whole, must have imported every module of the packages."""
    config = session.config
    TOUCHED.update(file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None)))
    if hasattr(config, "workeroutput"):  # one of several processes: the one that started them judges
        config.workeroutput["touched"] = sorted(TOUCHED)
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    if not (whole and config.option.fast and session.exitstatus == pytest.ExitCode.OK):
        return
    paths = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
    if missing := [str(path) for path in paths if str(path) not in TOUCHED]:
        print("\n\nNo fast test imports:", *missing, sep="\n")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node, error) -> None:
    TOUCHED.update(getattr(node, "workeroutput", {}).get("touched", ()))
