"""Registers operators with fused derivatives in torch: one node in every graph, differentiated only by its own formula,
mapped over a batch in one call or by a loop, and an error for anything it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from mgd_kernels import memory
from mgd_kernels.backends import cpu
from mgd_kernels.backends.triton_nn import serves
from mgd_kernels.errors import BadArgument

_library = torch.library.Library("mgd_kernels", "FRAGMENT")

# batch(operator, size, in_dims, args) -> results, out_dims: as torch.library.register_vmap has it
Batch = Callable[[Callable[..., Any], int, Sequence["int | None"], Sequence[Any]], Any]

_ORDINARY = (Tensor, torch.nn.Parameter)

GPUS = {"cuda": "CUDA"}  # device type, which AMD's share -> torch's key for it
GPU_KERNELS: dict[str, Callable[..., Any]] = {}  # operators that take a GPU's tensors -> what they call

# The codes of mgd::Pass (csrc/nn/kernels.h).
FORWARD, BACKWARD, DOUBLE_BACKWARD = range(3)


def operator(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[[tuple, Any], Sequence[Tensor | None]] | None = None,
    backward: Callable[..., Any] | None = None,
    non_differentiable: slice = slice(0, 0),
    plain: Callable[..., Sequence[Tensor]] | None = None,
    differentiable: Callable[..., Any] | None = None,
    gpu: bool = False,
    batch: Batch | None = None,
):
    """Defines `mgd_kernels::<schema>` and returns a function that calls it.

    save(args, outputs): the tensors that `backward` will need. backward(ctx, *cotangents): the cotangents of args,
    from `ctx.saved_tensors` and `ctx.arguments`; an absent cotangent is None. non_differentiable: which outputs carry
    no derivative. plain: the same function of the same arguments in torch's operators, which is differentiated,
    any number of times, where there is no `backward`. differentiable: what is called instead where a derivative may be
    needed. gpu: `kernel` takes a GPU's tensors, too. batch: how `vmap` makes one call of many; None: it makes many.
    """
    name = schema[: schema.index("(")]
    qualified = f"mgd_kernels::{name}"
    if plain is not None:
        save, backward = (lambda args, outputs: args), _differentiate_plain(plain)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.mgd_kernels, name).default
    below_autograd = torch._C._after_autograd_keyset

    def forward(ctx, keyset, *args):
        if keyset is None:
            outputs = kernel(*args)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = op.redispatch(keyset & below_autograd, *args)
        ctx.set_materialize_grads(False)
        ctx.arguments = [None if isinstance(arg, Tensor) else arg for arg in args]
        if save is not None:
            ctx.save_for_backward(*(arg if isinstance(arg, Tensor) else None for arg in save(args, outputs)))
        if isinstance(outputs, tuple):
            ctx.mark_non_differentiable(*outputs[non_differentiable])
        return outputs

    def differentiate(ctx, *cotangents):
        if backward is None:
            raise NotImplementedError(f"derivative for {qualified} is not implemented")
        gradients = backward(ctx, *cotangents)
        return (None, *gradients) if isinstance(gradients, tuple) else (None, gradients)

    function: Any = type(
        f"{name}_function",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(differentiate)},
    )

    def autograd(keyset, *args):
        if fwAD._current_level >= 0 and any(
            isinstance(arg, Tensor) and fwAD.unpack_dual(arg).tangent is not None for arg in args
        ):
            raise NotImplementedError(
                f"Trying to use forward AD with {qualified} that does not support it: use reverse mode, or torch's own "
                "function."
            )
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(keyset, *args) if differentiable is None else differentiable(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & below_autograd, *args)

    def call(*args):
        # For a small tensor most of the time goes to the dispatcher, which is skipped where nothing observes it.
        if not _plain(args):
            return op(*args)
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(None, *args) if differentiable is None else differentiable(*args)
        return kernel(*args)

    def over_batch(info, in_dims, *args):
        pairs = zip(args, in_dims, strict=True)
        if batch is not None and all(not isinstance(x, Tensor) or x.ndim > (dim is not None) for x, dim in pairs):
            return batch(op, info.batch_size, in_dims, args)
        results = [
            op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], tuple):
            stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
            return stacked, (0,) * len(stacked)
        return torch.stack(results), 0

    _library.impl(name, kernel, "CPU")
    if gpu:
        GPU_KERNELS[name] = kernel
        for key in GPUS.values():
            _library.impl(name, kernel, key)
    _library.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_vmap(qualified, over_batch, lib=_library)
    return call


def _in_front(size: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> list[Any]:
    """The arguments with the batch, of this size, as the first dimension of every tensor."""
    return [
        arg if not isinstance(arg, Tensor) else arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        for arg, dim in zip(args, in_dims, strict=True)
    ]


def elementwise(op: Callable[..., Any], size: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """The batch rule of an operator whose tensors all have one shape, whichever."""
    found = op(*_in_front(size, in_dims, args))
    return found, (0,) * len(found) if isinstance(found, tuple) else 0


def by_rows(op: Callable[..., Any], size: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """The batch rule of an operator that takes each row of its tensors, all of as many rows, by itself."""
    found = op(*[x.flatten(0, 1) if isinstance(x, Tensor) else x for x in _in_front(size, in_dims, args)])
    parts = found if isinstance(found, tuple) else (found,)
    parts = tuple([x.unflatten(0, (size, len(x) // size)) for x in parts])
    return (parts, (0,) * len(parts)) if isinstance(found, tuple) else (parts[0], 0)


def only_autograd() -> bool:
    """Whether only autograd, in reverse, observes the call: no compilation, transform, or forward mode."""
    return not (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or fwAD._current_level >= 0
    )


def _plain(args: Sequence[Any]) -> bool:
    """Whether these are CPU tensors, and only autograd would observe the operator: no trace and no profile."""
    if not only_autograd() or torch._C._len_torch_dispatch_stack() or torch.autograd.profiler._is_profiler_enabled:
        return False
    # A tensor without storage stands for a batch of cotangents (`is_grads_batched`), or for none at all.
    return all(
        [not isinstance(x, Tensor) or (type(x) in _ORDINARY and x.is_cpu and torch._C._has_storage(x)) for x in args]
    )


def _differentiate_plain(plain: Callable[..., Sequence[Tensor]]) -> Callable[..., tuple]:
    def backward(ctx, *cotangents):
        create_graph = torch.is_grad_enabled()
        # torch's own functions, whatever mode the caller is in: one that calls ours for them would come back here.
        with torch.enable_grad(), torch._C.DisableTorchFunction():
            # Views, so that one tensor that stands in two places gets two gradients.
            inputs = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
            args = [other if x is None else x for x, other in zip(inputs, ctx.arguments, strict=True)]
            wanted = [x for x in inputs if x is not None and x.requires_grad]
            pairs = [
                (output, cotangent)
                for output, cotangent in zip(plain(*args), cotangents, strict=True)
                if cotangent is not None and output.requires_grad
            ]
            if not pairs:
                return (None,) * len(args)
            outputs, seeds = zip(*pairs, strict=True)
            gradients = iter(torch.autograd.grad(outputs, wanted, seeds, create_graph=create_graph, allow_unused=True))
        return tuple(next(gradients) if x is not None and x.requires_grad else None for x in inputs)

    return backward


def twice(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    second_cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """By torch: the cotangents of `cotangents` and of `inputs`, of Σ <second_cotangents, the gradients of
    <function(*inputs), cotangents> with respect to the inputs>. Absent tensors are None in every place."""

    def place(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.requires_grad else x.detach().requires_grad_()

    def grad(outputs, inputs, seeds):
        pairs = [(x, seed) for x, seed in zip(outputs, seeds, strict=True) if x is not None and seed is not None]
        present = [x for x in inputs if x is not None]
        values, weights = zip(*pairs, strict=True)
        gradients = iter(torch.autograd.grad(values, present, weights, create_graph=True, materialize_grads=True))
        return [None if x is None else next(gradients) for x in inputs]

    inputs, cotangents = [place(x) for x in inputs], [place(x) for x in cotangents]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    first = grad(outputs, inputs, cotangents)
    return grad(first, [*cotangents, *inputs], second_cotangents)


def served(
    *tensors: Tensor | None,
    gpu: bool = False,
    width: int | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> bool:
    """Whether the kernels can take these tensors here: of these dtypes, on the CPU, with elements, no subclass that has
    its own say in functions of torch, no autocast, and no torch.func transform other than vmap. gpu: or all on one GPU,
    where rows of this width, if it matters, are within what Triton's kernels take."""
    kind = "cpu"
    first = tensors[0]
    if gpu and first is not None and not first.is_cpu:
        kind = first.device.type
        if kind not in GPUS or any(x is not None and x.device != first.device for x in tensors):
            return False
    for tensor in tensors:
        if tensor is not None and (tensor.dtype not in dtypes or not _dense(tensor, kind)):
            return False
    if torch.is_autocast_enabled(kind) or (cpu.unavailable() is not None if kind == "cpu" else not serves(width)):
        return False
    if torch._C._are_functorch_transforms_active():
        vmap = torch._C._functorch.TransformType.Vmap
        return all(level.key() == vmap for level in torch._C._functorch.get_interpreter_stack())
    return True


def on_gpu(x: Tensor) -> bool:
    """Whether Triton's kernels take x, which some kernels do."""
    return not x.is_cpu


def _dense(x: Tensor, device: str = "cpu") -> bool:
    """Whether x is an ordinary tensor with elements on such a device. A subclass may compute functions in its own
    way."""
    kind = type(x)
    return (
        (kind in _ORDINARY or kind.__torch_function__ is torch._C._disabled_torch_function_impl)
        and x.device.type == device
        and x.layout is torch.strided
        and not x.is_nested
        and x.numel() != 0
    )


def served_by_products(*tensors: Tensor | None) -> bool:
    """Whether operators that are made of torch's matrix products can take these tensors here: float32 or float64, and
    otherwise as `served`, but no torch.func transform."""
    present = [x for x in tensors if x is not None]
    return (
        present[0].dtype in (torch.float32, torch.float64)
        and all(x.dtype is present[0].dtype and _dense(x) for x in present)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and cpu.unavailable() is None
    )


def channels_last(x: Tensor) -> bool:
    """Whether x is laid out with channels last, which the kernels would undo."""
    return not x.is_contiguous() and (
        (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    )


def contiguous(shape: Sequence[int], *tensors: Tensor | None) -> list[Any]:
    """The tensors as the kernels want them, None where None was given. They take addresses: anything that is
    not checked here could read memory that is not ours."""
    ready = []
    for tensor in tensors:
        if tensor is not None:
            if tensor.dtype is not torch.float32 or tensor.shape != shape:
                raise BadArgument(
                    f"expected a float32 tensor {list(shape)}; got {tensor.dtype} {list(tensor.shape)}: the operators "
                    "mgd_kernels:: take what their functions in mgd_kernels.functional pass to them"
                )
            tensor = tensor.resolve_neg().contiguous()
        ready.append(tensor)
    return ready


def dense(*tensors: Tensor | None) -> list[Any]:
    """Contiguous tensors of the same values: torch's kernels may round otherwise on other layouts."""
    return [None if x is None else x.resolve_neg().contiguous() for x in tensors]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else memory.address(tensor)


addresses = memory.addresses


def like(x: Tensor, *shape: int) -> Tensor:
    """An empty contiguous tensor: of x's shape, or of `shape`."""
    return x.new_empty(shape or x.shape)
