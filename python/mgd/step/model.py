"""The user's model as a function of parameters and buffers that are held elsewhere.

The model's own tensors are replaced while the loss or the objective runs and are put back afterwards, even after an
exception. Tied tensors are replaced everywhere they occur.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mgd.errors import BadArgument, BadLoss
from mgd.step.overrides import FunctionOverrides

Buffers = dict[str, Tensor]


class Binding:
    """A model, with all the places where its trainable parameters and its buffers occur.

    names: those of the trainable parameters (`requires_grad`), each once. Frozen ones stay in the model as constants.
    """

    def __init__(self, model: nn.Module):
        self.model, self.modules = model, list(model.modules())
        parameters, self._buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self._trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        self.names, self.buffer_names = tuple(self._trainable), tuple(self._buffers)
        self.frozen = [p for p in parameters.values() if not p.requires_grad]
        for name, p in self._trainable.items():
            if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
                raise BadArgument(
                    f"expected parameters without hooks; {name!r} has one. A training works on copies of parameters, "
                    "which have none: put what the hook does into the loss, or into a hook of the module."
                )
        self._parameter_places = self._places(list(self._trainable.values()), "_parameters")
        self._buffer_places = self._places(list(self._buffers.values()), "_buffers")
        self.absent = [
            (module._buffers, key, f"{name}.{key}".lstrip("."))
            for name, module in model.named_modules()
            for key, buffer in module._buffers.items()
            if buffer is None
        ]
        self._last: dict[str, Tensor] = {}
        self._read: set[str] = set()
        self._varies: set[str] = set()

    def _places(self, tensors: Sequence[Tensor], attribute: str) -> list[tuple[dict[str, Any], str, int]]:
        """`(the module's dict, key, index into tensors)` for every place where one of the tensors occurs."""
        index = {id(tensor): i for i, tensor in enumerate(tensors)}
        return [
            (getattr(module, attribute), key, index[id(tensor)])
            for module in self.modules
            for key, tensor in getattr(module, attribute).items()
            if tensor is not None and id(tensor) in index
        ]

    def parameters(self) -> dict[str, Tensor]:
        """The model's own trainable parameters, by name."""
        return dict(self._trainable)

    def buffers(self) -> Buffers:
        """Copies of the model's buffers, by name."""
        return {name: b.detach().clone() for name, b in self._buffers.items()}

    @contextlib.contextmanager
    def swapped(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[None]:
        """Inside the block, the model holds these tensors instead of its own."""
        originals = []
        try:
            for places, tensors in ((self._parameter_places, parameters), (self._buffer_places, buffers)):
                for owner, key, i in places:
                    originals.append((owner, key, owner[key]))
                    owner[key] = tensors[i]
            yield
        finally:
            for owner, key, tensor in originals:
                owner[key] = tensor

    def assigned(self) -> dict[str, Tensor]:
        """What the model holds now as buffers that were None at first, by name."""
        return {name: x for registry, key, name in self.absent if (x := registry.get(key)) is not None}

    def look_at_assigned(self, read: Collection[str]) -> None:
        """Raises BadLoss if a buffer that was None at first varies and is read: a training carries on the others only.

        read: those whose values before it a call of the model just now read. Tables may grow with the input.
        """
        self._read.update(read)
        for name, x in self.assigned().items():
            last = self._last.get(name)
            grown = last is None or _grown(last, x, name in read)
            if x.requires_grad or not grown:
                self._varies.add(name)
            if last is None or not grown or x.shape != last.shape:
                self._last[name] = x.detach().clone()
            if name in self._read and name in self._varies:
                raise BadLoss(
                    f"expected buffers that hold a tensor before the training; {name!r} was None, steps give it "
                    "different values, and they are read. Register it with a tensor: then it is part of the "
                    "training's state."
                )

    def holds(self, buffers: Sequence[Tensor]) -> bool:
        """Whether the model holds these very buffers, by `buffer_names`."""
        return all([owner[key] is buffers[i] for owner, key, i in self._buffer_places])

    def call(
        self,
        function: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        buffers: Buffers,
        *args: Any,
        until: contextlib.ExitStack | None = None,
        overrides: FunctionOverrides | None = None,
    ) -> tuple[Tensor, Buffers]:
        """`function(model, *args)` with these parameters and buffers, and the buffers as the model leaves them.

        The model may change the tensors in `buffers` in place, so pass copies.
        until: the model holds the tensors until this stack is closed. If the function may use activation checkpointing,
        which calls the model again, the backward pass must run before that.
        """
        tensors = [buffers[name] for name in self.buffer_names]
        with contextlib.ExitStack() as own:
            stack = own if until is None else until
            stack.enter_context(self.swapped(parameters, tensors))
            overrides = stack.enter_context(overrides or FunctionOverrides(formulas=False))
            carried = self.assigned()
            overrides.carried = list(carried.values())
            overrides.in_loss = True
            value = function(self.model, *args)
            overrides.in_loss = False
            if self.absent:
                self.look_at_assigned([name for name, x in carried.items() if id(x) in overrides.read])
            for owner, key, i in self._buffer_places:
                tensors[i] = owner[key]  # the model may have replaced it
        return value, dict(zip(self.buffer_names, tensors, strict=True))


def _grown(last: Tensor, x: Tensor, read: bool) -> bool:
    """Whether x has the values of `last`, and maybe more that were not made from it. read: whether that was."""
    if x.device.type == "meta":
        return True
    if x.layout is not torch.strided:
        last, x = last.to_dense(), x.to_dense()
    if (x.ndim, x.dtype, x.device) != (last.ndim, last.dtype, last.device) or (read and x.shape != last.shape):
        return False
    shown = tuple(map(slice, map(min, zip(last.shape, x.shape, strict=True))))
    a, b = last[shown], x.detach()[shown]
    return bool(((a == b) | ((a != a) & (b != b))).all())


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the `training` flag of every module at the end of the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def model_kept(model: nn.Module) -> Iterator[None]:
    """Restore every module's parameter and buffer objects, and its `training` flag, at the end of the block."""
    registries: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (registry, dict(registry)) for module in model.modules() for registry in (module._parameters, module._buffers)
    ]
    with modes_kept(model):
        try:
            yield
        finally:
            for registry, before in registries:
                registry.clear()
                registry.update(before)


def differentiable(buffers: Mapping[str, Tensor]) -> list[str]:
    """The names of the buffers that can carry an adjoint."""
    return [name for name, buffer in buffers.items() if buffer.is_floating_point()]
