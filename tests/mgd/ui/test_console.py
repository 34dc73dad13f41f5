"""What all commands share: tables, the status line, pages, JSON, and options as words."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

import mgd.ui
from mgd.errors import BadArgument
from mgd.ui.console import Session, print_table
from mgd.ui.options import parse_count, parse_names
from mgd.ui.page import Page, Section, write
from mgd.ui.result import documented, provenance


def test_no_module_of_the_room_imports_a_heavy_package():
    folder = Path(mgd.ui.__file__).parent
    modules = sorted(f"mgd.ui.{file.stem}" for file in folder.glob("*.py") if file.stem != "__init__")
    code = (
        "import sys, types; package = types.ModuleType('mgd');"
        f"package.__path__ = [{str(folder.parent)!r}]; sys.modules['mgd'] = package;"
        f"import {', '.join(modules)}; print(sorted({{'torch', 'numpy', 'matplotlib'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(modules) >= 6 and done.stdout.strip() == "[]"


def test_numbers_stay_whole_and_texts_wrap_where_there_is_little_room():
    console = Console(width=50, record=True, file=io.StringIO())
    words = "a long description of what was measured, which does not fit on one line"
    print_table(console, "Times", [["", "seconds", "share [%]"], [words, "1,234.5", "[99]"]])
    text = console.export_text()
    assert "1,234.5" in text and "[99]" in text and "share [%]" in text and "…" not in text
    assert " ".join(line[:28].strip() for line in text.splitlines()[4:]).strip("─ ") == words


def test_the_status_names_each_thing_measured_once(capsys):
    with Session("nothing").status() as tick:
        for what in ("a, round 1", "a, round 2", "b"):
            tick(what)
    assert capsys.readouterr().out == "measuring a ...\nmeasuring b ...\n"


def test_a_session_writes_what_was_asked_for(capsys, tmp_path):
    page = Page("A title", "A lead [sic].", [("Numbers", [["", "n"], ["x", "1"]])], lambda: [Section("Part")], "Done.")
    session = Session("test", tmp_path / "page", tmp_path / "result.json")
    session.finish(page, {"value": float("nan"), "pair": (1, 2)})
    out = capsys.readouterr().out
    assert "A lead [sic]." in out and "Numbers" in out and "Done." in out
    assert out.count("wrote ") == 2 and str(tmp_path / "result.json") in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"] == "test" and result["value"] is None and result["pair"] == [1, 2]
    assert "<h2>Part</h2>" in (tmp_path / "page" / "index.html").read_text()


def test_without_a_folder_no_picture_is_drawn(capsys):
    page = Page("t", "l", sections=lambda: pytest.fail("drawn"))
    Session("test").finish(page, {})
    assert "l" in capsys.readouterr().out


def test_a_page_escapes_its_texts_and_keeps_the_lines_of_a_listing(tmp_path):
    figure = types.SimpleNamespace(savefig=lambda file, format: file.write(b"png"))
    sections = [Section("a < b", "one\n\ntwo", figure, "f", [["", "x"], ["y", "<1"]], "1  2\n3  4")]
    index, picture = write(Page("T & U", "lead", sections=lambda: sections), tmp_path / "new")
    text = index.read_text("utf-8")
    for part in (
        "T &amp; U",
        "a &lt; b",
        "<p>one</p>",
        "<p>two</p>",
        '<td class="whole">&lt;1</td>',
        "<pre>1  2\n3  4</pre>",
    ):
        assert part in text
    assert picture.name == "f.png" and picture.read_bytes() == b"png" and "<footer>" not in text


def test_a_page_says_how_it_came_about(monkeypatch, tmp_path):
    result = {"settings": {"seed": 3}, "data": {"name": "digits"}}
    Session("recipe rate", tmp_path).write(Page("t", "l"), result)
    foot = (tmp_path / "index.html").read_text("utf-8").partition("<footer>")[2]
    assert foot.startswith("mgd recipe rate<br>mgd-kernels ") and "seed 3, data: digits" in foot
    monkeypatch.setattr(sys, "argv", ["/bin/mgd", "recipe", "rate", "--out", "a b"])
    assert provenance("recipe rate", {}).startswith("mgd recipe rate --out 'a b'\n")


def test_every_command_with_a_page_is_documented():
    root = Path(__file__).resolve().parents[3]
    recipes = [f"recipe {file.stem}" for file in (root / "docs/recipes").glob("*.md") if file.stem != "README"]
    assert len(recipes) >= 6
    for command in (*recipes, "demo", "plan", "bench kernels"):
        assert (root / documented(command)).is_file(), command


def test_names_and_counts_are_read_as_people_write_them():
    assert parse_names("a, c,", ("a", "b", "c"), "letters") == ["a", "c"]
    with pytest.raises(BadArgument, match="expected letters among a, b, c; got d, e"):
        parse_names("a,d,e", ("a", "b", "c"), "letters")
    assert parse_count("1.5b") == 1_500_000_000
    with pytest.raises(BadArgument, match="expected a number of parameters such as"):
        parse_count("x")
