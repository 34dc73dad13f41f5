"""The package's own models in JAX: a torch module is read, and the same function of its parameters is computed.

JAX is imported where it computes, so that the module can be imported without it.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from torch import nn

from mgd.bench.baselines import Unsupported
from mgd.recipes.models.encoder import ALPHA, HEADS, RANK, Encoder, LoRA
from mgd.recipes.models.encoder import Layer as EncoderLayer
from mgd.recipes.models.gpt import GPT, _Attention
from mgd.recipes.models.residual import Residual

Params = dict[str, Any]  # arrays by the names that torch gives them


@singledispatch
def apply(module: nn.Module, p: Params, at: str, x: Any) -> Any:
    """The output of a module in training mode for the input `x`; `at` is the prefix of its parameters' names."""
    raise Unsupported(f"the comparison with JAX has no {type(module).__name__} ({type(module).__module__})")


@apply.register
def _(module: nn.Sequential, p: Params, at: str, x: Any) -> Any:
    for name, part in module.named_children():
        x = apply(part, p, f"{at}{name}.", x)
    return x


@apply.register
def _(module: Residual, p: Params, at: str, x: Any) -> Any:
    return x + apply(module.body, p, f"{at}body.", x)


@apply.register
def _(module: nn.Linear, p: Params, at: str, x: Any) -> Any:
    y = x @ p[f"{at}weight"].T
    return y if module.bias is None else y + p[f"{at}bias"]


@apply.register
def _(module: nn.GELU, p: Params, at: str, x: Any) -> Any:
    import jax

    return jax.nn.gelu(x, approximate=False)


@apply.register
def _(module: nn.Flatten, p: Params, at: str, x: Any) -> Any:
    return x.reshape(len(x), -1)


@apply.register
def _(module: nn.Conv2d, p: Params, at: str, x: Any) -> Any:
    import jax

    return jax.lax.conv_general_dilated(x, p[f"{at}weight"], (1, 1), [(1, 1), (1, 1)])


@apply.register
def _(module: nn.AvgPool2d, p: Params, at: str, x: Any) -> Any:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))


@apply.register
def _(module: nn.AdaptiveAvgPool2d, p: Params, at: str, x: Any) -> Any:
    return x.mean((2, 3), keepdims=True)


def _standardized(x: Any, axes: Any, eps: float) -> Any:
    import jax.numpy as jnp

    return (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + eps)


@apply.register
def _(module: nn.LayerNorm, p: Params, at: str, x: Any) -> Any:
    return _standardized(x, -1, module.eps) * p[f"{at}weight"] + p[f"{at}bias"]


@apply.register
def _(module: nn.GroupNorm, p: Params, at: str, x: Any) -> Any:
    groups = x.reshape(len(x), module.num_groups, -1)
    y = _standardized(groups, -1, module.eps).reshape(x.shape)
    return y * p[f"{at}weight"][:, None, None] + p[f"{at}bias"][:, None, None]


@apply.register
def _(module: nn.BatchNorm2d, p: Params, at: str, x: Any) -> Any:
    y = _standardized(x, (0, 2, 3), module.eps)
    return y * p[f"{at}weight"][:, None, None] + p[f"{at}bias"][:, None, None]


def _attention(q: Any, k: Any, v: Any, heads: int, allowed: Any) -> Any:
    """Of `[B, T, C]`, under the mask `allowed` that broadcasts to `[B, heads, T, T]`."""
    import jax
    import jax.numpy as jnp

    split = lambda a: a.reshape(*a.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    q, k, v = split(q), split(k), split(v)
    scores = jnp.where(allowed, q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5, -jnp.inf)
    y = jax.nn.softmax(scores, -1) @ v
    return y.transpose(0, 2, 1, 3).reshape(len(y), y.shape[2], -1)


@apply.register
def _(module: _Attention, p: Params, at: str, x: Any) -> Any:
    import jax.numpy as jnp

    q, k, v = jnp.split(apply(module.qkv, p, f"{at}qkv.", x), 3, -1)
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    return apply(module.out, p, f"{at}out.", _attention(q, k, v, module.heads, causal))


@apply.register
def _(module: GPT, p: Params, at: str, x: Any) -> Any:
    table = p[f"{at}token.weight"]
    h = table[x] + p[f"{at}position.weight"][: x.shape[1]]
    for name, block in module.blocks.named_children():
        h = apply(block, p, f"{at}blocks.{name}.", h)
    return apply(module.norm, p, f"{at}norm.", h) @ table.T


@apply.register
def _(module: LoRA, p: Params, at: str, x: Any) -> Any:
    return apply(module.base, p, f"{at}base.", x) + (ALPHA / RANK) * (x @ p[f"{at}down"].T @ p[f"{at}up"].T)


@apply.register
def _(module: Encoder, p: Params, at: str, x: Any) -> Any:
    import jax.numpy as jnp

    there = x != 0
    h = p[f"{at}words.weight"][x] + p[f"{at}positions.weight"][: x.shape[1]] + p[f"{at}segment"]
    h = apply(module.norm, p, f"{at}norm.", h)
    for name, layer in module.layers.named_children():
        h = _encoder_layer(layer, p, f"{at}layers.{name}.", h, there[:, None, None, :])  # type: ignore[arg-type]
    weight = there[..., None].astype(h.dtype)
    return apply(module.head, p, f"{at}head.", (h * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0))


def _encoder_layer(module: EncoderLayer, p: Params, at: str, x: Any, allowed: Any) -> Any:
    import jax

    q, k, v = (apply(getattr(module, name), p, f"{at}{name}.", x) for name in ("query", "key", "value"))
    y = apply(module.out, p, f"{at}out.", _attention(q, k, v, HEADS, allowed))
    x = apply(module.norm1, p, f"{at}norm1.", x + y)
    hidden = jax.nn.gelu(apply(module.up, p, f"{at}up.", x), approximate=False)
    return apply(module.norm2, p, f"{at}norm2.", x + apply(module.down, p, f"{at}down.", hidden))
