"""A file is replaced as a whole, and never through a link."""

from __future__ import annotations

import json
import os

import pytest

from mgd.errors import BadArgument, StoreIOError
from mgd.ui.page import Page, write
from mgd.ui.result import write_json
from mgd.util.files import write_file


def test_a_file_and_its_folder_are_made_and_replaced(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_file(path, "one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two" and list(path.parent.iterdir()) == [path]


def test_a_private_file_is_for_its_user_alone(tmp_path):
    umask = os.umask(0o022)
    try:
        write_file(tmp_path / "private", "x", private=True)
        write_file(tmp_path / "public", "x")
    finally:
        os.umask(umask)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "public").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error, expected", [(OSError(28, "full"), StoreIOError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, error, expected):
    path = tmp_path / "file"
    write_file(path, "old")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(expected):
        write_file(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("target", ["precious", "nowhere"])
@pytest.mark.parametrize(
    "export",
    [
        lambda path: write_file(path, "x"),
        lambda path: write_json(path, "mgd", {}),
        lambda path: write(Page("title", "lead"), path.parent),
    ],
)
def test_links_are_left_alone(tmp_path, target, export):
    (tmp_path / "precious").write_text("mine")
    path = tmp_path / "out" / "index.html"
    path.parent.mkdir()
    path.symlink_to(tmp_path / target)
    with pytest.raises(BadArgument, match="got a link"):
        export(path)
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "nowhere").exists()
    assert path.is_symlink()


def test_folders_and_devices_are_left_alone(tmp_path):
    for path in (tmp_path, "/dev/null"):
        with pytest.raises(BadArgument, match="a folder or a device"):
            write_file(path, "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreIOError, match="cannot write"):
        write_file(tmp_path / "file" / "below", "x")


def test_a_result_is_json(tmp_path):
    write_json(tmp_path / "result.json", "mgd", {"x": float("nan"), 1: (2,)})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["x"] is None and result["1"] == [2]
