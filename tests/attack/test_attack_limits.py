"""A system that refuses files, room or lists: an error, and afterwards the same call gives the right number."""

from __future__ import annotations

import shutil

import pytest

ALWAYS = 1 << 40


@pytest.fixture(scope="module")
def begun(tmp_path_factory, victim):
    """The directory of a run that was killed in its reverse sweep."""
    directory = tmp_path_factory.mktemp("begun") / "run"
    assert victim.run(directory, stop=10)["signal"] == 9
    return directory


def starved(victim, directory, **request) -> str:
    """What comes of the run under limits; without them it then comes to its end."""
    answer = victim.run(directory, **request)
    assert answer["signal"] == 0 and answer["outcome"] in ("right", "StoreIOError"), answer
    if answer["outcome"] != "right":
        assert str(directory) in answer["text"]
    assert victim.run(directory)["outcome"] == "right"
    return answer["outcome"]


def test_few_open_files(tmp_path, victim, full, begun):
    outcomes = []
    for limit in range(4, 24, 1 if full else 4):
        shutil.copytree(begun, tmp_path / str(limit))
        outcomes.append(starved(victim, tmp_path / str(limit), limits={"RLIMIT_NOFILE": limit}))
    assert {"right", "StoreIOError"} == set(outcomes)


@pytest.mark.parametrize("new", [True, False])
def test_small_files_only(tmp_path, victim, full, begun, new):
    outcomes = []
    sizes = [0, 1, 60, 200, 4096, 5000, 8192, 12288, 16384] if full else [0, 4096, 8192]
    for size in sizes:
        if not new:
            shutil.copytree(begun, tmp_path / str(size))
        outcomes.append(starved(victim, tmp_path / str(size), limits={"RLIMIT_FSIZE": size}))
    assert outcomes[0] == "StoreIOError"


@pytest.mark.parametrize(
    "kind", ["list_error", "thread_error", "no_space", "write_error", "sync_error", "rename_error"]
)
def test_one_call_that_fails(tmp_path, victim, full, begun, kind):
    """Nothing of the run is lost: what cannot be listed or opened is not taken for empty."""
    outcomes = []
    for nth in range(1, 40 if full else 4):
        shutil.copytree(begun, tmp_path / str(nth))
        outcomes.append(starved(victim, tmp_path / str(nth), fault=[kind, nth, ALWAYS]))
    assert outcomes[0] == "StoreIOError"


def test_a_directory_that_cannot_be_listed_is_not_empty(tmp_path, victim, begun):
    shutil.copytree(begun, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in begun.iterdir() if path.name != "LOCK"}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("theirs")
    for name in ("run", "theirs"):
        answer = victim.run(tmp_path / name, fault=["list_error", 1, ALWAYS])
        assert answer["outcome"] == "StoreIOError" and "list" in answer["text"], answer
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "LOCK"} == before
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.tex"]
