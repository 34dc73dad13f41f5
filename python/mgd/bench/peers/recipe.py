"""What an expert writes in forty lines of torch: a compiled step of `torch.func`, under reentrant checkpoints.

The step takes its gradient by `torch.func.grad`, so one backward pass through the compiled step is the metagradient's.
Segments of sqrt(T) steps are checkpointed (Chen et al. 2016, arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_unflatten
from torch.utils.checkpoint import checkpoint

from mgd.bench.baselines import PlainTorch, Unsupported
from mgd.bench.cases import Case
from mgd.bench.methods import Outcome
from mgd.bench.peers.segments import segment_length, without_statistics
from mgd_kernels import SGD


def prepare(case: Case, backend: str = "inductor") -> Callable[[], Outcome]:
    """The metagradient of a case; its first call compiles."""
    plain = PlainTorch(case.function, case.z)
    if case.function.microbatches > 1 or case.function.max_grad_norm is not None:
        raise Unsupported("the recipe has no microbatches and no clipping")
    without_statistics(plain.model)
    state, leaves = plain.initial(), plain.leaves
    count, length = len(state.params), segment_length(plain.T)
    momentum = isinstance(plain.optimizer, SGD)
    names = plain.optimizer.hyper_names
    per_example = case.function.per_example
    slots = len(plain.optimizer.slots)

    def one(
        params: list[Tensor], kept: list[list[Tensor]], k: Any, hyper: dict[str, Any], seen: Any, batch: Any
    ) -> Any:
        def loss(params: list[Tensor]) -> Tensor:
            tensors = {f"model.{name}": p for name, p in zip(plain.names, params, strict=True)}
            return torch.func.functional_call(plain.call, tensors, (case.function.loss, batch, seen))

        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            grads = torch.func.grad(loss)(params)
        return [plain.update(p, list(s), g, hyper, k) for p, s, g in zip(params, kept, grads, strict=True)]

    compiled = torch.compile(one, backend=backend, fullgraph=True, dynamic=False)

    def segment(start: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        params, flat, given = tensors[:count], tensors[count : -len(leaves)], tensors[-len(leaves) :]
        z = tree_unflatten(list(given), plain.spec)
        kept = [list(flat[i * slots : (i + 1) * slots]) for i in range(count)]
        columns: list[Any] = [(p, *s) for p, s in zip(params, kept, strict=True)]
        for t in range(start, min(start + length, plain.T)):
            hyper = {
                name: (z[name][t] if z[name].ndim else z[name]) if name in z else plain.optimizer.defaults[name]
                for name in names
            }
            batch = case.function.batches[t]
            seen = {
                key: value[per_example[key](batch)] if key in per_example else value
                for key, value in z.items()
                if key not in names
            }
            # A buffer of momentum begins at zero: without dampening, that is the first update as well.
            k = 2 if momentum else torch.tensor(float(t + 1), dtype=params[0].dtype)
            columns = compiled([c[0] for c in columns], [list(c[1:]) for c in columns], k, hyper, seen, batch)
        return (*(c[0] for c in columns), *(s for c in columns for s in c[1:]))

    def run() -> Outcome:
        tensors = tuple(state.params) + tuple(slot[i] for i in range(count) for slot in state.slots)
        for start in range(0, plain.T, length):
            tensors = checkpoint(segment, start, *tensors, *leaves, use_reentrant=True)
        final = plain.initial()
        final.params = list(tensors[:count])
        value = plain.objective(final)
        for tensor in [*leaves, *state.params]:
            tensor.grad = None
        value.backward()
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return Outcome(value.detach(), tree_unflatten(grads, plain.spec))

    return run
