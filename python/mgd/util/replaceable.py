"""Objects that are made anew from the arguments of their constructor, with some of them changed."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class Replaceable:
    """Of a subclass, every argument of the constructor is an attribute of the same name."""

    def replaced(self, **changes: Any) -> Self:
        """The same with other values of some of the constructor's arguments."""
        return _made(type(self), self._arguments() | changes)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, also one by pickle, is made anew: it has nothing yet of what calls leave behind."""
        return _made, (type(self), self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}


def _made(kind: type[Any], arguments: dict[str, Any]) -> Any:
    return kind(**arguments)
