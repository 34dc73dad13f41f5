"""What people write that is, contains or resembles a formula that a step replaces.

Each is a function `[4, 6, 8]` -> `[4, ...]` of a model's hidden layer, in any dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

EPS, OUTER = 1e-2, math.sqrt(2 / math.pi)

Formula = Callable[["Model", Tensor], Tensor]
FORMULAS: dict[str, Formula] = {}
TOLD_OTHERWISE: set[str] = set()  # the backward pass is not the derivative of what they compute


class Model(nn.Module):
    def __init__(self, formula: Formula):
        super().__init__()
        self.first, self.second, self.formula = nn.Linear(5, 8), nn.Linear(8, 8), formula
        self.weight, self.bias = nn.Parameter(torch.linspace(0.5, 1.5, 8)), nn.Parameter(torch.linspace(-0.2, 0.2, 8))
        self.table, self.frozen = nn.Parameter(torch.linspace(-1, 1, 72).view(1, 2, 6, 6)), nn.Parameter(torch.ones(8))
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.linspace(0.8, 1.2, 8))
        self.normalise, self.batch = Normalise(), nn.BatchNorm1d(6)
        self.loss = nn.CrossEntropyLoss(torch.linspace(0.5, 1, 8), label_smoothing=0.1, ignore_index=2)
        self.binary = nn.BCEWithLogitsLoss(torch.linspace(0.5, 1, 8), pos_weight=torch.linspace(1, 2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, self.first(x))


class Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * rms(x)


def formula(function: Formula) -> Formula:
    FORMULAS[function.__name__] = function
    return function


def untrue(function: Formula) -> Formula:
    TOLD_OTHERWISE.add(function.__name__)
    return formula(function)


def given(**formulas: Formula) -> None:
    FORMULAS.update(formulas)


# --- RMSNorm -----------------------------------------------------------------------------------------------------


def variance(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def rms(x: Tensor) -> Tensor:
    return torch.rsqrt(variance(x) + EPS)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * rms(x))


def changed(change: Callable[[Tensor], object]) -> Formula:
    """The norm, whose factor something happens to."""

    def function(m: Model, x: Tensor) -> Tensor:
        r = rms(x)
        change(r)
        return m.weight * (x * r)

    return function


given(
    norm_with_gemmas_weight=lambda m, x: x * rms(x) * (1.0 + m.weight),
    norm_with_eps_outside=lambda m, x: m.weight * (x * (torch.rsqrt(variance(x)) + EPS)),
    norm_with_eps_after_the_root=lambda m, x: m.weight * (x / (variance(x).sqrt() + EPS)),
    norm_by_a_power=lambda m, x: m.weight * x * (variance(x) + EPS).pow(-0.5),
    norm_over_two_dimensions=lambda m, x: m.weight * (x * torch.rsqrt(x.pow(2).mean((-1, -2), keepdim=True) + EPS)),
    norm_by_the_sum=lambda m, x: m.weight * (x * (x.square().sum(-1, keepdim=True) / 8 + EPS).rsqrt()),
    norm_with_a_learned_eps=lambda m, x: m.weight * (x * torch.rsqrt(variance(x) + m.weight[:1])),
    norm_with_eps_twice=lambda m, x: m.weight * (x * torch.rsqrt(variance(x) + EPS + 0.5)),
    norm_with_a_weight_per_position=lambda m, x: norm(x, m.second.weight[:6]),
    norm_with_one_weight=lambda m, x: norm(x, m.weight[0]),
    norm_with_a_viewed_weight=lambda m, x: norm(x, m.weight.view(1, 1, 8)),
    norm_with_a_weight_in_float64=lambda m, x: norm(x, m.weight.double()),
    norm_with_a_frozen_weight=lambda m, x: norm(x, m.frozen),
    norm_with_a_buffer_as_weight=lambda m, x: norm(x, m.scale),
    norm_of_a_buffer=lambda m, x: x * norm(m.scale, m.frozen),
    norm_of_a_frozen_parameter=lambda m, x: x * norm(m.frozen, m.weight),
    norm_of_a_number=lambda m, x: norm(x.mean(), m.weight[0]) * x,
    norm_of_a_transposed=lambda m, x: norm(x.transpose(1, 2), m.weight[:6]),
    norm_of_no_rows=lambda m, x: torch.cat((norm(x[:, :0], m.weight), x), 1),
    norm_of_an_expanded=lambda m, x: norm(x[:, :1].expand(4, 6, 8), m.weight),
    norm_whose_parts_are_read=lambda m, x: norm(x, m.weight) * rms(x).log() + variance(x) + m.bias * (x * rms(x)),
    norm_by_a_hookless_module=lambda m, x: m.weight * m.normalise(x),
    norm_inside_vmap=lambda m, x: torch.func.vmap(lambda x: norm(x, m.weight))(x),
    norm_inside_grad=lambda m, x: torch.func.grad(lambda x: norm(x, m.weight).sin().sum())(x),
    norm_inside_jvp=lambda m, x: torch.func.jvp(lambda x: norm(x, m.weight).sin(), (x,), (x.detach().cos(),))[1],
    norm_looked_at_by_grad=lambda m, x: inner_gradient(m, x),
    norm_whose_factor_is_written_by_data=changed(lambda r: r.data.mul_(2)),
    norm_whose_factor_gets_other_data=changed(lambda r: setattr(r, "data", r.detach() * 2)),
    norm_whose_factor_is_written_by_numpy=changed(lambda r: r.detach().numpy().__imul__(2)),
    norm_whose_factor_is_detached_in_place=changed(lambda r: r.detach_()),
    norm_whose_factor_has_a_hook=changed(lambda r: r.register_hook(lambda g: 2 * g) and None),
    norm_whose_factor_has_a_hook_on_its_node=changed(lambda r: r.grad_fn.register_prehook(doubled)),
    norm_whose_factor_has_a_harmless_hook=changed(
        lambda r: torch.autograd.graph.register_multi_grad_hook([r], lambda g: None)
    ),
)
TOLD_OTHERWISE.update(name for name in FORMULAS if name.startswith("norm_whose_factor"))
TOLD_OTHERWISE.add("norm_inside_jvp")


def doubled(gradients):
    return tuple(None if g is None else 2 * g for g in gradients)


def inner_gradient(m: Model, x: Tensor) -> Tensor:
    r = rms(x)
    y = m.weight * (x * r)
    return y + torch.autograd.grad([y.sin().sum()], [r], create_graph=True)[0]


@untrue
def norm_with_a_detached_variance(m, x):
    return m.weight * (x * torch.rsqrt(variance(x).detach() + EPS))


@untrue
def norm_with_a_constant_factor(m, x):
    with torch.no_grad():
        r = rms(x)
    return m.weight * (x * r)


@untrue
def norm_that_is_detached_before_its_weight(m, x):
    return m.weight * (x * rms(x)).detach_() + x


@untrue
def norm_whose_graph_is_walked(m, x):
    y = norm(x, m.weight)
    y.grad_fn.next_functions[1][0].register_prehook(doubled)
    return y


@untrue
def norm_of_a_module_with_a_backward_hook(m, x):
    if not m.normalise._backward_hooks:
        m.normalise.register_full_backward_hook(lambda module, gi, go: doubled(gi))
    return m.weight * m.normalise(m.second(x))


@formula
def norm_written_in_place(m, x):
    v = variance(x)
    v += EPS
    y = x * torch.rsqrt(v)
    y *= m.weight
    return y


@formula
def norm_with_parts_changed_in_place(m, x):
    r, y = rms(x) * 1, x * rms(x)
    r.mul_(2)
    y[..., 0] = 0.3
    return m.weight * (x * r) + m.bias * y


class Odd(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 1.5 * result if func in (torch.rsqrt, F.gelu) else result


@formula
def functions_of_a_subclass(m, x):
    y = x.as_subclass(Odd)
    return (norm(y, m.weight) + F.gelu(y)).as_subclass(Tensor)


# --- GELU --------------------------------------------------------------------------------------------------------


def inner(x: Tensor, cubic: float = 0.044715) -> Tensor:
    return x + cubic * torch.pow(x, 3.0)


given(
    gelu_factored=lambda m, x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    gelu_with_another_cubic=lambda m, x: 0.5 * x * (1 + torch.tanh(OUTER * inner(x, 0.0447))),
    gelu_with_another_factor=lambda m, x: 0.5 * x * (1 + torch.tanh(0.79788 * inner(x))),
    gelu_with_a_square=lambda m, x: 0.5 * x * (1 + torch.tanh(OUTER * (x + 0.044715 * x**2))),
    gelu_with_minus=lambda m, x: 0.5 * x * (1 - torch.tanh(OUTER * inner(x))),
    gelu_with_two=lambda m, x: 0.5 * x * (2 + torch.tanh(OUTER * inner(x))),
    gelu_times_another=lambda m, x: 0.5 * m.second(x) * (1 + torch.tanh(OUTER * inner(x))),
    gelu_halved_last=lambda m, x: (x * (1 + torch.tanh(OUTER * inner(x)))) * 0.5,
    gelu_by_sigmoid=lambda m, x: x * torch.sigmoid(1.702 * x),
    gelu_of_a_buffer=lambda m, x: x * (0.5 * m.scale * (1 + torch.tanh(OUTER * inner(m.scale)))),
    gelu_of_channels_last=lambda m, x: new_gelu(x.view(4, 6, 4, 2).contiguous(memory_format=torch.channels_last)),
)


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(OUTER * inner(x)))


@untrue
def gelu_with_a_detached_half(m, x):
    return (0.5 * x).detach_() * (1.0 + torch.tanh(OUTER * inner(x)))


# --- Rotary embeddings -------------------------------------------------------------------------------------------


def heads(x: Tensor) -> Tensor:
    return x.view(4, 6, 2, 4).transpose(1, 2)


def angles(x: Tensor, frequencies: Tensor | None = None) -> Tensor:
    if frequencies is None:
        frequencies = torch.tensor([1.0, 0.3, 1.0, 0.3], dtype=x.dtype)
    return torch.outer(torch.arange(6, dtype=x.dtype), frequencies)[None, None]


def rotated(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 2:], x[..., :2]), -1)


def rotary(x: Tensor, a: Tensor, turn: Callable[[Tensor], Tensor] = rotated) -> Tensor:
    return x * a.cos() + turn(x) * a.sin()


def turned_by(turn: Callable[[Tensor], Tensor]) -> Formula:
    return lambda m, x: rotary(heads(x), angles(x), turn)


given(
    rotary_interleaved=turned_by(lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)),
    rotary_the_other_way=turned_by(lambda x: torch.cat((x[..., 2:], -x[..., :2]), -1)),
    rotary_without_a_sign=turned_by(lambda x: torch.cat((x[..., 2:], x[..., :2]), -1)),
    rotary_of_uneven_parts=turned_by(lambda x: torch.cat((-x[..., 1:], x[..., :1]), -1)),
    rotary_of_chunks=turned_by(lambda x: torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1)),
    rotary_of_another=turned_by(lambda x: rotated(x * 1)),
    rotary_backwards=lambda m, x: heads(x) * angles(x).cos() - rotated(heads(x)) * angles(x).sin(),
    rotary_with_two_angles=lambda m, x: heads(x) * angles(x).sin() + rotated(heads(x)) * (2 * angles(x)).cos(),
    rotary_with_learned_angles=lambda m, x: rotary(heads(x), angles(x, m.weight[:4])),
    rotary_with_angles_of_a_buffer=lambda m, x: rotary(heads(x), angles(x, m.scale[:4])),
    rotary_of_a_buffer=lambda m, x: heads(x) + rotary(m.scale.view(1, 2, 1, 4).expand(4, 2, 6, 4) * 1, angles(x)),
    rotary_with_angles_per_head=lambda m, x: rotary(heads(x), torch.cat((angles(x), 2 * angles(x)), 1)),
    rotary_of_positions_first=lambda m, x: rotary(x.view(4, 6, 2, 4), angles(x).transpose(1, 2)),
)


@untrue
def rotary_with_a_detached_half(m, x):
    q, a = heads(x), angles(x)
    return q * a.cos() + torch.cat(((-q[..., 2:]).detach_(), q[..., :2]), -1) * a.sin()


@formula
def rotary_changed_in_place(m, x):
    q, a = heads(x), angles(x)
    turned = rotated(q)
    turned[..., 0] = 0
    y = q * a.cos()
    y += turned * a.sin()
    return y


# --- Attention, losses, norms of torch ---------------------------------------------------------------------------


def attention(keys: int = 6, queries: int = 6, mask: Callable[[Model, Tensor], Tensor | None] | None = None, **options):
    def function(m: Model, x: Tensor) -> Tensor:
        q, k, v = heads(x), heads(m.second(x)), heads(m.second(m.weight * x))
        q, k, v = q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]
        if options.get("enable_gqa"):
            k, v = k[:, :1], v[:, :1]
        return F.scaled_dot_product_attention(q, k, v, mask and mask(m, x), **options)

    return function


def hidden(value: float, diagonal: int = 0) -> Callable[[Model, Tensor], Tensor]:
    seen = torch.ones(6, 6, dtype=torch.bool).tril(diagonal)
    return lambda m, x: torch.zeros(6, 6, dtype=x.dtype).masked_fill(~seen, value)


given(
    attention_with_a_scale=attention(scale=-0.5),
    attention_with_no_scale=attention(scale=0.0),
    attention_with_rows_that_see_nothing=attention(mask=lambda m, x: torch.ones(6, 6, dtype=torch.bool).tril(-1)),
    attention_with_infinite_rows=attention(mask=hidden(-math.inf, -1)),
    attention_with_rows_of_the_least_number=attention(mask=hidden(torch.finfo(torch.float32).min, -1)),
    attention_with_a_bias=attention(mask=lambda m, x: m.table),
    attention_with_a_bias_per_key=attention(mask=lambda m, x: m.table[:, :, :1]),
    attention_with_a_bias_per_query=attention(mask=lambda m, x: m.table[..., :1]),
    attention_with_a_masked_bias=attention(mask=lambda m, x: m.table + hidden(-math.inf)(m, x)),
    attention_with_a_buffer_as_mask=attention(mask=lambda m, x: m.scale[:6]),
    attention_with_more_keys=attention(queries=4, is_causal=True),
    attention_with_more_queries=attention(keys=4, is_causal=True),
    attention_aligned_at_the_end=attention(queries=4, mask=lambda m, x: causal_lower_right(4, 6)),
    attention_with_grouped_queries=attention(enable_gqa=True, is_causal=True),
    attention_with_groups_and_a_buffer=attention(mask=lambda m, x: m.scale[:6].expand(6, 6), enable_gqa=True),
    softmax_with_a_cap=lambda m, x: F.softmax(5 * torch.tanh(m.second(x) / 5), -1),
    softmax_over_other_dimensions=lambda m, x: torch.softmax(x, 1) + F.softmax(x, 0) + x.softmax(-2),
    loss_with_weights_of_a_buffer=lambda m, x: x * m.loss(m.second(x).view(24, 8), torch.arange(24) % 8),
    loss_with_binary_weights=lambda m, x: x * m.binary(m.second(x), torch.full_like(x, 0.3)),
    loss_with_learned_soft_targets=lambda m, x: (
        x * F.cross_entropy(x.flatten(0, 1), F.softmax(m.second(x).view(24, 8), 1))
    ),
    loss_without_targets=lambda m, x: x + F.cross_entropy(x.view(24, 8), torch.full((24,), -100), reduction="sum"),
    running_statistics_in_both_modes=lambda m, x: m.batch.train()(x) + m.batch.eval()(x),
    layer_norm_of_a_buffer=lambda m, x: x * F.layer_norm(m.scale, [8]),
    numbers_of_a_buffer=lambda m, x: x * float(m.scale.numpy().mean()) * (2.0 if m.scale.requires_grad else 1.0),
)


@formula
def autocast_in_parts(m, x):
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype is torch.bfloat16):
        r = rms(x)
    return m.weight * (x * r)


TOLD_OTHERWISE.add("attention_with_rows_of_the_least_number")  # it absorbs the scores, which keep their gradients
