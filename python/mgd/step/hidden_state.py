"""What a loss holds beside parameters and buffers, as far as it can be found: to call it once more and undo that."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from mgd.step.model import Binding

_PLAIN = (int, float, str, type(None), Tensor)  # bool is an int
_CONTAINERS = (list, dict, set)
_OF_TORCH = frozenset(vars(nn.Module()))


class HiddenState:
    """Numbers, text, tensors and containers among the attributes of modules and what the loss closes over or finds
    among its globals, and buffers that were None at first. Of containers, what they hold, and not what that holds."""

    def __init__(self, binding: Binding, function: Callable[..., Any]):
        modules = binding.modules
        self._bound = {id(x) for module in modules for of in (module._parameters, module._buffers) for x in of.values()}
        self._contents: list[tuple[Any, Any]] = []
        # A mapping, what it holds under these names, and all its names where others are to go.
        self._values: list[tuple[dict[str, Any], dict[str, Any], set[str] | None]] = []
        for module in modules:
            own = vars(module)
            self._values.append((own, self._kept(own, own.keys() - _OF_TORCH), set(own)))
        for registry, key, _ in binding.absent:
            self._values.append((registry, {key: registry.get(key)}, None))
        code, among = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        if code is not None:
            self._values.append((among, self._kept(among, among.keys() & set(code.co_names)), None))
        self._cells: list[tuple[types.CellType, Any]] = []
        for cell in getattr(function, "__closure__", None) or ():
            try:
                found = self._kept({"content": cell.cell_contents}, ["content"])
            except ValueError:  # it is empty
                continue
            self._cells += [(cell, x) for x in found.values()]

    def _kept(self, values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """The plain ones of these; containers are noted with what they hold."""
        found = {name: values[name] for name in names if name in values and id(values[name]) not in self._bound}
        for x in found.values():
            if type(x) in _CONTAINERS and not any(id(each) in self._bound for each in _held(x)):
                self._contents.append((x, x.copy()))
        return {name: x for name, x in found.items() if isinstance(x, _PLAIN)}

    def put_back(self) -> None:
        for mapping, values, names in self._values:
            for name in () if names is None else mapping.keys() - names:
                del mapping[name]
            mapping.update(values)
        for container, copy in self._contents:
            container.clear()
            container.extend(copy) if isinstance(container, list) else container.update(copy)
        for cell, content in self._cells:
            cell.cell_contents = content


def _held(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container
