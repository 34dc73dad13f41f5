"""JAX and optax: one compiled program of scans, whose segments of sqrt(T) steps are under `jax.checkpoint`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from mgd.bench.baselines import Unsupported
from mgd.bench.cases import Case
from mgd.bench.methods import Outcome
from mgd.bench.peers.libraries import library
from mgd.bench.peers.segments import segment_length
from mgd_kernels import SGD, AdamW


def prepare(case: Case) -> Callable[[], Outcome]:
    """The metagradient of a workload of pairs of inputs and labels; the first call compiles."""
    jax, optax = library("jax"), library("optax")
    from mgd.bench.peers.jax_models import apply

    function, defaults = case.function, case.function.optimizer.defaults
    if isinstance(function.batches[0], Mapping):
        raise Unsupported("transformers 5 has no models in JAX")
    if set(case.z) != {"lr", "weight_decay", "data_weights"} or function.microbatches > 1 or function.max_grad_norm:
        raise Unsupported("the comparison with JAX differentiates lr, weight_decay and data_weights alone")
    model, length = function.model, segment_length(len(case))

    def array(tensor: torch.Tensor) -> Any:
        return jax.numpy.asarray(tensor.detach().numpy())

    def folded(x: Any) -> Any:  # [T, ...] to [segments, steps of one, ...]
        return x.reshape(len(case) // length, length, *x.shape[1:])

    every = {name: (p.requires_grad, array(p)) for name, p in model.named_parameters()}
    start = {name: value for name, (trained, value) in every.items() if trained}
    frozen = {name: value for name, (trained, value) in every.items() if not trained}
    data = [folded(array(torch.stack(column))) for column in zip(*map(tree_leaves, function.batches), strict=True)]
    held_out = [array(tensor) for tensor in tree_leaves(case.held_out)[:2]]
    # Arguments of the program: of constants, XLA would compute what it can while it compiles, for minutes.
    given = {"start": start, "frozen": frozen, "data": data, "held_out": held_out}

    def losses(given: Any, params: Any, inputs: Any, labels: Any) -> Any:
        """The loss of each example, its tokens averaged."""
        logits = apply(model, {**given["frozen"], **params}, "", inputs)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return each.reshape(len(inputs), -1).mean(1)

    def optimizer(lr: Any, decay: Any) -> Any:
        match function.optimizer:
            case AdamW():
                b1, b2, eps, root = (defaults[name] for name in ("beta1", "beta2", "eps", "eps_root"))
                return optax.adamw(lr, b1, b2, eps, root, weight_decay=decay)
            case SGD():
                return optax.chain(optax.add_decayed_weights(decay), optax.sgd(lr, defaults["momentum"]))
            case other:
                raise Unsupported(f"the comparison with JAX has no {type(other).__name__}")

    def trained_objective(z: Any, given: Any) -> Any:
        def step(carry: Any, now: Any) -> Any:
            params, kept = carry
            (inputs, labels, index), lr = now
            loss = lambda params: (z["data_weights"][index] * losses(given, params, inputs, labels)).mean()
            updates, kept = optimizer(lr, z["weight_decay"]).update(jax.grad(loss)(params), kept, params)
            return (optax.apply_updates(params, updates), kept), None

        segment = jax.checkpoint(lambda carry, inputs: jax.lax.scan(step, carry, inputs))
        carry = given["start"], optimizer(0.0, 0.0).init(given["start"])
        (params, _), _ = jax.lax.scan(segment, carry, (given["data"], folded(z["lr"])))
        return losses(given, params, *given["held_out"]).mean()

    differentiated = jax.jit(jax.value_and_grad(trained_objective))
    z = {key: array(value) for key, value in case.z.items()}

    def run() -> Outcome:
        value, grads = jax.block_until_ready(differentiated(z, given))
        back = lambda x: torch.from_numpy(np.array(x))
        return Outcome(back(value), {key: back(grads[key]) for key in case.z})

    return run
