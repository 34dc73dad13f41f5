"""An extension of griffe: in docstrings, lines such as `loss: what it is` become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): +(?=\S)")


class Lists(griffe.Extension):
    """Applies to paragraphs that begin with a parameter or an attribute of the object, and a colon."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None or not (obj.is_class or obj.is_function):
            return
        names = set(obj.members) if obj.is_class else set()
        function = obj.members.get("__init__") if obj.is_class else obj
        if isinstance(function, griffe.Function):
            names |= {parameter.name for parameter in function.parameters}
        paragraphs = obj.docstring.value.split("\n\n")
        obj.docstring.value = "\n\n".join(listed(paragraph, names) for paragraph in paragraphs)


def listed(paragraph: str, names: set[str]) -> str:
    """The paragraph, as a list of its items where it begins with one. Text before the first item stays above."""
    items: list[str] = []
    head: list[str] = []
    for line in paragraph.splitlines():
        match = ITEM.match(line)
        if match and set(match[1].split(", ")) <= names:
            items.append(f"- **{match[1]}**: {line[match.end() :]}")
        elif items:
            items.append("  " + line.strip())
        else:
            head.append(line)
    return "\n".join([*head, *([""] if head and items else []), *items])
