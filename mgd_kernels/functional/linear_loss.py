"""Cross-entropy of a linear layer's outputs, without these: operators, and the function. Names: `linear_loss_strips`.

Losses of tokens, which may be weighted outside, are one operator, with another for each derivative: 1 + 3 + 7 products
of size n V d. Their sum or mean leaves only a factor open, so what computes it where a derivative may be needed gives
the gradients for the factor 1 as well, from the same logits: 3 + 7 products, and one array more of the weight's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_kernels.errors import BadArgument
from mgd_kernels.functional import _library
from mgd_kernels.functional import linear_loss_strips as strips
from mgd_kernels.functional._library import like, operator, served, served_by_products, twice
from mgd_kernels.functional._team import team

_OPTIONS = "int ignore_index, float smoothing, float z_loss, float cap"

# --- Losses of tokens -------------------------------------------------------------------------------------------------


def _differentiate(ctx, gl, _statistics):
    if gl is None:
        return (None,) * 8
    h, weight, bias, target, statistics = ctx.saved_tensors
    parameters = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]  # the first is the dispatcher's
    gh, gw, gb = linear_cross_entropy_backward(gl, h, weight, bias, target, statistics, parameters, *ctx.arguments[4:])
    return gh, gw if parameters else None, gb if parameters and bias is not None else None, *(None,) * 5


def _differentiate_twice(ctx, c, cw, cb):
    wanted = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    return *_second(c, cw, cb, ctx.saved_tensors, wanted, *ctx.arguments[6:]), *(None,) * 7


def _second(c, cw, cb, tensors: Sequence[Any], wanted: bool, parameters: bool, *options) -> tuple[Tensor | None, ...]:
    """The cotangents of gl, h, weight and bias. tensors, options: as of the backward pass. wanted, parameters: whether
    weight and bias need cotangents, and whether they have gradients."""
    bias = tensors[3]
    if not parameters:
        cw = cb = None
    if bias is None:
        cb = None
    if c is None and cw is None and cb is None:
        return (None,) * 4
    ggl, gh, gw, gb = linear_cross_entropy_double_backward(c, cw, cb, *tensors, wanted, *options)
    return ggl, gh, gw if wanted else None, gb if wanted and bias is not None else None


def plain(h, weight, bias, target, ignore_index, smoothing, z_loss, cap) -> Tensor:
    """The losses, in torch's operators."""
    z = F.linear(h, weight, bias)
    if cap:
        z = cap * torch.tanh(z / cap)
    losses = F.cross_entropy(z, target, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing)
    if z_loss:
        losses = losses + z_loss * (z.logsumexp(-1).square() * (target != ignore_index))
    return losses


def _plain_double_backward(c, cw, cb, gl, h, weight, bias, target, _statistics, parameters, *options):
    function = lambda h, weight, bias: plain(h, weight, bias, target, *options)
    ggl, gh, gw, gb = twice(function, [h, weight, bias], [gl], [c, cw, cb])
    empty = weight.new_zeros(0)
    return ggl, gh, gw if parameters else empty, gb if parameters and gb is not None else empty


def _empty_gradients(h, weight, bias, parameters):
    gw = like(weight) if parameters else weight.new_empty(0)
    return like(h), gw, like(bias) if parameters and bias is not None else weight.new_empty(0)


linear_cross_entropy_forward = operator(
    f"linear_cross_entropy(Tensor h, Tensor weight, Tensor? bias, Tensor target, {_OPTIONS}) -> (Tensor, Tensor)",
    strips.forward,
    lambda h, *_: (like(h, h.shape[0]), like(h, h.shape[0], 2)),
    lambda args, out: (*args[:4], out[1]),
    _differentiate,
    non_differentiable=slice(1, 2),
    gpu=True,
)
linear_cross_entropy_backward = operator(
    "linear_cross_entropy_backward(Tensor gl, Tensor h, Tensor weight, Tensor? bias, Tensor target, Tensor statistics,"
    f" bool parameters, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    strips.backward,
    lambda gl, h, weight, bias, target, statistics, parameters, *_: _empty_gradients(h, weight, bias, parameters),
    lambda args, out: args[:6],
    _differentiate_twice,
    gpu=True,
)
linear_cross_entropy_double_backward = operator(
    "linear_cross_entropy_double_backward(Tensor? c, Tensor? cw, Tensor? cb, Tensor gl, Tensor h, Tensor weight,"
    f" Tensor? bias, Tensor target, Tensor statistics, bool parameters, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    strips.double_backward,
    lambda c, cw, cb, gl, h, weight, bias, target, statistics, parameters, *_: (
        like(gl),
        *_empty_gradients(h, weight, bias, parameters),
    ),
    plain=_plain_double_backward,
    gpu=True,
)

# Both in one, for a graph in which gl is known before the losses (`mgd.autodiff.graphs`).
linear_cross_entropy_with_gradients = operator(
    "linear_cross_entropy_with_gradients(Tensor gl, Tensor h, Tensor weight, Tensor? bias, Tensor target,"
    f" bool parameters, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    strips.forward_backward,
    lambda gl, h, weight, bias, target, parameters, *_: (
        like(gl),
        like(h, h.shape[0], 2),
        *_empty_gradients(h, weight, bias, parameters),
    ),
    gpu=True,
)

# --- Their sum or mean ------------------------------------------------------------------------------------------------


def _share(x: Tensor, target: Tensor, mean: bool, ignored: int) -> Tensor:
    return x / (target != ignored).sum() if mean else x


def _reduced(losses: Tensor, target: Tensor, mean: bool, ignored: int) -> Tensor:
    with team(losses.device):  # one thread: on several, the bits of a sum depend on their number
        total = losses.sum()
    return _share(total, target, mean, ignored)


def _total(h, weight, bias, target, mean, *options):
    losses, _ = strips.forward(h, weight, bias, target, *options)
    return _reduced(losses, target, mean, options[0])


def _total_with_gradients(h, weight, bias, target, mean, parameters, *options):
    gl = _share(h.new_ones(len(h)), target, mean, options[0])
    losses, statistics, *gradients = strips.forward_backward(gl, h, weight, bias, target, parameters, *options)
    return _reduced(losses, target, mean, options[0]), statistics, *gradients


def _total_backward(gl, gh, gw, gb, h, weight, bias, target, statistics, mean, parameters, *options):
    scaled = lambda x: gh.new_empty(0) if x is None else gl * x
    return gl * gh, scaled(gw), scaled(gb)


def _differentiate_total(ctx, gl, *_):
    if gl is None:
        return (None,) * 10
    h, weight, bias, target, statistics, *gradients = ctx.saved_tensors
    parameters = ctx.arguments[5]
    gh, gw, gb = linear_cross_entropy_total_backward(
        gl, *gradients, h, weight, bias, target, statistics, *ctx.arguments[4:]
    )
    return gh, gw if parameters else None, gb if parameters and bias is not None else None, *(None,) * 7


def _differentiate_total_twice(ctx, c, cw, cb):
    gl, *tensors = ctx.saved_tensors
    target, (mean, parameters, *options) = tensors[3], ctx.arguments[9:]
    each = _share(gl, target, mean, options[0]).expand(target.shape)
    wanted = ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
    ggl, *rest = _second(c, cw, cb, [each, *tensors], wanted, parameters, *options)
    ggl = None if ggl is None else _share(ggl.sum(), target, mean, options[0])
    return ggl, None, None, None, *rest, *(None,) * 8  # gh, gw and gb are functions of the others


linear_cross_entropy_total_with_gradients = operator(
    "linear_cross_entropy_total_with_gradients(Tensor h, Tensor weight, Tensor? bias, Tensor target, bool mean,"
    f" bool parameters, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _total_with_gradients,
    lambda h, weight, bias, target, mean, parameters, *_: (
        h.new_empty(()),
        like(h, h.shape[0], 2),
        *_empty_gradients(h, weight, bias, parameters),
    ),
    lambda args, out: (*args[:4], *out[1:]),
    _differentiate_total,
    non_differentiable=slice(1, 5),
    gpu=True,
)
linear_cross_entropy_total_backward = operator(
    "linear_cross_entropy_total_backward(Tensor gl, Tensor gh, Tensor? gw, Tensor? gb, Tensor h, Tensor weight,"
    f" Tensor? bias, Tensor target, Tensor statistics, bool mean, bool parameters, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    _total_backward,
    lambda gl, gh, gw, gb, *_: (like(gh), *(gh.new_empty(0) if x is None else like(x) for x in (gw, gb))),
    lambda args, out: (args[0], *args[4:9]),
    _differentiate_total_twice,
    gpu=True,
)


def _for_derivatives(h, weight, bias, target, mean, *options):
    parameters = weight.requires_grad or (bias is not None and bias.requires_grad)
    return linear_cross_entropy_total_with_gradients(h, weight, bias, target, mean, parameters, *options)[0]


linear_cross_entropy_total = operator(
    "linear_cross_entropy_total(Tensor h, Tensor weight, Tensor? bias, Tensor target, bool mean,"
    f" {_OPTIONS}) -> Tensor",
    _total,
    lambda h, *_: h.new_empty(()),
    differentiable=_for_derivatives,
    gpu=True,
)

# --- The function -----------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """`F.cross_entropy(F.linear(input, weight, bias), target)` without the logits: input `[..., d]`, weight `[V, d]`,
    target int64 `[...]`, bias `[V]`.

    z_loss: adds `z_loss * logsumexp(logits)²` to each loss. softcap: the logits are `softcap * tanh(logits / softcap)`.
    reduction: "mean" (over targets that are not ignored), "sum", or "none", which has the shape of target, so that each
    token can be weighted. By strips of tokens in float32 and float64 on the CPU, and in float32 on a GPU that Triton
    serves; elsewhere in torch's operators.
    """
    _check_arguments(input, weight, target, bias, reduction, label_smoothing, z_loss, softcap)
    h, rows = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    options = ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0)
    if _served(h, weight, bias, rows):
        if reduction != "none":
            return linear_cross_entropy_total(h, weight, bias, rows, reduction == "mean", *options)
        losses, _ = linear_cross_entropy_forward(h, weight, bias, rows, *options)
    else:
        losses = plain(h, weight, bias, rows, *options)
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (rows != ignore_index).sum()


def _served(h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> bool:
    if target.dtype is not torch.int64 or target.device != h.device:
        return False
    if not _library.on_gpu(h):
        return served_by_products(h, weight, bias)
    return not torch._C._are_functorch_transforms_active() and served(h, weight, bias, gpu=True)


def _check_arguments(input, weight, target, bias, reduction, label_smoothing, z_loss, softcap) -> None:
    def expect(fine: bool, what: str, got: object) -> None:
        if not fine:
            raise BadArgument(f"linear_cross_entropy: expected {what}; got {got}")

    expect(weight.ndim == 2, "weight [V, d]", list(weight.shape))
    vocabulary, width = weight.shape
    expect(
        input.ndim > 0 and input.shape[-1] == width,
        f"input [..., {width}], as wide as weight",
        list(input.shape),
    )
    expect(bias is None or bias.shape == (vocabulary,), f"bias [{vocabulary}]", bias is not None and list(bias.shape))
    expect(
        not target.is_floating_point() and target.shape == input.shape[:-1],
        f"target: class indices {list(input.shape[:-1])}",
        f"{target.dtype} {list(target.shape)}",
    )
    expect(reduction in ("mean", "sum", "none"), 'reduction "mean", "sum" or "none"', repr(reduction))
    expect(0 <= label_smoothing <= 1, "label_smoothing in [0, 1]", label_smoothing)
    expect(z_loss >= 0, "z_loss >= 0", z_loss)
    expect(softcap is None or softcap > 0, "softcap > 0, or None for no cap", softcap)
