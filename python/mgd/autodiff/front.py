"""The user's loss as a graph, captured by Dynamo: sound about Python, which a plain trace freezes.

Dynamo executes the loss symbolically and guards everything that it took for granted: shapes, modes, globals,
attributes, numbers. Where a guard fails it captures again. So a graph that runs is the loss; what Dynamo does not
understand, it refuses. Side effects of the loss (attributes, counters) are repeated by the code that it generates
around the graph.
"""

from __future__ import annotations

import itertools
import logging
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._device import DeviceContext

from mgd.step.overrides import FunctionOverrides
from mgd.step.written_out import data_of

# run(graph, its arguments) -> its outputs, real values: the first is the loss
Run = Callable[["CapturedGraph", Sequence[Any]], Sequence[Any]]

# Dynamo's guards of a function, and the code that it made for where they hold
Known = tuple[Any, Callable[..., Any]]

MOST_GRAPHS = 16  # of one loss
_GLOBAL_HOOKS = [
    getattr(torch.nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]
_HIGHER_ORDER = torch.ops.higher_order
_count = itertools.count()


def unheard() -> str | None:
    """What is active that changes a loss, and that neither Dynamo nor its graphs hear of."""
    if any(_GLOBAL_HOOKS):  # it takes note of hooks of a module, but not of those of all modules
        return "there were hooks of all modules"
    if torch._C._len_torch_function_stack() and not all(
        isinstance(mode, (DeviceContext, FunctionOverrides))
        for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return "there was a TorchFunctionMode"
    return None


# Of each class that a loss may use, itself and the functions that it defines, with their code
Methods = list[Any]


def methods_of(model: torch.nn.Module, loss: Callable[..., Any]) -> Methods:
    """What Dynamo takes for granted without a guard: libraries put other methods into classes. The classes are those of
    the model and the loss, of their modules, and of these modules' attributes."""
    around = [getattr(loss, name, None) for name in ("func", "__self__")]  # of a partial function, of a method
    inside = [loss, *around, *[cell.cell_contents for cell in _cells(loss)]]
    roots = [model, *[x for x in inside if isinstance(x, torch.nn.Module)]]
    modules = [module for root in roots for module in root.modules()]
    objects = itertools.chain(modules, inside, *[vars(module).values() for module in modules])
    found: list[Any] = []
    for each in dict.fromkeys(itertools.chain.from_iterable(map(_mro, dict.fromkeys(map(type, objects))))):
        found.append(weakref.ref(each))
        for name, x in vars(each).items():
            if each is torch.nn.Module and name in _REPLACED:
                continue
            x = x.fget if isinstance(x, property) else getattr(x, "__func__", x)
            if isinstance(x, types.FunctionType):
                found += [weakref.ref(x), id(x.__code__)]
    return found


def _mro(kind: type) -> tuple[type, ...]:
    return kind.__mro__ if kind.__flags__ & _HEAP else ()  # nobody changes those of C


_REPLACED = "__init__", "__setstate__"  # of nn.Module, by Dynamo itself at its first capture
_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def _cells(loss: Any) -> list[types.CellType]:
    """Of a function's closure, those that have something in them."""
    return [cell for cell in getattr(loss, "__closure__", None) or () if _is_full(cell)]


def _is_full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


class NotCaptured(Exception):
    """Why a loss has no graph."""


class CapturedGraph:
    """A graph of torch functions, as Dynamo captured it. number: in the order of capture."""

    def __init__(self, module: fx.GraphModule, number: int):
        self.module, self.number = module, number


class Front:
    """One loss function, called through its graphs; or an objective, which is given the model alone.

    code: what Dynamo made for the last call, where that is known.
    """

    def __init__(self, objective: bool = False) -> None:
        def of_loss(function, model, batch, z):
            return function(model, batch, z)

        def of_objective(function, model, batch, z):
            return function(model)

        entry = of_objective if objective else of_loss
        # A code object of its own, so that it shares no limit of recompilations with others.
        entry.__code__ = entry.__code__.replace(co_name=f"loss_{next(_count)}")
        # Dynamo keeps what it is given for as long as the process lives: it is given no more than a weak reference.
        weak = weakref.ref(self)

        def backend(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Sequence[Any]]:
            front = weak()
            assert front is not None
            return front._backend(module, weak)

        # Objectives of several shapes get a graph for each. A loss may also be given another number at every step.
        self._entry, self._compiled = entry, _compiled(entry, backend, dynamic=False if objective else None)
        self._known: list[Known] = []  # what Dynamo has compiled: its guards, and code
        self.code: types.CodeType | None = None
        self.graphs = 0
        self._run: Run | None = None
        self._loss: Any = None

    def __call__(self, function: Callable[..., Tensor], model: Any, batch: Any, z: Any, run: Run) -> None:
        """Call the loss `function`, with `run` in place of its graph. Raises NotCaptured, and whatever `run` raises."""
        self._run, self._loss = run, None
        try:
            value = self._value(function, model, batch, z)
        finally:
            self._run, loss = None, self._loss
            self._loss = None
        if loss is None or value is not loss:
            raise NotCaptured("what the loss returns is not what its graph computes first")

    @property
    def codes(self) -> list[types.CodeType]:
        """All that Dynamo made, as far as that is known."""
        return [code.__code__ for _, code in self._known if isinstance(code, types.FunctionType)]

    def _value(self, function: Callable[..., Tensor], model: Any, batch: Any, z: Any) -> Any:
        """What the code returns whose guards hold. Dynamo's own way to it takes 15 of 22 µs, and five times that where
        other code has run in between, as it has in every step."""
        named = {"function": function, "model": model, "batch": batch, "z": z}
        for guards, code in self._known:
            # Without an entry, Dynamo has let go of them: they look at objects that are gone.
            if guards.cache_entry is not None and guards.check(named):
                self.code = code.__code__
                return code(function, model, batch, z)
        self.code = None
        try:
            return self._compiled(function, model, batch, z)
        finally:
            self._known = _compiled_code(self._entry)

    def _backend(self, module: fx.GraphModule, weak: weakref.ref[Front]) -> Callable[..., Sequence[Any]]:
        _refuse_unsound(module)
        _inline_checkpoints(module)
        _show_data(module)
        graph = CapturedGraph(module, self.graphs)
        self.graphs += 1

        def call(*arguments: Any) -> Sequence[Any]:
            front = weak()
            assert front is not None and front._run is not None
            outputs = front._run(graph, arguments)
            front._loss = outputs[0]
            return outputs

        return call


def _compiled(
    entry: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None = None
) -> Callable[..., Any]:
    """As `torch.compile(entry, backend=backend, fullgraph=True, dynamic=dynamic)`, with settings of Dynamo while it
    captures. To set them at every call takes as long as the call."""
    context: Any = torch._dynamo.optimize(backend=backend, nopython=True, dynamic=dynamic)
    capture = getattr(context, "callback", None)
    if capture is None:  # Dynamo is switched off in this process
        return context(entry)

    settings = {
        "recompile_limit": MOST_GRAPHS,
        "skip_nnmodule_hook_guards": False,  # hooks may come and go between calls
        "allow_rnn": True,
        "capture_scalar_outputs": True,
        "capture_dynamic_output_shape_ops": True,
        "record_runtime_overhead": False,  # two calls around every run of a graph, for torch's profiler
    }
    known = {name: value for name, value in settings.items() if hasattr(torch._dynamo.config, name)}

    def callback(*arguments: Any) -> Any:
        # transformers adds methods that say a thing once: a graph, which is made once, need not.
        once = {vars(logging.Logger).get(f"{level}_once") for level in ("warning", "info")} - {None}
        ignored = {"ignore_logging_functions": torch._dynamo.config.ignore_logging_functions | once}
        with warnings.catch_warnings(), torch._dynamo.config.patch(known | ignored):
            warnings.simplefilter("ignore")
            return capture(*arguments)

    callback._torchdynamo_orig_backend = capture  # type: ignore[attr-defined]  # Dynamo looks through it
    context.callback = callback
    return context(entry)


def _compiled_code(entry: Callable[..., Any]) -> list[Known]:
    """What Dynamo has of this function; nothing where this torch has it elsewhere. The entries themselves are not kept:
    Dynamo frees them, whoever refers to them."""
    try:
        found = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(entry.__code__)  # type: ignore[attr-defined]
        known: list[Known] = [
            (x.guard_manager, types.FunctionType(x.code, entry.__globals__)) for x in found if x.code is not None
        ]
        return known if all(hasattr(x, "check") and hasattr(x, "cache_entry") for x, _ in known) else []
    except AttributeError:
        return []


def _modules(module: fx.GraphModule) -> list[fx.GraphModule]:
    return [part for part in module.modules() if isinstance(part, fx.GraphModule)]


def _refuse_unsound(module: fx.GraphModule) -> None:
    """Dynamo captures one backward pass of an autograd.Function, not the derivative of that, nor whether it has one.
    What is assigned to `.data` changes a tensor behind every trace."""
    for part in _modules(module):
        for node in part.graph.nodes:
            if node.target is _HIGHER_ORDER.autograd_function_apply:
                raise NotCaptured("the loss uses a torch.autograd.Function of its own")
            if node.target is torch.Tensor.set_:
                raise NotCaptured("the loss gives a tensor other memory, as by assigning to .data")


def _show_data(module: fx.GraphModule) -> None:
    """Modes hear of `tensor.data`, through which memory may be written."""
    for part in _modules(module):
        for node in part.graph.nodes:
            if node.target is getattr(torch._C._autograd, "_get_data_attr", None):
                node.target = data_of
        part.recompile()


def _inline_checkpoints(module: fx.GraphModule) -> None:
    """What is computed again in an activation checkpoint is computed once here: the graph decides what to keep."""
    for part in _modules(module):
        for node in list(part.graph.nodes):
            if node.target is _HIGHER_ORDER.tag_activation_checkpoint:
                with part.graph.inserting_before(node):
                    call = part.graph.call_module(node.args[0].target, node.args[1:])
                node.replace_all_uses_with(call)
                part.graph.erase_node(node)
        part.recompile()
