"""Hooks of mkdocs: pages from outside docs/, links between them, and no hidden code."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {"CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md", "benchmarks/NOTES.md": "NOTES.md"}

CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
HIDDEN = re.compile(r"^<!-- (setup\n.*?\n|not run: [^>]+ )-->\n", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    for source, name in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links go where a page stands in the site; a link to a file that is no page of it becomes its text."""
    name = page.file.src_uri
    source = next((path for path, given in OUTSIDE.items() if given == name), f"docs/{name}")

    def relinked(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if there is None:
            return text
        return f"[{text}]({posixpath.relpath(there, posixpath.dirname(name) or '.')}{anchor})"

    parts = CODE.split(HIDDEN.sub("", markdown))  # text, code, text, ...
    return "".join(LINK.sub(relinked, part) if number % 2 == 0 else part for number, part in enumerate(parts))
